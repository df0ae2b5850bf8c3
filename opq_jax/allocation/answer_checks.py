"""Checks of an allocation's values, and warnings where it differs from the targets."""

from collections.abc import Mapping, Sequence

import numpy as np

from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.allocation.targets import (
  UNBOUNDED,
  BitsPerWeight,
  SparsityAndBits,
  Targets,
  TooFewBitsError,
)
from opq_jax.core import messages

LAPLACE_FIT_BOUNDS = (0.55, 3.0)
"""Bounds of `laplace_fit` (true energy over that of the Laplace density) without a warning.

The ratio is 1 where the density fits, .79 for Gaussian weights, .67 for uniform ones and .5 for
constant magnitudes.
"""

_TOLERANCE = 0.005  # of a target, relative (of sparsity: absolute), before a warning
_MIN_WEIGHTS_A_CHANNEL = 32  # of fewer, mean |w| is no estimate: with one the ratio is always .5

# what makes a leaf a stack of matrices of unlike scales: few of them, of many weights each, some
# with a largest |w| below a quarter of the largest one's and 2.5 thresholds.  Of 16,000 Laplace
# weights, with a largest of 10 tau, those beyond 4 tau are left: a quarter of the energy
_MOST_IN_STACK = 512
_LEAST_IN_MATRIX = 1024
_MOST_TAPS = 11  # along an axis of a convolution's window
_UNLIKE = 1 / 4
_STARVED = 2.5

Fields = Mapping[str, np.ndarray]


def check_answer(
  names: Sequence[str],
  stats: Sequence[LeafStatistics],
  per_leaf: Fields,
  per_channel: Fields,
  targets: Targets,
) -> None:
  """Checks that the weights are finite, the rate is met and the density fits.

  Args:
    names, stats: of the compressed leaves.
    per_leaf, per_channel: fields of all `LeafAllocation`s, joined.
    targets: the problem that was solved.

  Raises:
    ValueError: a weight is NaN or infinite.
    TooFewBitsError: the frequency tables alone take more bits than asked.

  Warns:
    UserWarning: fewer bits than asked; leaves, rows or channels that lose all their weights, and
      indices of a stack's first axis that lose nearly all of them beside larger ones; with
      `SparsityAndBits`, leaves far from the Laplace density.
  """
  _check_finite(names, stats, per_channel['scale'])
  if isinstance(targets, BitsPerWeight):
    _check_bits_per_weight(stats, per_leaf, targets)
  _warn_of_dead(names, stats, per_leaf)
  _warn_of_starved(names, stats, per_leaf)
  if isinstance(targets, SparsityAndBits):
    _warn_of_misfits(names, stats, per_leaf['laplace_fit'])


def _check_finite(names: Sequence[str], stats: Sequence[LeafStatistics], scale: np.ndarray) -> None:
  is_finite = np.isfinite(scale)
  if is_finite.all():
    return
  first = int(np.argmin(is_finite))
  ends = np.cumsum([s.channels for s in stats])
  i = int(np.searchsorted(ends, first, side='right'))
  channel = first - (ends[i - 1] if i else 0)
  raise ValueError(
    f'{names[i]}: found NaN or infinite weights (channel {channel} of axis '
    f'{stats[i].channel_axis}), expected finite ones'
  )


def _check_bits_per_weight(
  stats: Sequence[LeafStatistics], per_leaf: Fields, targets: BitsPerWeight
) -> None:
  asked = float(targets.bits_per_weight)
  sizes = np.array([s.size for s in stats])
  found = float(np.sum(per_leaf['payload'] * sizes) / np.sum(sizes))
  rates = f'{found:.4g} bits per weight, a compression_rate of {32 / max(found, 1e-9):.4g}'
  wanted = f'{asked:.4g}, a rate of {32 / asked:.4g}'
  if found > asked * (1 + _TOLERANCE):
    raise TooFewBitsError(
      f'found at least {rates}: the tables of {len(stats)} leaves take that much without any '
      f'weight; expected {wanted}',
      found,
    )
  if found < asked / (1 + _TOLERANCE) and asked < UNBOUNDED / 2:
    why = 'no allocation lies between'
    if not per_leaf['error'].any():
      why = 'all values are exact'
    elif targets.palette_bits is not None:
      why = f'palettes of {targets.palette_bits} bits take no more, or no allocation lies between'
    messages.warn(f'found {rates}, where {wanted} was asked: {why}, and the file is smaller')


