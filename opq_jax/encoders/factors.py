"""Moments of a layer's inputs as error feedback reads them: the factor of their damped inverse."""

import math
import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

Factor = Float32[np.ndarray, 'groups K K']
Order = Int[np.ndarray, 'groups K']

DAMPING = 0.05
"""Damping of moments: added to the diagonal of a matrix, times the diagonal's mean.

Moments of few or synthetic inputs are noisy, and error feedback without damping fits their noise.
"""

_REVERSED = 1 << 18  # numbers that are moved at a time: 1 MB

# one factorization at a time: BLAS runs it on all processors, and its copies are the largest arrays
_FACTORIZATION = threading.Lock()


def check_damping(damping: float) -> None:
  """Raises ValueError where a damping is negative or not finite."""
  if not 0 <= damping < math.inf:
    raise ValueError(f'damping: found {damping}, expected a finite number of 0 or more')


class IndefiniteMomentsError(ValueError):
  """Damped moments are not positive definite, and so have no factor that pushes errors on."""

  def __init__(self, damping: float):
    super().__init__(
      f'found moments that are not positive definite with damping {damping:g}, expected more '
      'damping, or moments E[x^T x]'
    )


class Factored(NamedTuple):
  """Damped moments of the inputs of a leaf without slices, by the factor of their inverse.

  Attributes:
    factor: U of H^-1 = U^T U, from `factor_of`, with H in the order in which inputs are coded.
    inputs: axes of the leaf.
    order: this order, of each group; None where it is that of the leaf.
  """

  factor: Factor
  inputs: tuple[int, ...]
  order: Order | None = None


def factor_of(moments: Factor, damping: float, version: int = 2) -> Factor:
  """Returns the upper triangular U of H^-1 = U^T U for each group.

  Args:
    moments: H.
    damping: added to the diagonal of H, once H is divided by its mean energy.
    version: 2; or 1, which rounds as files without a version were made.

  Raises:
    IndefiniteMomentsError: a damped matrix is not positive definite.
  """
  energy = np.mean(np.diagonal(moments, axis1=1, axis2=2), axis=1)
  # a factor of H cancels in U_ij / U_ii: over its mean, damping is relative and float32 sees
  # numbers near 1
  energy = np.where(energy > 0, energy, 1)
  with _FACTORIZATION:
    try:
      if version > 1 and len(moments) == 1:
        return _factor_in_place(moments[0], energy[0], damping)[None]
      # with J the reversal, J H J = L L^T, and so U = J L^-1 J
      return np.ascontiguousarray(_inverse(moments, energy, damping)[:, ::-1, ::-1])
    except np.linalg.LinAlgError as error:
      raise IndefiniteMomentsError(damping) from error


def _factor_in_place(
  moments: Float32[np.ndarray, 'K K'], energy: Float32[np.ndarray, ''], damping: float
) -> Float32[np.ndarray, 'K K']:
  """Returns U of one matrix, in one array of its size: 85 MB for 4608 inputs."""
  from scipy.linalg import lapack

  # in Fortran's order, in which LAPACK works in place
  matrix = np.empty(moments.shape, np.float32, order='F')
  np.divide(moments[::-1, ::-1], energy, out=matrix, dtype=np.float32)
  np.fill_diagonal(matrix, np.diagonal(matrix) + damping)
  matrix, failed = lapack.spotrf(matrix, lower=0, clean=1, overwrite_a=1)
  if not failed:
    matrix, failed = lapack.strtri(matrix, lower=0, overwrite_c=1)
  if failed or not np.isfinite(np.diagonal(matrix)).all():
    raise np.linalg.LinAlgError
  # the transpose of L^-1 in Fortran's order is L^-1 in C's, and backwards it is J L^-1 J
  flat = matrix.T.reshape(-1)
  for start in range(0, flat.size // 2, _REVERSED):
    stop = min(start + _REVERSED, flat.size // 2)
    front, back = flat[start:stop], flat[flat.size - stop : flat.size - start]
    front[:], back[:] = back[::-1].copy(), front[::-1].copy()
  return flat.reshape(moments.shape)


def _inverse(moments: Factor, energy: Float32[np.ndarray, ' groups'], damping: float) -> Factor:
  """Returns L^-1 of each group: of many small matrices, as of a depthwise convolution."""
  import scipy.linalg

  groups, width, _ = moments.shape
  matrix = (moments / energy[:, None, None]).astype(np.float32, copy=False)
  diagonal = matrix.reshape(groups, -1)[:, :: width + 1]
  diagonal[...] = diagonal.astype(np.float64) + damping
  lower = np.linalg.cholesky(matrix[:, ::-1, ::-1])
  if groups > 1:
    return np.linalg.inv(lower)
  identity = np.eye(width, dtype=np.float32, order='F')
  return scipy.linalg.solve_triangular(
    lower[0], identity, lower=True, overwrite_b=True, check_finite=False
  )[None]
