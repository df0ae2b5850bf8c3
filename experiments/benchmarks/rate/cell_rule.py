"""Cells against nearest values: the bits that each needs for the same squared error.

    python -m experiments.benchmarks.rate.cell_rule

One Laplace channel of scale 1, at the grids that are optimal for a range of multipliers.  The code
of a survivor is either its cell [threshold + (k-1) step, threshold + k step) or the nearest value
of the same codebook.  Nearest values have less error and more entropy; their excess is the bits
above the optimal trade-off of error and bits.  Computed from the density, without samples.
"""

import math

import numpy as np

from experiments.benchmarks import harness
from opq_jax.allocation import laplace_rate


def entropy_and_error(edges: np.ndarray, values: np.ndarray) -> tuple[float, float]:
  """Returns bits per weight, and error over variance, of cells of |w| with given values."""
  ends = np.append(edges, np.inf)
  tail = np.exp(-ends)
  cells = np.concatenate([[1 - tail[0]], np.tile((tail[:-1] - tail[1:]) / 2, 2)])
  cells = cells[cells > 0]

  def integral(w: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """Returns the integral of (w - value)^2 exp(-w) from w to inf."""
    finite = np.where(np.isinf(w), 0, w)
    return np.where(np.isinf(w), 0, ((finite - value) ** 2 + 2 * (finite - value) + 2)) * np.exp(-w)

  error = np.sum(integral(ends[:-1], values) - integral(ends[1:], values))
  error += 2 - integral(edges[:1], 0.0)[0]
  return float(-np.sum(cells * np.log2(cells))), float(error / 2)


def main() -> None:
  table = laplace_rate.single_scale_table()
  rows = []
  for mu in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
    threshold, step = (
      math.exp(np.interp(math.log(mu), table['log_mu'], table[name]))
      for name in ('log_threshold', 'log_step')
    )
    edges = threshold + step * np.arange(4000)
    values = edges + 1 - step / math.expm1(step)
    bits, error = entropy_and_error(edges, values)
    nearest = np.concatenate([edges[:1], (values[1:] + values[:-1]) / 2])
    nearest_bits, nearest_error = entropy_and_error(nearest, values)
    # along the optimal curve d(error) / d(bits) = -mu / 2
    excess = nearest_bits - bits - (error - nearest_error) * 2 / mu
    rows.append(
      {
        'bits per weight, cells': round(bits, 3),
        'error / variance': round(error, 4),
        'excess bits of nearest': round(excess, 4),
        'excess, %': round(100 * excess / bits, 2),
      }
    )
  harness.report(
    'cell_rule',
    'nearest value instead of cell, at equal error',
    'python -m experiments.benchmarks.rate.cell_rule',
    rows,
  )


if __name__ == '__main__':
  main()
