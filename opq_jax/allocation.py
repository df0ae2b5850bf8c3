"""How much of every leaf to prune, and how finely to quantize what is left.

`allocate` reads a pretrained parameter tree once and solves one of two problems in closed form:

  * `sparsity` and `bits`, the two targets of the paper (Hu et al., "OPQ: Compressing Deep Neural
    Networks with One-shot Pruning-Quantization", AAAI 2021): first a threshold for every leaf
    that prunes `sparsity` of all weights, then a step for every leaf with which the survivors
    need `bits` bits on average;
  * `compression_rate`, one target for both (our derivation): thresholds and steps together, such
    that the entropy-coded weights are `compression_rate` times smaller than as float32.

Both are least-cost problems sum_i F_i(d_i) in the relative squared errors d_i of the leaves, with
one Lagrange multiplier for all; see `opq_jax.optimization`.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from opq_jax import trees
from opq_jax.allocation_solver import MAX_LEVELS, ranks, solve, thresholds
from opq_jax.joined_statistics import JoinedStatistics, Layout, join, layout_of
from opq_jax.statistics import (
  LeafStatistics,
  fine_histogram,
  leaf_statistics,
  per_channel_count,
)
from opq_jax.trees import PyTree

Objective = Literal['balanced_error', 'retained_signal', 'relative_error', 'squared_error']
OBJECTIVES: tuple[str, ...] = get_args(Objective)
# F_i = D_i / S_i * S_i^power
_POWERS = {
  'balanced_error': 0.5, 'retained_signal': None, 'relative_error': 0.0, 'squared_error': 1.0,
}  # fmt: skip
DEFAULT_COMPRESSION_RATE = 10.0
# true energy over that of the Laplace density: 1 if it fits, .79 for Gaussian, .67 for uniform,
# .5 for constant magnitudes; outside of these bounds a leaf is warned about
LAPLACE_FIT_BOUNDS = (0.55, 3.0)


@flax.struct.dataclass
class LeafAllocation:
  """What is asked of one leaf of n weights in C output channels; all float32 but `levels`.

  Attributes:
    scale: tau_j, mean |w| of every channel.
    threshold: beta; a weight survives where |w| > beta.
    sparsity: predicted share of the leaf's weights that is pruned.
    step: Delta, the width of a cell; positive.
    offset: where in a cell its value lies; the first value of the grid is threshold + offset.
    levels: cells a sign, 0 (everything is pruned) ... 127.
    bits: b_j = 1 + log2(max(1, reach_j / Delta)) of every channel: what a survivor of the channel
      needs at a fixed width, sign included.  Bits per surviving weight.
    error: predicted ||w - w^||^2 / ||w||^2.
    entropy: predicted zeroth-order entropy of the codes, bits per weight of the leaf.
    payload: the same with the frequency table and the checksum that the leaf has in a file; equal
      to `entropy` where only closed forms were asked for.
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
  bits: Float32[Array, 'channels']
  error: Float32[Array, '']
  entropy: Float32[Array, '']
  payload: Float32[Array, '']
  laplace_fit: Float32[Array, '']
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

  >>> is_compressible('params/kernel', jnp.zeros((3, 2))), is_compressible('bias', jnp.zeros(2))
  (True, False)
  """
  del path
  # numpy asks the leaf itself, which may be statistics, or weights that are still on disk
  return np.ndim(leaf) >= 2 and _is_floating(leaf)


def allocate(
  params: PyTree,
  *,
  sparsity: float | Array | None = None,
  bits: float | Array | None = None,
  compression_rate: float | Array | None = None,
  objective: Objective | PyTree = 'balanced_error',
  compressible: Callable[[str, Any], bool] = is_compressible,
  channel_axis: int | Callable[[str, Any], int] = -1,
  corrected: bool = True,
  read: Callable[[str], Array | np.ndarray] | None = None,
) -> Allocation:
  """How much of every leaf to prune, and the one grid that all its channels share.

  With E_i the pruning error, D_i the total squared error, R_i the entropy of the codes and b_ij
  the bits that channel j of leaf i needs at a fixed width (`opq_jax.laplace`):

    sparsity, bits:    minimise sum_i F_i(E_i)  subject to  sum_i n_i p_i = sparsity * n,  then
                       minimise sum_i F_i(D_i)  subject to  sum_ij m_ij b_ij = bits * sum_ij m_ij
    compression_rate:  minimise sum_i F_i(D_i)  subject to  sum_i n_i R_i = 32 n / compression_rate

  All rates are against float32, whatever the dtype of a leaf.

  Args:
    params: any pytree of arrays: params, or whole Flax variables.  Leaves over a mesh
      (`NamedSharding`) are never gathered.  Their histograms and maxima are those of one device,
      their scales sums in another order (`opq_jax.leaf_statistics`), and so every field of the
      answer is the same up to 1e-3, since the search for a rate ends within 1e-4 of it.  With
      `bits` it is so up to 5e-3: the least cost, which is the same up to 5e-4, is flat.  In the
      place of a leaf may be its `LeafStatistics`, computed before or elsewhere: allocate(params)
      is allocate(jax.tree.map(opq_jax.leaf_statistics, params)).
    sparsity: share of all compressed weights to prune, in [0, 1).  Together with `bits`.
    bits: mean bits of a surviving weight at a fixed width, its sign included; 1 ... 7.98.
    compression_rate: 32 bits over the bits of the codes per weight at their zeroth-order entropy,
      frequency tables included: how many times smaller the compressed leaves are in a file than as
      float32, before contexts (`opq_jax.context_coding`) make them smaller still.  Without any
      target it is 10.
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
    corrected: whether to correct the closed form against one true histogram a leaf.  Then the
      bits of `compression_rate` are the codes' own, thresholds prune exactly the
      share that each leaf is given, `bits` counts the true survivors, and a leaf with a few
      outliers clips them rather than waste its 127 levels on reaching them.  Without, the answer
      is that of the Laplace density, in a fraction of the time (`experiments/benchmarks/speed.py`).
    read: path -> the weights of a leaf of which `params` holds statistics.  `sparsity` and `bits`
      look at the weights twice more, for the exact thresholds and for the survivors of every
      channel.  Without it thresholds are interpolated in the histograms, off by the weights in a
      bin, and survivors are shared out among the channels by the Laplace density.

  Returns:
    An `Allocation`.  The call is pure and may be traced (`jit`, `vmap` over targets,
    `eval_shape`); checks of values are only made where the values are concrete.

  Raises:
    ValueError: an empty tree, or nothing to compress in it; targets missing, contradictory, out of
      range or beyond what 127 levels a sign can hold; a leaf that is NaN, infinite or not
      floating; an objective that does not match the tree.  The message names the path.

  Warns:
    UserWarning: leaves whose weights are far from the Laplace density (`laplace_fit`).

  >>> import jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> leaf = allocate(params, compression_rate=16.0).tree['kernel']
  >>> round(float(leaf.payload), 2), round(float(leaf.sparsity), 1)
  (2.0, 0.5)
  """
  targets = check_targets(sparsity, bits, compression_rate)
  is_statistics = lambda node: isinstance(node, LeafStatistics)
  # statistics are trees themselves: wrapped, each is the leaf that it stands for
  params = jax.tree.map(
    lambda leaf: _Leaf(leaf) if is_statistics(leaf) else leaf, params, is_leaf=is_statistics
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
  layout = layout_of(stats, trees.is_traced((stats, targets, omegas)))
  power = _POWERS[objective] if omegas is None else 1.0
  tree = join(stats, power, omegas, layout)
  seen, again = None, [look for look in looks if look is not None]
  if 'bits' in targets and corrected and len(again) == len(stats):
    seen = _second_look(stats, tree, layout, again, targets)
  # on the host: XLA would take seconds to compile hundreds of slices
  per_leaf, per_channel = trees.on_host(solve(tree, targets, seen, layout.block))
  per_leaf = {name: values[: len(stats)] for name, values in per_leaf.items()}
  per_channel = {name: values[layout.place] for name, values in per_channel.items()}
  if not trees.is_traced((per_leaf, per_channel)):
    _check_values(chosen, stats, per_leaf, per_channel, targets)
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
  structure = jax.tree.structure(params)
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
  sparsity: float | Array | None, bits: float | Array | None, compression_rate: float | Array | None
) -> dict[str, Array]:
  """The targets that were asked for, as float32 arrays.

  Raises:
    ValueError: targets are missing, contradictory or out of range.
  """
  if compression_rate is not None and (sparsity is not None or bits is not None):
    raise ValueError(
      'found compression_rate together with sparsity or bits, expected either the one or the others'
    )
  if (sparsity is None) != (bits is None):
    found = 'sparsity' if bits is None else 'bits'
    raise ValueError(f'found {found} alone, expected sparsity and bits together')
  if sparsity is None and compression_rate is None:
    compression_rate = DEFAULT_COMPRESSION_RATE
  bounds = {
    'sparsity': (0.0, 1.0, '0 <= sparsity < 1'),
    'bits': (1.0, 1 + math.log2(MAX_LEVELS), '1 <= bits < 7.98, what 127 levels a sign can hold'),
    'compression_rate': (4.0, math.inf, 'compression_rate >= 4: a code has at most 8 bits'),
  }
  targets = {'sparsity': sparsity, 'bits': bits, 'compression_rate': compression_rate}
  checked = {}
  for name, value in targets.items():
    if value is None:
      continue
    low, high, expected = bounds[name]
    if not isinstance(value, jax.core.Tracer):
      if np.ndim(value) != 0:
        raise ValueError(f'{name}: found shape {np.shape(value)}, expected a number (use jax.vmap)')
      if not low <= float(value) < high:
        raise ValueError(f'{name}: found {float(value)}, expected {expected}')
    checked[name] = jnp.asarray(value, jnp.float32)
  return checked


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
  if 'compression_rate' in targets:
    sizes = np.array([s.size for s in stats])
    asked = 32 / float(targets['compression_rate'])
    found = float(np.sum(per_leaf['payload'] * sizes) / np.sum(sizes))
    if abs(found / asked - 1) > 0.005:
      side = 'most' if found < asked else 'least'
      raise ValueError(
        f'compression_rate: found at {side} {found:.4g} bits per weight with {MAX_LEVELS} levels a '
        f'sign, a rate of {32 / max(found, 1e-9):.4g}; expected {asked:.4g}, a rate of '
        f'{32 / asked:.4g}'
      )
  low, high = LAPLACE_FIT_BOUNDS
  misfits = [
    f'{name} ({fit:.2f})'
    for name, s, fit in zip(names, stats, per_leaf['laplace_fit'], strict=True)
    # a scale of few weights is no estimate: with one the ratio is .5, whatever the density
    if (fit < low or fit > high) and s.size >= 32 * s.channels
  ]
  if misfits:
    warnings.warn(
      'the Laplace density, on which the allocation rests, is far from the weights of '
      f'{", ".join(misfits)}: found E[w^2] over its value under the density, expected '
      f'{low} ... {high}',
      UserWarning,
      stacklevel=3,
    )
