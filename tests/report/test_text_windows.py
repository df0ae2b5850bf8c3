"""Windows over a text, and means over windows."""

import math

import numpy as np
import pytest

from opq_jax.report import text_windows


@pytest.mark.parametrize(
  ('length', 'window', 'stride'), [(23, 8, 3), (24, 8, 1), (5, 8, 8), (9, 8, 7)]
)
def test_windows_count_every_token_once(length, window, stride):
  found = text_windows.windows(length, window, stride)
  counted = [place for part in found for place in range(part.counted, part.end)]
  assert counted == list(range(1, length))
  assert all(part.begin < part.counted and part.end - part.begin <= window for part in found)
  # with the context that a stride promises, but at the text's begin
  assert all(part.counted - part.begin >= window - stride for part in found[1:])


def test_windows_without_overlap_leave_out_first_tokens():
  found = text_windows.windows(17, 8, 8)
  counted = [place for part in found for place in range(part.counted, part.end)]
  assert counted == [place for place in range(17) if place % 8]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((9, 1, 1), 'window: found 1, expected 2 tokens or more'),
    ((9, 4, 5), 'stride: found 5, expected 1 to 4, the tokens of a window'),
    ((1, 4, 4), 'found a text of 1 tokens, expected 2 or more'),
  ],
)
def test_windows_are_checked(arguments, message):
  with pytest.raises(ValueError, match=message):
    text_windows.windows(*arguments)


def test_interval_covers_the_mean():
  """In 95 % of texts whose windows differ by chance, of windows of two lengths."""
  rng, hits = np.random.default_rng(0), 0
  counts = np.array([100] * 15 + [30])
  for _ in range(500):
    means = 3 + 0.3 * rng.normal(size=16)
    found = text_windows.mean_over_windows(means * counts, counts)
    hits += found.low <= 3 <= found.high
  assert 0.92 <= hits / 500 <= 0.98


def test_one_window_has_no_interval():
  found = text_windows.mean_over_windows([6.0], [3])
  assert found == (2.0, -math.inf, math.inf)
