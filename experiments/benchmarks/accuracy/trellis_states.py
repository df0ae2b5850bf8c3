"""Codes along trellises of more and fewer states than the format has.

    python -m experiments.benchmarks.accuracy.trellis_states

A million Laplace weights, at bits per weight of `accuracy.trellis`.  Each trellis is a shift
register as that of `opq_jax.coding.trellis`, of other length; its two masks are the best of a
random search for the least squared error of uniform weights.  'fewer bits' are those of the plain
codes of the same error, in percent.  Each number of states runs in a process of its own, since
compiled loops have the tables built in.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments.benchmarks import harness

BITS = 1.0, 2.0, 3.0
STATES = 8, 16, 32, 64, 128, 256
_TRIED = 150  # pairs of masks
_SAMPLE, _LONG = 20_000, 200_000  # uniform weights: of the search, and of the best of it


def parity(number: int) -> int:
  return number.bit_count() & 1


def tables(states: int, subset_mask: int, register_mask: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns subsets and next states, as `opq_jax.coding.trellis` has them.

  >>> from opq_jax.coding import trellis
  >>> subsets, following = tables(32, 9, 29)
  >>> np.array_equal(subsets, trellis.SUBSET_OF), np.array_equal(following, trellis.NEXT)
  (True, True)
  """
  subsets = np.array([parity(s & subset_mask) for s in range(states)], np.uint8)
  following = [
    [(s << 1) % states | (parity(s & register_mask) ^ bit) for bit in (0, 1)] for s in range(states)
  ]
  return subsets, np.array(following, np.uint8)


def squared_error(
  subsets: np.ndarray, following: np.ndarray, weights: np.ndarray, walk: list[object]
) -> float:
  """Returns the least mean squared error of weights over the cells of a step, by Viterbi."""
  import numba

  if not walk:
    walk.append(numba.njit(_least_error))
  states = len(subsets)
  before = np.array(
    [[s for s in range(states) if target in following[s]] for target in range(states)]
  )
  of_subset = subsets[before]
  bits = np.array(
    [[int(following[s, 1] == target) for s in row] for target, row in enumerate(before)]
  )
  return float(walk[0](before, of_subset, bits, weights)) / len(weights)  # type: ignore[operator]


def _least_error(
  before: np.ndarray, of_subset: np.ndarray, bits: np.ndarray, weights: np.ndarray
) -> float:
  """Codes of all integers: subset s has those of parity s, and index k = (c + s) / 2."""
  states = len(before)
  cost, new = np.zeros(states), np.zeros(states)
  branch, total = np.zeros((2, 2)), 0.0
  for weight in weights:
    for subset in range(2):
      for bit in range(2):
        # codes 4 apart
        origin = 2 * bit - subset
        error = weight - origin - 4 * np.round((weight - origin) / 4)
        branch[subset, bit] = error * error
    for target in range(states):
      one = cost[before[target, 0]] + branch[of_subset[target, 0], bits[target, 0]]
      two = cost[before[target, 1]] + branch[of_subset[target, 1], bits[target, 1]]
      new[target] = min(one, two)
    least = np.min(new)
    total += least
    for target in range(states):
      cost[target] = new[target] - least
  return total


def best_masks(states: int) -> tuple[int, int]:
  """Returns the masks of subset and register of least squared error."""
  rng, walk = np.random.default_rng(0), []
  every = list(itertools.product(range(1, states), range(states // 2, states)))
  tried = [every[i] for i in rng.permutation(len(every))[:_TRIED]]
  own = {32: (9, 29)}.get(states)
  short, long = (rng.uniform(0, 4, size=size) for size in (_SAMPLE, _LONG))
  error = lambda masks, weights: squared_error(*tables(states, *masks), weights, walk)
  first = sorted(tried, key=lambda masks: error(masks, short))[:8] + [own] * (own is not None)
  return min(first, key=lambda masks: error(masks, long))


def measure(states: int, subset_mask: int, register_mask: int) -> list[dict[str, object]]:
  """Returns the rows of one trellis; to be called before anything has loaded the compiled loops."""
  from opq_jax.coding import trellis

  trellis.STATES = states
  trellis.SUBSET_OF, trellis.NEXT = tables(states, subset_mask, register_mask)
  from experiments.benchmarks.accuracy.trellis import against_closed_forms, row

  sample = np.random.default_rng(0).laplace(size=(1000, 1000)).astype(np.float32)
  return [row('Laplace', {'w': sample}, bits, against_closed_forms) for bits in BITS]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--measure', type=int, nargs=3, metavar=('STATES', 'SUBSET', 'REGISTER'))
  arguments = parser.parse_args()
  if arguments.measure:
    json.dump(measure(*arguments.measure), sys.stdout)
    return
  rows = []
  for states in STATES:
    start = time.process_time()
    masks = best_masks(states)
    print(states, masks, f'{time.process_time() - start:.0f} s', flush=True)
    command = [sys.executable, '-m', __spec__.name, '--measure', str(states), *map(str, masks)]
    with tempfile.TemporaryDirectory() as folder:
      # loops that are kept on disk have the tables of the format built in
      environment = {**os.environ, 'NUMBA_CACHE_DIR': folder, 'OPQ_CACHE_DIR': folder}
      found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for row in json.loads(found.stdout.splitlines()[-1]):
      rows.append(
        {
          'states': states,
          'bits per weight': row['bits per weight'],
          'squared error, of the energy': row['squared error, of the energy'],
          'fewer bits, %': row['fewer bits, %'],
          'choose, M/s': row['choose, M/s'],
        }
      )
      print(rows[-1], flush=True)
  command_line = 'python -m experiments.benchmarks.accuracy.trellis_states'
  harness.report('trellis_states', 'trellises of other sizes', command_line, rows)


if __name__ == '__main__':
  main()
