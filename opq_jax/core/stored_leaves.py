"""An array that stays on disk until it is read."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from opq_jax.core.array_types import Shaped


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """An array on disk.

  Attributes:
    path: the file or folder.
    name: the name of the array in it.
    shape: the shape of the array.
    dtype: the dtype that `read` returns; see `narrowed`.
    fetch: reads the array of a name and no other.
    fetch_first: reads its first entry along the first axis; None where that takes as long.
  """

  path: str
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[str], Shaped[np.ndarray, '...']] = dataclasses.field(repr=False, compare=False)
  fetch_first: Callable[[str], Shaped[np.ndarray, '...']] | None = dataclasses.field(
    default=None, repr=False, compare=False
  )

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the array in memory."""
    return self.size * self.dtype.itemsize

  def narrowed(self) -> 'StoredLeaf':
    """Returns the leaf with float32 in the place of float64, which JAX disables by default."""
    is_wide = self.dtype == np.float64
    return dataclasses.replace(self, dtype=np.dtype(np.float32)) if is_wide else self

  def first(self) -> Shaped[np.ndarray, '...']:
    """Reads the first entry along the first axis, or the array."""
    return self.read() if self.fetch_first is None else self.fetch_first(self.name)

  def read(self) -> Shaped[np.ndarray, '...']:
    """Reads the array.

    Raises:
      ValueError: the file has changed since it was opened.
      OSError: it cannot be read.
    """
    array = self.fetch(self.name)
    if array.shape != self.shape:
      raise ValueError(f'{self.path}: {self.name}: found {array.shape}, expected {self.shape}')
    return array.astype(self.dtype, copy=False)
