"""Weights that stay on disk until they are asked for, leaf by leaf.

.safetensors   a flat dict by name
a folder       an Orbax checkpoint, or a CheckpointManager's folder: its latest step
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from jaxtyping import Shaped

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import files as weight_files
from opq_jax.weights.orbax import OrbaxFolder


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """An array on disk.

  Attributes:
    path: of the file or folder.
    name: of the array there.
    shape: its own.
    dtype: in which it is read; float64 may be asked for as float32.
    fetch: reads the array of a name, and nothing else.
  """

  path: str
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[str], Shaped[np.ndarray, '...']] = dataclasses.field(repr=False, compare=False)

  @property
  def ndim(self) -> int:
    """Dimensions."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes once read."""
    return self.size * self.dtype.itemsize

  def narrowed(self) -> 'StoredLeaf':
    """Itself, read as float32 where it is float64: JAX has no wider ones by default."""
    is_wide = self.dtype == np.float64
    return dataclasses.replace(self, dtype=np.dtype(np.float32)) if is_wide else self

  def read(self) -> Shaped[np.ndarray, '...']:
    """The array.

    Raises:
      ValueError: the file is not what it was when it was opened.
    """
    array = self.fetch(self.name)
    if array.shape != self.shape:
      raise ValueError(f'{self.path}: {self.name}: found {array.shape}, expected {self.shape}')
    return array.astype(self.dtype, copy=False)


def is_streamable(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a folder, or .safetensors of plain arrays: no other format, no `.opq`."""
  path = Path(path)
  if path.is_dir():
    return True
  if path.suffix.lower() != '.safetensors' or not path.is_file():
    return False
  with _opened(path) as file:
    return (file.metadata() or {}).get('format') != 'opq'


def open_weights(path: str | os.PathLike[str]) -> PyTree:
  """The tree of a file or folder with a `StoredLeaf` in the place of every array.

  Args:
    path: a `.safetensors` file, or a folder of Orbax.

  Raises:
    ValueError: this is no whole one of its format, or has no weights.
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
    with _opened(path) as file:
      return weight_files.read_tensor(path, file, name)

  leaves = {}
  with _opened(path) as file:
    for name in file.keys():  # noqa: SIM118, it is no mapping
      piece = file.get_slice(name)
      shape = tuple(piece.get_shape())
      # a slice tells NumPy's dtype without reading, where there is anything to slice
      dtype = weight_files.tensor_dtype(file, name)
      if dtype is None:
        dtype = (piece[:1] if shape and math.prod(shape) else file.get_tensor(name)).dtype
      leaves[name] = StoredLeaf(os.fspath(path), name, shape, dtype, fetch)
  return leaves


def _open_orbax(path: Path) -> PyTree:
  what = 'an Orbax checkpoint'
  folder = weight_files.guarded(OrbaxFolder, path, what)

  def fetch(name: str) -> np.ndarray:
    return weight_files.guarded(lambda _: folder.read_leaf(name), path, what)

  leaves = []
  for name, leaf in trees.named_leaves(folder.tree).items():
    dtype = weight_files.dtype_of_numbers(path, name, leaf)
    leaves.append(StoredLeaf(os.fspath(path), name, tuple(leaf.shape), dtype, fetch))
  return jax.tree.unflatten(jax.tree.structure(folder.tree), leaves)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Any:
  """A file of safetensors, read and not mapped: what was read of it need not stay in memory."""
  # safetensors would say of a file that may not be read that there is none
  open(path, 'rb').close()
  try:
    with safetensors.safe_open(path, 'np', backend='pread') as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path}: expected a safetensors file, found this: {error}') from error
