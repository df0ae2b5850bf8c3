"""A long text in windows that a language model can read, and means over them with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer


class Window(NamedTuple):
  """A part of a text.

  Attributes:
    begin, end: places of its first token, and after its last.
    counted: place of the first token whose prediction counts; those before it are context.
  """

  begin: int
  end: int
  counted: int


class Mean(NamedTuple):
  """A mean and its 95 % confidence interval.

  Attributes:
    value: the mean.
    low, high: the interval; infinite where there is one window only.
  """

  value: float
  low: float
  high: float


def windows(length: int, window: int, stride: int) -> list[Window]:
  """Returns windows over a text, which count every token once that has a token before it.

  A window begins every `stride` tokens.  Tokens that an earlier window has counted are context.
  With a stride as long as a window, the first token of every window has no context and is left out.

  Args:
    length: tokens of the text.
    window: tokens of a window, 2 or more.
    stride: tokens from the begin of a window to that of the next, 1 to `window`.

  Raises:
    ValueError: a window or a stride is too short or too long, or the text has fewer than 2 tokens.

  >>> windows(10, 4, 4)
  [Window(begin=0, end=4, counted=1), Window(begin=4, end=8, counted=5), \
Window(begin=8, end=10, counted=9)]
  >>> windows(9, 6, 3)
  [Window(begin=0, end=6, counted=1), Window(begin=3, end=9, counted=6)]
  """
  if window < 2:
    raise ValueError(f'window: found {window}, expected 2 tokens or more')
  if not 1 <= stride <= window:
    raise ValueError(f'stride: found {stride}, expected 1 to {window}, the tokens of a window')
  if length < 2:
    raise ValueError(f'found a text of {length} tokens, expected 2 or more')
  found, done = [], 1
  for begin in range(0, length - 1, stride):
    end = min(begin + window, length)
    if end > done:
      counted = max(done, begin + 1)
      if counted < end:
        found.append(Window(begin, end, counted))
      done = end
  return found


def mean_over_windows(
  sums: Float[np.ndarray, ' windows'] | Sequence[float],
  counts: Integer[np.ndarray, ' windows'] | Sequence[int],
) -> Mean:
  """Returns the mean over all tokens, and an interval from the spread of the windows.

  Neighbouring tokens are not independent, windows are nearly so: the mean m is the ratio of two
  sums over windows, with the variance n / (n - 1) sum_i (sum_i - m count_i)^2 / (sum_i count_i)^2
  (Cochran, "Sampling Techniques", 1977, section 6.4) and Student's t of n - 1 degrees of freedom.

  Args:
    sums: of each window over its tokens.
    counts: tokens of each window.

  >>> mean = mean_over_windows([10.0, 14.0, 12.0], [4, 4, 4])
  >>> mean.value, round(mean.low, 2), round(mean.high, 2)
  (3.0, 1.76, 4.24)
  """
  import scipy.stats

  totals, sizes = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
  mean, number = float(totals.sum() / sizes.sum()), len(totals)
  if number < 2:
    return Mean(mean, -math.inf, math.inf)
  variance = number / (number - 1) * np.sum(np.square(totals - mean * sizes)) / sizes.sum() ** 2
  radius = float(scipy.stats.t.ppf(0.975, number - 1) * math.sqrt(variance))
  return Mean(mean, mean - radius, mean + radius)
