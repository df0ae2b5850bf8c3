"""Trees of leaves that stay on disk until they are read, one by one.

.safetensors   a flat dict by name
a folder       an Orbax checkpoint, or the latest step of a CheckpointManager
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Shaped

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import checks, safetensors
from opq_jax.weights.orbax import OrbaxFolder


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """An array on disk.

  Attributes:
    path: the file or folder.
    name: the name of the array in it.
    shape: the shape of the array.
    dtype: the dtype that `read` returns; see `narrowed`.
    fetch: reads the array of a name and no other.
  """

  path: str
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[str], Shaped[np.ndarray, '...']] = dataclasses.field(repr=False, compare=False)

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


def is_streamable(path: str | os.PathLike[str]) -> bool:
  """Returns whether `open_weights` takes a path: a folder, or .safetensors that is no `.opq`."""
  path = Path(path)
  if path.is_dir():
    return True
  if path.suffix.lower() != '.safetensors' or not path.is_file():
    return False
  with safetensors.opened(path) as file:
    return not safetensors.is_opq(file)


def open_weights(path: str | os.PathLike[str]) -> PyTree:
  """Returns the tree of a file or folder with a `StoredLeaf` for every array.

  Args:
    path: a `.safetensors` file, or a folder of Orbax.

  Raises:
    ValueError: the file is damaged or of another format, or has no weights.
    OSError: it cannot be read.

  >>> import tempfile, safetensors.numpy
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   safetensors.numpy.save_file({'w': np.eye(3)}, f'{folder}/net.safetensors')
  ...   leaf = open_weights(f'{folder}/net.safetensors')['w']
  ...   print(leaf.shape, leaf.dtype, leaf.read().sum())
  (3, 3) float64 3.0
  """
  leaves = _open_orbax(Path(path)) if os.path.isdir(path) else _open_safetensors(path)
  if not jax.tree.leaves(leaves):
    raise ValueError(f'{path}: found no weights, expected at least one')
  return leaves


def _open_safetensors(path: str | os.PathLike[str]) -> dict[str, StoredLeaf]:
  def fetch(name: str) -> np.ndarray:
    with safetensors.opened(path) as file:
      return safetensors.read_tensor(path, file, name)

  leaves = {}
  with safetensors.opened(path) as file:
    for name in file.keys():  # noqa: SIM118, it is no mapping
      piece = file.get_slice(name)
      shape = tuple(piece.get_shape())
      # a slice has NumPy's dtype and reads one row; an empty array has nothing to slice
      dtype = safetensors.extended_dtype(file, name)
      if dtype is None:
        dtype = (piece[:1] if shape and math.prod(shape) else file.get_tensor(name)).dtype
      leaves[name] = StoredLeaf(os.fspath(path), name, shape, dtype, fetch)
  return leaves


def _open_orbax(path: Path) -> PyTree:
  expected = 'an Orbax checkpoint'
  folder = checks.guarded(OrbaxFolder, path, expected)

  def fetch(name: str) -> np.ndarray:
    return checks.guarded(lambda _: folder.read_leaf(name), path, expected)

  leaves = []
  for name, leaf in trees.named_leaves(folder.tree).items():
    dtype = checks.dtype_of_numbers(path, name, leaf)
    leaves.append(StoredLeaf(os.fspath(path), name, tuple(leaf.shape), dtype, fetch))
  return jax.tree.unflatten(jax.tree.structure(folder.tree), leaves)
