"""Second moments that lie on disk: in memory is one matrix at a time, whatever a network has.

The network is computed operation by operation, the layers of a scan one after the other.  As soon
as the inputs of a layer are known, x^T x is added to its matrix in the file.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from opq_jax.core.trees import PyTree
from opq_jax.network.batch_mode import on_batch_statistics
from opq_jax.network.interpreter import Product
from opq_jax.network.moment_sums import Measured
from opq_jax.network.products import Sums, order_of, reading_of, sums_of
from opq_jax.network.side_by_side import SideBySide
from opq_jax.network.uses import rows_key, traced, use_of


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
  """A float32 array in a `.npy` file, of which every index reads a part.

  Attributes:
    path: of the file, which must stay as long as the moments are read.
    shape: of the array.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, 'matrix.npy')
  ...   np.save(path, np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2))
  ...   StoredMatrix(path, (2, 1, 2, 2))[1].tolist()
  [[[4.0, 5.0], [6.0, 7.0]]]
  """

  path: str
  shape: tuple[int, ...]

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def dtype(self) -> np.dtype:
    """float32."""
    return np.dtype(np.float32)

  def __getitem__(self, place: Any) -> Float32[np.ndarray, '...']:
    # a copy, such that no page of the file stays mapped
    return np.array(np.load(self.path, mmap_mode='r')[place])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return self[()].astype(dtype or np.float32, copy=False)


def measured_on_disk(
  fn: Callable[..., Any],
  params: PyTree,
  batches: Iterable[tuple[Any, ...]],
  layout_of: Callable[..., Measured],
  folder: str | os.PathLike[str],
) -> Measured:
  """Returns moments whose matrices are in a folder.

  Args:
    fn, params: as for `opq_jax.network.second_moments`.
    batches: arguments of each call, behind the parameters.
    layout_of: returns the shapes of matrices, and which leaf has which, from the arguments of a
      call.
    folder: made where it is not there; `moments_0.npy` and so on are overwritten.
  """
  Path(folder).mkdir(parents=True, exist_ok=True)
  leaves = jax.tree.leaves(params)
  layout, files = None, []
  for inputs in batches:
    closed = traced(on_batch_statistics(fn, params), params, *inputs)
    if layout is None:
      layout = layout_of(params, *inputs)
      files = [
        _SumsFile(os.path.join(folder, f'moments_{number}.npy'), matrix.shape)
        for number, matrix in enumerate(layout.matrices)
      ]
    numbers = [None if entry is None else entry[0] for entry in layout.leaves]
    _StoredSums(leaves, numbers, files).run(closed, inputs)
  if layout is None:
    raise ValueError('batches: found none, expected at least one')
  return layout.replace(  # type: ignore[attr-defined]
    matrices=[file.mean() for file in files], rows=[file.least_rows() for file in files]
  )


class _SumsFile:
  """Sums of x^T x of one matrix, or of one for each slice, in a file."""

  def __init__(self, path: str, shape: tuple[int, ...]):
    self._path, self._shape = path, shape
    self._rows = np.zeros(shape[:-3])
    # zeros that take no room before they are written
    np.lib.format.open_memmap(path, 'w+', np.float32, shape)

  def add(self, place: tuple[int, ...], sums: Sums) -> None:
    """Adds the sums of the slices at `place`."""
    self._rows[place] += float(sums.rows)
    np.load(self._path, mmap_mode='r+')[place] += np.asarray(sums.total)

  def least_rows(self) -> float:
    """Returns the least number of rows that a slice has."""
    return float(np.min(self._rows))

  def mean(self) -> StoredMatrix:
    """Divides by the number of rows, and returns the matrix."""
    for place in np.ndindex(self._rows.shape):
      np.load(self._path, mmap_mode='r+')[place] /= np.float32(max(float(self._rows[place]), 1.0))
    return StoredMatrix(self._path, self._shape)


class _StoredSums(SideBySide):
  """Computes one network, and adds x^T x to files on the way.

  Args:
    leaves: of the network.
    numbers: of each leaf, the number of its file, or None.  Leaves of one file read the same rows.
    files: as above.
  """

  def __init__(
    self, leaves: Sequence[Any], numbers: Sequence[int | None], files: Sequence[_SumsFile]
  ):
    super().__init__(leaves, leaves, [False] * len(leaves))
    self._numbers, self._files = numbers, files
    self._added: set[Any] = set()

  def product(self, product: Product) -> None:
    number = self._numbers[product.view.leaf]
    if number is None or use_of(product).kind not in ('dot', 'convolution'):
      return
    # rows that several leaves read are added once
    reading = reading_of(product)
    key = number, rows_key(product), order_of(reading), product.view.indices
    if key in self._added:
      return
    self._added.add(key)
    inputs = product.values[1 - product.operand].content.first
    self._files[number].add(product.view.indices, _sums(reading, inputs))


_sums = jax.jit(sums_of, static_argnums=0)