def _warn_of_misfits(
  names: Sequence[str], stats: Sequence[LeafStatistics], fits: np.ndarray
) -> None:
  low, high = LAPLACE_FIT_BOUNDS
  misfits = [
    f'{name} ({fit:.2f})'
    for name, s, fit in zip(names, stats, fits, strict=True)
    if (fit < low or fit > high) and s.size >= _MIN_WEIGHTS_A_CHANNEL * s.channels
  ]
  if misfits:
    messages.warn(
      'the Laplace density, on which the allocation rests, is far from the weights of '
      f'{", ".join(misfits)}: found E[w^2] over its value under the density, expected '
      f'{low} ... {high}'
    )


def warn_of_width(
  stats: Sequence[LeafStatistics],
  per_leaf: Fields,
  bits: np.ndarray,
  survivors: np.ndarray,
  targets: SparsityAndBits,
) -> None:
  """Warns where the weights allow only another sparsity or another width than asked.

  Args:
    stats: of the compressed leaves.
    per_leaf: fields of all `LeafAllocation`s, joined.
    bits: bits of a survivor of every channel at a fixed width.
    survivors: counted survivors of every channel, as a share of all weights.
    targets: the problem that was solved.
  """
  sizes = np.array([s.size for s in stats])
  share = sizes / sizes.sum()
  value_bits = np.array([8 * np.dtype(s.dtype).itemsize for s in stats])
  kept = max(float(survivors.sum()), 1e-30)
  width = float(np.sum(survivors * bits) + np.sum(share * per_leaf['escaped'] * value_bits)) / kept
  sparsity, asked = 1 - float(survivors.sum()), float(targets.sparsity)
  if abs(sparsity - asked) > _TOLERANCE:
    messages.warn(
      f'sparsity: found {sparsity:.4g}, where {asked:.4g} was asked: equal weights are pruned '
      'together'
    )
  asked = float(targets.bits)
  if abs(width - asked) > _TOLERANCE * asked:
    messages.warn(
      f'bits: found {width:.4g}, where {asked:.4g} was asked: the weights need no others, whatever '
      'the step'
    )


def _warn_of_dead(names: Sequence[str], stats: Sequence[LeafStatistics], per_leaf: Fields) -> None:
  """Warns of leaves, rows and channels that lose all their weights."""
  lost = []
  for i, (name, s) in enumerate(zip(names, stats, strict=True)):
    if per_leaf['threshold'][i] >= s.largest:
      lost.append(f'{name} (all of it)')
      continue
    channels, rows = (int(per_leaf[field][i]) for field in ('dead_channels', 'dead_rows'))
    parts = [f'{rows:,} of {s.shape[0]:,} along its first axis'] * (rows > 0)
    parts += [f'{channels:,} of {s.channels:,} output channels'] * (channels > 0)
    if parts:
      lost.append(f'{name} ({" and ".join(parts)})')
  if lost:
    messages.warn(f'all weights are pruned of {messages.listed(lost)}')


def _warn_of_starved(
  names: Sequence[str], stats: Sequence[LeafStatistics], per_leaf: Fields
) -> None:
  """Warns of stacks in which one threshold for all starves the small matrices."""
  starved = []
  for name, s, threshold in zip(names, stats, per_leaf['threshold'], strict=True):
    # taps of a square window add to one output, and may well be small
    is_window = s.ndim > 3 and s.shape[0] == s.shape[1] <= _MOST_TAPS
    is_stack = s.ndim > 2 and s.shape[0] <= _MOST_IN_STACK and not is_window
    if s.leading is None or not is_stack or s.size < _LEAST_IN_MATRIX * s.shape[0]:
      continue
    largest = np.asarray(s.leading)
    is_small = (largest < _UNLIKE * largest.max()) & (largest < _STARVED * threshold)
    # those that lose all have been named
    if count := int(np.count_nonzero(is_small & (largest > threshold))):
      starved.append(f'{name} ({count:,} of {s.shape[0]:,})')
  if starved:
    messages.warn(
      'one threshold for all prunes nearly all weights of the smaller indices of the first axis: '
      f'{messages.listed(starved)}; if the axis counts layers or experts, slices= or '
      'usage= gives each a threshold of its own (opq compress: --slices)'
    )


def warn_of_zeros(names: Sequence[str]) -> None:
  """Warns of leaves whose weights are all zero; they pass through."""
  if names:
    messages.warn(f'{messages.listed(names)}: all weights are zero, and the leaf is left as it is')
