"""How much of every leaf to prune, and how finely to quantize what is left.

`allocate` reads a pretrained parameter tree once and solves one of two problems in closed form:

  * `sparsity` and `bits`, the two targets of the paper (Hu et al., "OPQ: Compressing Deep Neural
    Networks with One-shot Pruning-Quantization", AAAI 2021): first a threshold for every leaf
    that prunes `sparsity` of all weights, then a step for every leaf with which the survivors
    need `bits` bits on average;
  * `bits_per_weight`, one target for both (our derivation): thresholds and steps together, such
    that the entropy-coded weights take so many bits.  `compression_rate` is 32 over it, and
    `file_rate` asks for a whole file that is so many times smaller.

Both are least-cost problems sum_i F_i(d_i) in the relative squared errors d_i of the leaves, with
one Lagrange multiplier for all; see `opq_jax.allocation.rate_search` and
`opq_jax.allocation.optimization`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.joined_statistics import JoinedStatistics, Layout, join, layout_of
from opq_jax.allocation.lattices import Lattice, has_few_magnitudes, lattice_of, numbers_of
from opq_jax.allocation.solver import ranks, solve, thresholds
from opq_jax.allocation.statistics import (
  LeafStatistics,
  fine_histogram,
  leaf_statistics,
  per_channel_count,
)
from opq_jax.core import messages, trees
from opq_jax.core.limits import MAX_LEVELS
from opq_jax.core.trees import PyTree

Objective = Literal['balanced_error', 'retained_signal', 'relative_error', 'squared_error']
TARGETS = 'sparsity', 'bits', 'compression_rate', 'bits_per_weight'  # `file_rate` aside
OBJECTIVES: tuple[str, ...] = get_args(Objective)
# F_i = D_i / S_i * S_i^power
_POWERS = {
  'balanced_error': 0.5, 'retained_signal': None, 'relative_error': 0.0, 'squared_error': 1.0,
}  # fmt: skip
DEFAULT_COMPRESSION_RATE = 10.0
_MOST_NAMED = 10  # leaves that a warning lists
# true energy over that of the Laplace density: 1 if it fits, .79 for Gaussian, .67 for uniform,
# .5 for constant magnitudes; outside of these bounds a leaf is warned about
LAPLACE_FIT_BOUNDS = (0.55, 3.0)


class TooFewBitsError(ValueError):
  """Fewer bits per weight are asked than everything pruned takes: the tables of the leaves.

  Attributes:
    least: bits per weight that it takes.
  """

  def __init__(self, message: str, least: float):
    super().__init__(message)
    self.least = least


@flax.struct.dataclass
class LeafAllocation:
  """What is asked of one leaf of n weights in C output channels; all float32 but `levels`.

  Attributes:
    scale: tau_j, mean |w| of every channel.
    threshold: beta; a weight survives where |w| > beta.
    sparsity: predicted share of the leaf's weights that is pruned.
    step: Delta, the width of a cell; positive.
    offset: where in a cell its value lies; the first value of the grid is threshold + offset.
    levels: cells a sign, 0 (no weight is on the grid) ... 127.
    escaped: predicted share of the leaf's weights that lie beyond the last cell, and are stored as
      they are.
    bits: b_j = 1 + log2(max(1, reach_j / Delta)) of every channel: what a survivor of the channel
      needs at a fixed width, sign included.  Bits per surviving weight.
    error: predicted ||w - w^||^2 / ||w||^2.
    entropy: predicted zeroth-order entropy of the codes and the bits of escaped values, per weight
      of the leaf.
    payload: the same with the frequency table and the checksum that the leaf has in a file, and
      with where its escaped weights are; equal to the entropy of the Laplace density, without
      escaped weights, where only closed forms were asked for.
    dead_channels, dead_rows: output channels, and indices of the first axis where that is another
      (rows of a table, layers of a stack), that have weights and lose all of them.
    laplace_fit: E[w^2] over 2 mean_j tau_j^2, its value under the Laplace density: 1 where the
      density fits, .79 for Gaussian weights, .67 for uniform ones, far above 1 for heavy tails.
      NaN where only closed forms were asked for.
    shape: the leaf's shape.
    channel_axis: the axis of its output channels.

  Predictions are from the leaf's true histogram, or from the Laplace density where only closed
  forms were asked for.
  """

  scale: Float32[Array, 'channels']
  threshold: Float32[Array, '']
  sparsity: Float32[Array, '']
  step: Float32[Array, '']
  offset: Float32[Array, '']
  levels: Int32[Array, '']
  escaped: Float32[Array, '']
  bits: Float32[Array, 'channels']
  error: Float32[Array, '']
  entropy: Float32[Array, '']
  payload: Float32[Array, '']
  laplace_fit: Float32[Array, '']
  dead_channels: Int32[Array, '']
  dead_rows: Int32[Array, '']
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  channel_axis: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Allocation:
  """What is asked of a whole tree.

  Attributes:
    tree: the parameters' own tree, with a `LeafAllocation` where a leaf is compressed and None
      where it passes through.
  """

  tree: PyTree


def is_compressible(path: str, leaf: Any) -> bool:
  """The default choice of what is compressed: floating leaves of two or more dimensions.

  Of dtypes of a byte or more, with a mantissa: no scales of float8_e8m0fnu, no float4.

  >>> is_compressible('params/kernel', jnp.zeros((3, 2))), is_compressible('bias', jnp.zeros(2))
  (True, False)
  """
  del path
  # numpy asks the leaf itself, which may be statistics, or weights that are still on disk
  if np.ndim(leaf) < 2 or not _is_floating(leaf):
    return False
  about = jnp.finfo(leaf.dtype)
  return bool(about.bits >= 8 and about.nmant >= 2)


def allocate(
  params: PyTree,
  *,
  sparsity: float | Array | None = None,
  bits: float | Array | None = None,
  compression_rate: float | Array | None = None,
  bits_per_weight: float | Array | None = None,
  file_rate: float | None = None,
  objective: Objective | PyTree = 'balanced_error',
  compressible: Callable[[str, Any], bool] = is_compressible,
  channel_axis: int | Callable[[str, Any], int] = -1,
  corrected: bool = True,
  read: Callable[[str], Array | np.ndarray] | None = None,
) -> Allocation:
  """How much of every leaf to prune, and the one grid that all its channels share.

  With E_i the pruning error, D_i the total squared error, R_i the entropy of the codes and b_ij
  the bits that channel j of leaf i needs at a fixed width (`opq_jax.allocation.laplace`):

    sparsity, bits:    minimise sum_i F_i(E_i)  subject to  sum_i n_i p_i = sparsity * n,  then
                       minimise sum_i F_i(D_i)  subject to  sum_ij m_ij b_ij = bits * sum_ij m_ij
    bits_per_weight:   minimise sum_i F_i(D_i)  subject to  sum_i n_i R_i = bits_per_weight * n

  Weights beyond the last of a leaf's cells are stored as they are, and R_i counts that, so where
  the grid ends is solved too.  Every rate is met between everything pruned and all values exact, or
  the answer takes fewer bits, and a warning says how many.

  Args:
    params: any pytree of arrays: params, or whole Flax variables.  Leaves over a mesh
      (`NamedSharding`) are never gathered.  Their histograms and maxima are those of one device,
      their scales sums in another order (`opq_jax.allocation.leaf_statistics`), and so every field
      of the answer is the same up to 1e-3, since the search for a rate ends within 1e-4 of it.
      With `bits` it is so up to 5e-3: the least cost, which is the same up to 5e-4, is flat.  In
      the place of a leaf may be its `LeafStatistics`, computed before or elsewhere:
      allocate(params) is allocate(jax.tree.map(opq_jax.allocation.leaf_statistics, params)).
    sparsity: share of all compressed weights to prune, in [0, 1).  Together with `bits`.
    bits: mean bits of a surviving weight at a fixed width, its sign included; 1 ... 7.98.  A weight
      beyond 127 cells counts the bits of its value too.
    compression_rate: 32 over `bits_per_weight`, whatever the dtype of a leaf.  Without any target
      it is 10.
    bits_per_weight: bits of the codes per weight of the compressed leaves, at their zeroth-order
      entropy, with frequency tables and escaped weights; contexts (`opq_jax.coding.contexts`) make
      the file smaller still.
    file_rate: how many times smaller than the tree, as it came, the whole file is to be: biases,
      tables and headers counted, contexts used (`opq_jax.file.rate.at_file_rate`).  Not in a trace.
    objective: with S_i the energy of leaf i under the Laplace density,
      * 'balanced_error': F_i = D_i / sqrt(S_i).  What an error of a leaf costs the network lies
        between as much as the same error of any other leaf (omega_i = 1, where outputs are summed,
        as in residual streams) and as much as its share of the leaf (omega_i = 1 / S_i, where a
        normalisation follows).  Wherever the truth lies between the two, the price of one leaf
        against another is wrong by no more than the root of the ratio of their energies (our
        derivation; `experiments/benchmarks/objectives.py` compares all four);
      * 'retained_signal': F_i = -log(1 - D_i / S_i), the log of the squared correlation of a leaf
        with its original: correlations multiply along a chain of layers (our derivation);
      * 'relative_error': F_i = D_i / S_i;
      * 'squared_error': F_i = D_i, a common threshold, the plain reading of the paper;
      * a pytree like `params` with a positive number omega_i at every compressed leaf:
        F_i = omega_i D_i.
    compressible: (path, leaf) -> whether a leaf is compressed, with paths like
      'params/Conv_0/kernel'; by default every floating leaf of two or more dimensions.
      Leaves without elements always pass through.
    channel_axis: axis of the output channels, or (path, leaf) -> axis.  A vector is one channel.
    corrected: whether to read one true histogram a leaf.  Then bits per weight are the codes'
      own, thresholds prune exactly the share that each leaf is given, `bits` counts the true
      survivors, a leaf of few magnitudes may be held exactly (`opq_jax.allocation.lattices`), and
      a leaf of zeros passes through.  Without, the answer is that of the Laplace density, in a
      fraction of the time (`experiments/benchmarks/speed.py`), and has at most 8 bits per weight.
    read: path -> the weights of a leaf of which `params` holds statistics.  `sparsity` and `bits`
      look at the weights twice more, for the exact thresholds and for the survivors of every
      channel.  Without it thresholds are interpolated in the histograms, off by the weights in a
      bin, and survivors are shared out among the channels by the Laplace density.

  Returns:
    An `Allocation`.  The call is pure and may be traced (`jit`, `vmap` over targets,
    `eval_shape`); checks of values are only made where the values are concrete.

  Raises:
    ValueError: an empty tree, or nothing to compress in it; targets missing, contradictory or out
      of range; fewer bits than the tables of the leaves alone take; a leaf that is NaN, infinite or
      not floating; an objective that does not match the tree.  The message names the path.

  Warns:
    UserWarning: fewer bits than asked; leaves, rows and channels that lose all their weights, by
      name; leaves of zeros, which are left as they are; with `sparsity` and `bits`, leaves whose
      weights are far from the Laplace density (`laplace_fit`).

  >>> import jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> leaf = allocate(params, compression_rate=16.0).tree['kernel']
  >>> round(float(leaf.payload), 2), round(float(leaf.sparsity), 1)
  (2.0, 0.5)
  """
  if file_rate is not None:
    _check_measurable(params, file_rate)
    check_file_rate(file_rate, sparsity, bits, compression_rate, bits_per_weight)
    from opq_jax.file.rate import at_file_rate  # which calls this function

    options: dict[str, Any] = {
      'compressible': compressible,
      'channel_axis': channel_axis,
      'corrected': corrected,
    }
    return at_file_rate(params, file_rate, objective=objective, **options).allocation
  targets = check_targets(sparsity, bits, compression_rate, bits_per_weight, corrected=corrected)
  is_statistics = lambda node: isinstance(node, LeafStatistics)
  # statistics are trees themselves: wrapped, each is the leaf that it stands for
  params = jax.tree.map(
    lambda leaf: _Leaf(leaf) if is_statistics(leaf) else trees.native(leaf),
    params,
    is_leaf=is_statistics,
  )
  named = {
    name: leaf.statistics if isinstance(leaf, _Leaf) else leaf
    for name, leaf in trees.named_leaves(params).items()
  }
  chosen = choose(named, compressible)
  omegas = None if isinstance(objective, str) else _check_omegas(params, objective, chosen)
  if isinstance(objective, str) and objective not in OBJECTIVES:
    raise ValueError(f'objective: found {objective!r}, expected one of {OBJECTIVES} or a pytree')
  stats: list[LeafStatistics] = []
  looks: list[Callable[[], Array | np.ndarray] | None] = []
  for name in chosen:
    leaf = named[name]
    if isinstance(leaf, LeafStatistics):
      stats.append(_given_statistics(name, leaf, corrected))
      looks.append(read and functools.partial(read, name))
      continue
    axis = axis_of(name, leaf, channel_axis)
    stats.append(leaf_statistics(leaf, axis, histogram=corrected))
    looks.append(functools.partial(_itself, leaf))
  stats = trees.on_host(stats)
  is_traced = trees.is_traced((stats, targets, omegas))
  structure = jax.tree.structure(params)
  if corrected and not trees.is_traced(stats):
    kept = [i for i, s in enumerate(stats) if s.largest != 0]
    _warn_of_zeros([name for name, s in zip(chosen, stats, strict=True) if s.largest == 0])
    chosen, stats = [chosen[i] for i in kept], [stats[i] for i in kept]
    looks = [looks[i] for i in kept]
    omegas = omegas and [omegas[i] for i in kept]
    if not chosen:
      return Allocation(jax.tree.unflatten(structure, [None] * len(named)))
  numbers: list[np.ndarray | None] = [None] * len(stats)
  if corrected and not is_traced:
    numbers = [
      numbers_of(s, look and look()) if has_few_magnitudes(s) else None
      for s, look in zip(stats, looks, strict=True)
    ]
  lattices = [
    Lattice() if n is None else lattice_of(s, n) for s, n in zip(stats, numbers, strict=True)
  ]
  layout = layout_of(stats, is_traced)
  power = _POWERS[objective] if isinstance(objective, str) else 1.0
  tree = join(stats, power, omegas, numbers, lattices, layout)
  seen, again = None, [look for look in looks if look is not None]
  if 'bits' in targets and corrected and len(again) == len(stats):
    seen = _second_look(stats, tree, layout, again, targets)
  # on the host: XLA would take seconds to compile hundreds of slices
  per_leaf, per_channel = trees.on_host(solve(tree, targets, seen, layout.block))
  per_leaf = {name: values[: len(stats)] for name, values in per_leaf.items()}
  per_channel = {name: values[layout.place] for name, values in per_channel.items()}
  numpy = jnp if trees.is_traced((per_leaf, per_channel)) else np
  per_leaf['dead_channels'], per_leaf['dead_rows'] = (
    numpy.stack(
      [
        _dead(numpy, largest, threshold)
        for largest, threshold in zip(maxima, per_leaf['threshold'], strict=True)
      ]
    )
    for maxima in ([s.maximum for s in stats], [s.leading for s in stats])
  )
  if numpy is np:
    _check_values(chosen, stats, per_leaf, per_channel, targets)
    if 'bits' in targets and seen is not None:
      survivors = np.asarray(seen[1])[layout.place]
      _check_width(stats, per_leaf, per_channel['bits'], survivors, targets)
  ends = np.cumsum([s.channels for s in stats])
  solved = {}
  for i, (name, s) in enumerate(zip(chosen, stats, strict=True)):
    at = slice(ends[i] - s.channels, ends[i])
    solved[name] = LeafAllocation(
      **{field: values[i] for field, values in per_leaf.items()},
      **{field: values[at] for field, values in per_channel.items()},
      shape=s.shape,
      channel_axis=s.channel_axis,
    )
  return Allocation(jax.tree.unflatten(structure, [solved.get(name) for name in named]))


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """Statistics as a leaf of a tree."""

  statistics: LeafStatistics


def _itself(leaf: Array) -> Array:
  return leaf


def axis_of(name: str, leaf: Any, channel_axis: int | Callable[[str, Any], int]) -> int:
  """The axis of a leaf's output channels, made sure to be one.

  Raises:
    ValueError: the leaf has no such axis.
  """
  axis = channel_axis(name, leaf) if callable(channel_axis) else channel_axis
  if not -leaf.ndim <= axis < leaf.ndim:
    raise ValueError(f'{name}: found channel_axis {axis}, expected an axis of shape {leaf.shape}')
  return axis


def _dead(numpy: Any, largest: Array | None, threshold: Array) -> Array:
  """How many of these largest |w| a threshold prunes, zeros not counted."""
  if largest is None:
    return numpy.int32(0)
  return numpy.sum((largest > 0) & (largest <= threshold), dtype=numpy.int32)


def _given_statistics(name: str, stats: LeafStatistics, corrected: bool) -> LeafStatistics:
  if not corrected:
    return dataclasses.replace(stats, histogram=None)
  if stats.histogram is None:
    raise ValueError(
      f'{name}: found statistics without a histogram, expected one (or corrected=False)'
    )
  return stats


def _second_look(
  stats: list[LeafStatistics],
  tree: JoinedStatistics,
  layout: Layout,
  looks: list[Callable[[], Array | np.ndarray]],
  targets: dict[str, Array],
) -> tuple[Float32[Array, 'leaves'], Float[Array, 'channels']]:
  """The thresholds that prune just what each leaf is given, and the share of all that survives."""
  rank, coarse, left = trees.on_host(ranks(tree, targets['sparsity'], layout.block))
  fine = [
    fine_histogram(look(), s.largest, number)
    for look, s, number in zip(looks, stats, coarse[: len(stats)], strict=True)
  ]
  fine = layout.leaves(trees.on_host(fine), jnp.int32)
  threshold = trees.on_host(thresholds(fine, tree.ends, coarse, left, rank))
  counts = [
    per_channel_count(look(), t, s.channel_axis)
    for look, s, t in zip(looks, stats, threshold[: len(stats)], strict=True)
  ]
  total = sum(s.size for s in stats)
  return threshold, layout.channels(trees.on_host(counts), tree.scale.dtype) / total


def _is_floating(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)


def choose(named: dict[str, Any], compressible: Callable[[str, Any], bool]) -> list[str]:
  """The paths of the leaves to compress.

  Raises:
    ValueError: there are none, or one is not floating.
  """
  if not named:
    raise ValueError('params: found an empty tree, expected at least one array')
  chosen = []
  for name, leaf in named.items():
    if not compressible(name, leaf) or np.size(leaf) == 0:
      continue
    if not _is_floating(leaf):
      kind = getattr(leaf, 'dtype', type(leaf).__name__)
      raise ValueError(f'{name}: found {kind}, expected a floating dtype to compress')
    if np.ndim(leaf) == 0:
      raise ValueError(f'{name}: found a scalar, expected at least one dimension to compress')
    chosen.append(name)
  if not chosen:
    raise ValueError(
      f'params: found no leaf to compress among {list(named)[:10]}, '
      'expected at least one floating leaf of two or more dimensions'
    )
  return chosen


def check_targets(
  sparsity: float | Array | None = None,
  bits: float | Array | None = None,
  compression_rate: float | Array | None = None,
  bits_per_weight: float | Array | None = None,
  *,
  corrected: bool = True,
) -> dict[str, Array]:
  """The targets that were asked for, `sparsity` and `bits` or `bits_per_weight`, as float32.

  Raises:
    ValueError: targets are missing, contradictory or out of range.
  """
  given = {'compression_rate': compression_rate, 'bits_per_weight': bits_per_weight}
  rates = [name for name, value in given.items() if value is not None]
  if len(rates) > 1:
    raise ValueError(f'found {" and ".join(rates)}, expected one of them')
  if rates and (sparsity is not None or bits is not None):
    raise ValueError(
      f'found {rates[0]} together with sparsity or bits, expected either the one or the others'
    )
  if (sparsity is None) != (bits is None):
    found = 'sparsity' if bits is None else 'bits'
    raise ValueError(f'found {found} alone, expected sparsity and bits together')
  if sparsity is None and not rates:
    compression_rate = DEFAULT_COMPRESSION_RATE
  # a code has at most 8 bits; beyond are escaped weights, of which closed forms do not know
  least = 0.5 if corrected else 4.0
  bounds = {
    'sparsity': (0.0, 1.0, '0 <= sparsity < 1'),
    'bits': (1.0, 1 + math.log2(MAX_LEVELS), '1 <= bits < 7.98, what 127 levels a sign can hold'),
    'compression_rate': (least, math.inf, f'compression_rate >= {least:g}'),
    'bits_per_weight': (0.0, 32 / least + 1e-6, f'0 < bits_per_weight <= {32 / least:g}'),
  }
  targets = {
    'sparsity': sparsity,
    'bits': bits,
    'compression_rate': compression_rate,
    'bits_per_weight': bits_per_weight,
  }
  checked = {}
  for name, value in targets.items():
    if value is None:
      continue
    low, high, expected = bounds[name]
    if not isinstance(value, jax.core.Tracer):
      if np.ndim(value) != 0:
        raise ValueError(f'{name}: found shape {np.shape(value)}, expected a number (use jax.vmap)')
      if not low <= float(value) < high or (name == 'bits_per_weight' and float(value) == 0):
        raise ValueError(f'{name}: found {float(value)}, expected {expected}')
    checked[name] = jnp.asarray(value, jnp.float32)
  if 'compression_rate' in checked:
    checked['bits_per_weight'] = 32 / checked.pop('compression_rate')
  return checked


def check_file_rate(file_rate: float, *others: Any) -> None:
  """Raises ValueError where `file_rate` is no positive number, or another target is given too."""
  if any(other is not None for other in others):
    raise ValueError('found file_rate together with another target, expected it alone')
  if not 0 < float(file_rate) < math.inf:
    raise ValueError(f'file_rate: found {file_rate}, expected a positive number')


def _check_measurable(params: PyTree, file_rate: float) -> None:
  """Raises ValueError where no file can be made of the tree."""
  if trees.is_traced((params, file_rate)):
    raise ValueError('file_rate: found traced values, expected concrete ones: it measures files')
  if any(
    isinstance(leaf, LeafStatistics)
    for leaf in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, LeafStatistics))
  ):
    raise ValueError('file_rate: found statistics, expected the weights: it measures files')


def _check_omegas(params: PyTree, objective: PyTree, chosen: list[str]) -> list[Array]:
  """The weights omega_i of the compressed leaves, from a pytree like `params`."""
  try:
    found = trees.beside(params, objective)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'objective: found {jax.tree.structure(objective)}, expected the tree of the parameters '
      f'with a number at every compressed leaf, or one of {OBJECTIVES}'
    ) from error
  by_name = dict(zip(trees.named_leaves(params), found, strict=True))
  for name in chosen:
    omega = by_name[name]
    if omega is None or jnp.ndim(omega) != 0:
      shape = None if omega is None else jnp.shape(omega)
      raise ValueError(f'{name}: found an objective of shape {shape}, expected one number')
    if not isinstance(omega, jax.core.Tracer) and not 0 < float(omega) < math.inf:
      raise ValueError(f'{name}: found an objective of {float(omega)}, expected a positive number')
  return [jnp.asarray(by_name[name], jnp.float32) for name in chosen]


def _check_values(
  names: list[str],
  stats: list[LeafStatistics],
  per_leaf: dict[str, np.ndarray],
  per_channel: dict[str, np.ndarray],
  targets: dict[str, Array],
) -> None:
  """Checks of what came out: finite weights, a rate that is met, a density that fits."""
  ends = np.cumsum([s.channels for s in stats])
  is_finite = np.isfinite(per_channel['scale'])
  if not is_finite.all():
    first = int(np.argmin(is_finite))
    i = int(np.searchsorted(ends, first, side='right'))
    channel = first - (ends[i - 1] if i else 0)
    raise ValueError(
      f'{names[i]}: found NaN or infinite weights (channel {channel} of axis '
      f'{stats[i].channel_axis}), '
      'expected finite ones'
    )
  if 'bits_per_weight' in targets:
    sizes = np.array([s.size for s in stats])
    asked = float(targets['bits_per_weight'])
    found = float(np.sum(per_leaf['payload'] * sizes) / np.sum(sizes))
    rates = f'{found:.4g} bits per weight, a compression_rate of {32 / max(found, 1e-9):.4g}'
    wanted = f'{asked:.4g}, a rate of {32 / asked:.4g}'
    if found > asked * 1.005:
      raise TooFewBitsError(
        f'found at least {rates}: so much take the tables of {len(stats)} leaves without any '
        f'weight; expected {wanted}',
        found,
      )
    if found < asked / 1.005:
      is_exact = not per_leaf['error'].any()
      why = 'all values are exact' if is_exact else 'the leaves have nothing between'
      messages.warn(f'found {rates}, where {wanted} was asked: {why}, and the file is smaller')
  _warn_of_dead(names, stats, per_leaf)
  if 'bits' not in targets:
    return
  low, high = LAPLACE_FIT_BOUNDS
  misfits = [
    f'{name} ({fit:.2f})'
    for name, s, fit in zip(names, stats, per_leaf['laplace_fit'], strict=True)
    # a scale of few weights is no estimate: with one the ratio is .5, whatever the density
    if (fit < low or fit > high) and s.size >= 32 * s.channels
  ]
  if misfits:
    messages.warn(
      'the Laplace density, on which the allocation rests, is far from the weights of '
      f'{", ".join(misfits)}: found E[w^2] over its value under the density, expected '
      f'{low} ... {high}'
    )


def _check_width(
  stats: list[LeafStatistics],
  per_leaf: dict[str, np.ndarray],
  bits: np.ndarray,
  survivors: np.ndarray,
  targets: dict[str, Array],
) -> None:
  """Says where the weights allow another sparsity or other widths than were asked."""
  sizes = np.array([s.size for s in stats])
  share = sizes / sizes.sum()
  value_bits = np.array([8 * np.dtype(s.dtype).itemsize for s in stats])
  kept = max(float(survivors.sum()), 1e-30)
  width = float(np.sum(survivors * bits) + np.sum(share * per_leaf['escaped'] * value_bits)) / kept
  found = {'sparsity': 1 - float(survivors.sum()), 'bits': width}
  for name, value in found.items():
    asked = float(targets[name])
    if abs(value - asked) > 0.005 * (1 if name == 'sparsity' else asked):
      why = (
        'equal weights are pruned together'
        if name == 'sparsity'
        else 'the weights need no others, whatever the step'
      )
      messages.warn(f'{name}: found {value:.4g}, where {asked:.4g} was asked: {why}')


def _warn_of_dead(
  names: list[str], stats: list[LeafStatistics], per_leaf: dict[str, np.ndarray]
) -> None:
  """Says which leaves, rows and channels lose all their weights."""
  lost = []
  for i, (name, s) in enumerate(zip(names, stats, strict=True)):
    if per_leaf['threshold'][i] >= s.largest:
      lost.append(f'{name} (the whole leaf)')
      continue
    channels, rows = (int(per_leaf[field][i]) for field in ('dead_channels', 'dead_rows'))
    parts = [f'{rows:,} of {s.shape[0]:,} along its first axis'] * (rows > 0)
    parts += [f'{channels:,} of {s.channels:,} output channels'] * (channels > 0)
    if parts:
      lost.append(f'{name} ({" and ".join(parts)})')
  if lost:
    more = f', and {len(lost) - _MOST_NAMED} more leaves' if len(lost) > _MOST_NAMED else ''
    messages.warn(f'all weights are pruned of {", ".join(lost[:_MOST_NAMED])}{more}')


def _warn_of_zeros(names: list[str]) -> None:
  if names:
    more = f' and {len(names) - _MOST_NAMED} more' if len(names) > _MOST_NAMED else ''
    messages.warn(
      f'{", ".join(names[:_MOST_NAMED])}{more}: all weights are zero, and the leaf is left as it is'
    )
