"""Pruning and quantization of a whole tree, solved from its weights alone.

`allocate` reads a pretrained parameter tree once and solves one of two problems in closed form:

  * `sparsity` and `bits`, the two targets of the paper (Hu et al., "OPQ: Compressing Deep Neural
    Networks with One-shot Pruning-Quantization", AAAI 2021).  First every leaf gets a threshold, so
    that `sparsity` of all weights is pruned; then every leaf gets a step, so that the survivors
    need `bits` bits on average.
  * `bits_per_weight`, one target for both (our derivation).  Thresholds and steps are chosen
    together, so that the entropy-coded weights take that many bits.  `compression_rate` is 32 over
    it, and `file_rate` is the rate of the whole file.

Both minimise sum_i F_i(D_i) over the squared errors D_i of the leaves, with one Lagrange multiplier
for all leaves.  `opq_jax.allocation.sparsity` and `opq_jax.allocation.fixed_width` solve the first
problem, `opq_jax.allocation.rate_search` the second.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opq_jax.allocation.answer_checks import check_answer, warn_of_width, warn_of_zeros
from opq_jax.allocation.chosen_by_usage import arguments_of
from opq_jax.allocation.joined_statistics import join, layout_of
from opq_jax.allocation.lattices import Lattice, lattice_of
from opq_jax.allocation.measured_leaves import (
  Axes,
  axes_of,
  candidates,
  measured,
  numbers_of_parts,
  tied_record,
)
from opq_jax.allocation.objectives import Objective, check_omegas, energy_power
from opq_jax.allocation.output_scales import section_bits
from opq_jax.allocation.palette_scales import palette_scales
from opq_jax.allocation.parts import (
  MeasuredLeaf,
  Part,
  Weights,
  by_leaf,
  leaf_allocations,
  parts_of,
)
from opq_jax.allocation.records import Allocation, LeafAllocation
from opq_jax.allocation.second_look import look_again
from opq_jax.allocation.selection import choose_leaves
from opq_jax.allocation.shards import HERE, placement_of
from opq_jax.allocation.solver import solve
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.allocation.targets import (
  BitsPerWeight,
  SparsityAndBits,
  Targets,
  check_file_rate,
  check_targets,
)
from opq_jax.core import trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.ties import tied
from opq_jax.core.trees import PyTree


def allocate(
  params: PyTree,
  *,
  sparsity: float | Array | None = None,
  bits: float | Array | None = None,
  compression_rate: float | Array | None = None,
  bits_per_weight: float | Array | None = None,
  file_rate: float | None = None,
  objective: Objective | PyTree = 'balanced_error',
  compressible: Callable[[str, Any], bool] | None = None,
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes] | None = None,
  slices: Callable[[str, Any], int] | None = None,
  usage: PyTree | None = None,
  palette_bits: int | None = None,
  corrected: bool = True,
  read: Callable[[str], Weights] | None = None,
) -> Allocation:
  """Chooses a pruning threshold and one grid, shared by all channels, for every leaf.

  With E_i the pruning error, D_i the total squared error, R_i the entropy of the codes and b_ij
  the bits that channel j of leaf i needs at a fixed width (`opq_jax.allocation.laplace`):

    sparsity, bits:    minimise sum_i F_i(E_i)  subject to  sum_i n_i p_i = sparsity * n,  then
                       minimise sum_i F_i(D_i)  subject to  sum_ij m_ij b_ij = bits * sum_ij m_ij
    bits_per_weight:   minimise sum_i F_i(D_i)  subject to  sum_i n_i R_i = bits_per_weight * n

  R_i includes the weights beyond a leaf's last cell, which are stored exactly, so the end of every
  grid is part of the solution.  Any rate between everything pruned and all values exact is met.
  Where the weights allow no allocation of exactly that rate, the answer takes fewer bits and a
  warning says how many.

  Args:
    params: any pytree of arrays: params, or whole Flax variables.  Leaves laid over a mesh
      (`NamedSharding`) are never gathered.  Histograms and maxima are those of one device; scales
      are sums in another order (`opq_jax.allocation.leaf_statistics`).  So every field of the
      answer agrees with one device's to 1e-3, because the search for a rate ends within 1e-4 of it,
      and with `bits` to 5e-3, because the least cost (which agrees to 5e-4) is flat.  A leaf may be
      replaced by its `LeafStatistics`, computed before or elsewhere: allocate(params) is
      allocate(jax.tree.map(leaf_statistics, params)).
    sparsity: share of all compressed weights to prune, in [0, 1).  Together with `bits`.
    bits: mean bits of a surviving weight at a fixed width, its sign included; 1 ... 7.98.  A weight
      beyond 127 cells also counts the bits of its value.
    compression_rate: 32 over `bits_per_weight`, whatever the dtype of a leaf.  Without any target
      it is 10.
    bits_per_weight: bits of the codes per weight of the compressed leaves, at their zeroth-order
      entropy, with frequency tables and escaped weights; contexts (`opq_jax.coding.contexts`) make
      the file smaller still.
    file_rate: bytes of the tree in its own dtypes over bytes of the whole file: biases, tables and
      headers counted, contexts used (`opq_jax.file.rate.at_file_rate`).  Not in a trace.
    objective: with S_i the energy of leaf i under the Laplace density,
      * 'balanced_error': F_i = D_i / sqrt(S_i).  The cost of an error lies between two extremes:
        equal for all leaves (omega_i = 1, where outputs are summed, as in residual streams) and
        relative to the leaf's energy (omega_i = 1 / S_i, where a normalisation follows).  The
        geometric mean misprices a pair of leaves by at most the root of their energy ratio (our
        derivation; `experiments/benchmarks/accuracy/objectives.py` compares all four);
      * 'retained_signal': F_i = -log(1 - D_i / S_i), the log of the squared correlation of a leaf
        with its original: correlations multiply along a chain of layers (our derivation);
      * 'relative_error': F_i = D_i / S_i;
      * 'squared_error': F_i = D_i, a common threshold, the plain reading of the paper;
      * a pytree like `params` with a positive number omega_i at every compressed leaf, or one for
        each of its slices: F_i = omega_i D_i;
      * or with one for each output j of a leaf: F_i = sum_j omega_ij D_ij.  They broadcast over the
        leaf: [inputs, outputs] has [1, outputs] of them.  Where it pays, outputs then have scales
        of their own, and the leaf is allocated as its weights over them
        (`opq_jax.allocation.output_scales`).  Not in a trace.
    compressible: (path, leaf) -> whether a leaf is compressed, with paths like
      'params/Conv_0/kernel'; by default a rule of shapes and names (`is_compressible`) that leaves
      biases, normalizations, masks, buffers and the state of an optimizer alone.
      Leaves without elements always pass through.
    channel_axis: axis of the output channels, a tuple of several (1 and 2 of a projection onto
      heads), or (path, leaf) -> axis.  A vector is one channel.
    slices: (path, leaf) -> how many leading axes of a leaf count slices, each a matrix of its own:
      1 for the layers of `nn.scan` or the experts of one leaf, 2 for the experts of scanned layers.
      Each slice then has a threshold, a grid and a term of the objective of its own, bit for bit
      those that it has as a leaf by itself where the solver meets all slices in the same order,
      and else up to rounding.
    usage: how a function uses the leaves, `opq_jax.usage(fn, params, *inputs)`.  `compressible`,
      `channel_axis` and `slices` follow from it where they are not given: leaves of products and
      look-ups are compressed, whatever their names.  An expert that sees a share p of all rows has
      a term p F_i in the objective, which is an expectation over rows then.
    palette_bits: b of the palettes of runtimes that keep an index of b bits a weight in memory, 2
      ... 8: every leaf, or slice, has 2^b - 1 values at most.  No weight escapes: those beyond the
      last cell take its level, and their error is part of the solution
      (`opq_jax.allocation.palettes`).  Where it pays, outputs have scales, which are factors of the
      values (`opq_jax.allocation.palette_scales`; not in a trace).  Alone it asks for the least
      error; with a rate, for the least error within it.  Not with `sparsity` and `bits`.
    corrected: whether to count one histogram per leaf and solve with it.  Bits per weight are then
      those of the actual codes, thresholds prune exactly the share that each leaf is given, `bits`
      counts the true survivors, a leaf of few magnitudes may be held exactly
      (`opq_jax.allocation.lattices`), and a leaf of zeros passes through.  Otherwise the answer is
      that of the Laplace density, at no more than 8 bits per weight, in a fraction of the time
      (`experiments/benchmarks/resources/speed.py`).
    read: path -> the weights of a leaf whose statistics stand in `params`.  `sparsity` and `bits`
      read the weights twice more, for exact thresholds and for the survivors of every channel.
      Without `read`, thresholds are interpolated in the histograms (off by at most the weights of
      one bin), and the Laplace density shares out the survivors among the channels.

  Returns:
    An `Allocation`.  Leaves that are one array (an embedding that is the last layer too), or one
    the transpose of the other, count once and get one record.  The call is pure and may be traced
    (`jit`, `vmap` over targets, `eval_shape`); values are checked and compared only where they are
    concrete.

  Raises:
    ValueError: an empty tree, or nothing to compress in it; targets missing, contradictory or out
      of range; fewer bits than the frequency tables of the leaves take; a leaf that is NaN,
      infinite, not floating, or of float64 where JAX has none; a leaf without values (a function, a
      `jax.ShapeDtypeStruct`); an objective that does not match the tree.  The message names the
      path.

  Warns:
    UserWarning: keys of random numbers, which no file can hold; fewer bits than asked; leaves, rows
      and channels that lose all their weights, by name; leaves of zeros, which are left as they
      are; with `sparsity` and `bits`, leaves whose weights are far from the Laplace density
      (`laplace_fit`).

  >>> import jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> leaf = allocate(params, compression_rate=16.0).tree['kernel']
  >>> round(float(leaf.payload), 2), round(float(leaf.sparsity), 1)
  (2.0, 0.5)
  """
  if file_rate is not None:
    _check_measurable(params, file_rate)
    check_file_rate(file_rate, sparsity, bits, compression_rate, bits_per_weight)
    from opq_jax.file.rate import at_file_rate  # its module imports this one

    options: dict[str, Any] = {
      'compressible': compressible,
      'channel_axis': channel_axis,
      'slices': slices,
      'usage': usage,
      'palette_bits': palette_bits,
      'corrected': corrected,
    }
    return at_file_rate(params, file_rate, objective=objective, **options).allocation
  targets = check_targets(
    *(sparsity, bits, compression_rate, bits_per_weight),
    palette_bits=palette_bits,
    corrected=corrected,
  )
  params = jax.tree.map(
    lambda leaf: _Opaque(leaf) if _is_statistics(leaf) else trees.native(leaf),
    params,
    is_leaf=_is_statistics,
  )
  named = {
    name: leaf.statistics if isinstance(leaf, _Opaque) else leaf
    for name, leaf in trees.named_leaves(params).items()
  }
  given = arguments_of(params, usage, compressible, channel_axis, slices)
  chosen = choose_leaves(named, given.compressible)
  axes = {name: axes_of(name, named[name], given.channel_axis, given.slices) for name in chosen}
  power, omegas = energy_power(objective), None
  if not isinstance(objective, str):
    shapes = {name: (tuple(named[name].shape), count) for name, (_, count) in axes.items()}
    omegas = check_omegas(params, objective, shapes)
  elif given.shares is not None:
    omegas = [jnp.float32(given.shares[name]) for name in chosen]
  scales = {}
  if palette_bits is not None:
    scales = _scales_of_palettes(named, axes, palette_bits, objective, omegas)
  leaves = measured(named, axes, omegas, corrected, read, scales)
  parts = parts_of(leaves)
  is_traced = trees.is_traced(([leaf.statistics for leaf in leaves], targets, omegas))
  if corrected and not trees.is_traced([leaf.statistics for leaf in leaves]):
    warn_of_zeros(_names_of_zeros(leaves, parts))
    parts = [part for part in parts if part.statistics.largest != 0]
  ties = {
    name: tie
    for name, tie in tied(candidates(leaves, parts, named, is_traced)).items()
    if not (tie.is_transposed and axes[name].slices)
  }
  solved: dict[str, LeafAllocation] = {}
  if untied := [part for part in parts if leaves[part.leaf].name not in ties]:
    solved = _solved_beside_scales(leaves, untied, targets, power, corrected, is_traced)
  for name, tie in ties.items():
    solved[name] = tied_record(solved[tie.first], tie)
  structure = jax.tree.structure(params)
  return Allocation(jax.tree.unflatten(structure, [solved.get(name) for name in named]))


@dataclasses.dataclass(frozen=True)
class _Opaque:
  """Statistics as one leaf: `LeafStatistics` is a pytree of its own, and would be taken apart."""

  statistics: LeafStatistics


def _is_statistics(node: Any) -> bool:
  return isinstance(node, LeafStatistics)


def _check_measurable(params: PyTree, file_rate: float) -> None:
  """Raises ValueError where no file can be made of the tree."""
  if trees.is_traced((params, file_rate)):
    raise ValueError('file_rate: found traced values, expected concrete ones: it measures files')
  if any(map(_is_statistics, jax.tree.leaves(params, is_leaf=_is_statistics))):
    raise ValueError('file_rate: found statistics, expected the weights: it measures files')


def _scales_of_palettes(
  named: dict[str, Any],
  axes: dict[str, Axes],
  palette_bits: int,
  objective: Objective | PyTree,
  omegas: Sequence[Array] | None,
) -> dict[str, Any]:
  """Returns the scales of outputs that palettes have, by path.

  Those of statistics are chosen already; leaves in a trace, or over a mesh, have none.
  """
  weights = dict(zip(axes, omegas, strict=True)) if omegas is not None else {}
  own = {
    name: axis
    for name, axis in axes.items()
    if not isinstance(named[name], LeafStatistics)
    and not trees.is_traced((named[name], weights.get(name)))
    and placement_of(named[name]) == HERE
    and np.ndim(weights.get(name, 0)) <= axis.slices
  }
  return palette_scales(named, own, palette_bits, objective, weights)


def _names_of_zeros(leaves: Sequence[MeasuredLeaf], parts: Sequence[Part]) -> list[str]:
  """Returns the names of the leaves and slices whose weights are all zero."""
  names = []
  for number, places in by_leaf(parts).items():
    zeros = [part.name for part in parts[places] if part.statistics.largest == 0]
    is_whole = len(zeros) == places.stop - places.start
    names += [leaves[number].name] if is_whole else zeros
  return names


def _solved_beside_scales(
  leaves: list[MeasuredLeaf],
  parts: list[Part],
  targets: Targets,
  power: float | None,
  corrected: bool,
  is_traced: bool,
) -> dict[str, LeafAllocation]:
  """Returns what `_solved` returns, with the bits of output scales part of the bits asked."""
  scaled = [leaves[number] for number in by_leaf(parts)]
  bits = {
    leaf.name: section_bits(leaf.statistics.output_scales, leaf.statistics.slice_shape)
    for leaf in scaled
    if leaf.statistics.output_scales is not None
  }
  if bits and isinstance(targets, BitsPerWeight):
    beside = sum(own.sum() for own in bits.values()) / sum(part.statistics.size for part in parts)
    # where scales alone take more than is asked, the answer is refused as that of too many tables
    left = jnp.maximum(targets.bits_per_weight - beside, jnp.finfo(jnp.float32).tiny)
    targets = dataclasses.replace(targets, bits_per_weight=left)
  solved = _solved(leaves, parts, targets, power, corrected, is_traced)
  for name, own in bits.items():
    record = solved[name]
    each = math.prod(record.shape[record.slices :])
    solved[name] = dataclasses.replace(record, payload=record.payload + own / each)
  return solved


def _solved(
  leaves: list[MeasuredLeaf],
  parts: list[Part],
  targets: Targets,
  power: float | None,
  corrected: bool,
  is_traced: bool,
) -> dict[str, LeafAllocation]:
  """Returns the `LeafAllocation` of every leaf, by path."""
  names, stats = [part.name for part in parts], [part.statistics for part in parts]
  omegas = [part.omega for part in parts if part.omega is not None]
  numbers: list[np.ndarray | None] = [None] * len(parts)
  if corrected and not is_traced:
    numbers = numbers_of_parts(leaves, parts)
  lattices = [
    Lattice() if n is None else lattice_of(s, n) for s, n in zip(stats, numbers, strict=True)
  ]
  layout = layout_of(stats, is_traced)
  joined = join(stats, power, omegas or None, numbers, lattices, layout)
  counted = None
  can_read = all(leaves[part.leaf].read is not None for part in parts)
  if isinstance(targets, SparsityAndBits) and corrected and can_read:
    counted = look_again(leaves, parts, joined, layout, targets)
  # on the host: XLA would take seconds to compile hundreds of slices
  per_part, per_channel = trees.on_host(solve(joined, targets, counted, layout.block))
  per_part = {name: values[: len(parts)] for name, values in per_part.items()}
  per_channel = {name: values[layout.place] for name, values in per_channel.items()}
  is_concrete = not trees.is_traced((per_part, per_channel))
  numpy = np if is_concrete else jnp
  for field, maxima in (
    ('dead_channels', [s.maximum for s in stats]),
    ('dead_rows', [s.leading for s in stats]),
  ):
    per_part[field] = numpy.stack(
      [
        _count_dead(numpy, largest, threshold)
        for largest, threshold in zip(maxima, per_part['threshold'], strict=True)
      ]
    )
  if is_concrete:
    check_answer(names, stats, per_part, per_channel, targets)
    if isinstance(targets, SparsityAndBits) and counted is not None:
      survivors = np.asarray(counted.survivors)[layout.place]
      warn_of_width(stats, per_part, per_channel['bits'], survivors, targets)
  palette_bits = targets.palette_bits if isinstance(targets, BitsPerWeight) else None
  return leaf_allocations(leaves, parts, per_part, per_channel, palette_bits)


def _count_dead(numpy: Any, largest: Array | None, threshold: Array) -> Array:
  """Counts the largest magnitudes that a threshold prunes; zeros do not count."""
  if largest is None:
    return numpy.int32(0)
  return numpy.sum((largest > 0) & (largest <= threshold), dtype=numpy.int32)
