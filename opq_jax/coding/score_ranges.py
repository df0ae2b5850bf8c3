"""Cuts the scores of a kernel into the ranges of the fewest bits."""

import math

import numpy as np
from jaxtyping import Float, Int64

from opq_jax.coding import frequencies
from opq_jax.coding.coded_kernels import CodedKernel
from opq_jax.coding.contexts import MAX_RANGES, Scores

_TABLE_PRICES = (1, 2, 4, 8, 16, 32, math.inf)
"""Factors on the bits of tables: the next one, where more than `MAX_RANGES` ranges are left; with
infinity there is one range."""


def counts_by_score(
  coded: CodedKernel, scores: Scores
) -> tuple[Int64[np.ndarray, ' k'], Int64[np.ndarray, 'k subsets 256']]:
  """Returns the scores that occur, in order, and the counts of symbols with each of them."""
  several = 1 if coded.blocks[0].subsets is None else 2
  symbols = coded.occurring.size
  least, largest = scores.bounds()
  by_score = np.zeros((largest - least + 1, several, symbols), np.int64)
  for b in coded.blocks:
    # score, subset and symbol as one number: one `bincount` counts all three at once
    place = scores.of_block(b.rows, b.activities).astype(np.int64) - least
    if b.subsets is not None:
      place = 2 * place + b.subsets
    place = place * symbols + b.symbols
    by_score += np.bincount(place.reshape(-1), minlength=by_score.size).reshape(by_score.shape)
  occurring = np.flatnonzero(by_score.any((1, 2)))
  counts = np.zeros((occurring.size, several, 256), np.int64)
  counts[..., coded.occurring.view(np.uint8)] = by_score[occurring]
  return occurring + least, counts


def partition(counts: Int64[np.ndarray, 'k subsets 256']) -> tuple[float, list[int]]:
  """Cuts the scores that occur into the ranges of the fewest bits, tables included.

  The shortest path from the first score to the last over all cuts, by dynamic programming in k**2
  steps.

  Returns:
    The bits, and the place at which each range begins.
  """
  occurring = counts[..., counts.any((0, 1))]
  # counts of any run of scores are then one difference
  sums = np.concatenate([np.zeros((1, *occurring.shape[1:])), np.cumsum(occurring, 0)])
  k = len(counts)
  for price in _TABLE_PRICES:
    best, cut = np.zeros(k + 1), np.zeros(k + 1, int)
    for stop in range(1, k + 1):
      # an infinite price leaves no cut to choose; its bits are priced at 64, a finite sum
      start = np.arange(stop) if price < math.inf else np.zeros(1, int)
      parts = sums[stop] - sums[start]
      bits = frequencies.ideal_bits(parts) + min(price, 64) * _table_bits(parts)
      bits = best[start] + bits.sum(-1)
      cut[stop], best[stop] = start[np.argmin(bits)], bits.min()
    first, stop = [], k
    while stop:
      stop = int(cut[stop])
      first.append(stop)
    if len(first) <= MAX_RANGES:
      break
  return float(best[k]), first[::-1]


def _table_bits(counts: Float[np.ndarray, '... symbols']) -> Float[np.ndarray, '...']:
  """About the bits of `frequencies.write_table`, which would take too long for every cut."""
  total = counts.sum(-1, keepdims=True)
  precision = np.minimum(1 + 0.75 * np.log2(np.maximum(total, 1)), 16)
  frequency = counts * 2**precision / np.maximum(total, 1)
  return 10 + (np.log2(1 + frequency) + 1.5 * (counts > 0)).sum(-1)
