"""Reads and writes safetensors files: a flat dict of arrays by name."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from opq_jax.core import files, trees
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.weights import checks

# safetensors' names of the dtypes that it does not read into NumPy
_FLOAT8 = {
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'F8_E8M0': ml_dtypes.float8_e8m0fnu,
}


DTYPES: dict[str, np.dtype] = {
  **{f'I{bits}': np.dtype(f'int{bits}') for bits in (8, 16, 32, 64)},
  **{f'U{bits}': np.dtype(f'uint{bits}') for bits in (8, 16, 32, 64)},
  **{f'F{bits}': np.dtype(f'float{bits}') for bits in (16, 32, 64)},
  **{name: np.dtype(scalar) for name, scalar in _FLOAT8.items()},
  'BOOL': np.dtype(bool),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'C64': np.dtype(np.complex64),
}
"""Dtypes by the names of safetensors."""


def write_safetensors(
  path: str | os.PathLike[str], tree: PyTree, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a tree as safetensors, its path names joined by '/'.

  The names of a flat dict stay as they are.  The file appears whole or not at all: it is written to
  a temporary file beside its place and moved.

  Args:
    path: the file; an existing one is replaced.
    tree: any pytree of arrays.
    metadata: strings by name, as the `__metadata__` of the file; none by default.

  Raises:
    ValueError: two leaves have one name, or safetensors does not support a name or a dtype.
    OSError: the file cannot be written.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write_safetensors(f'{folder}/net.safetensors', {'layer': {'kernel': np.eye(3)}})
  ...   print(list(safetensors.numpy.load_file(f'{folder}/net.safetensors')))
  ['layer/kernel']
  """
  arrays = {}
  for name, leaf in trees.named_leaves(tree).items():
    if name == '__metadata__':
      raise ValueError(f'{path}: {name}: found a name that safetensors keeps for itself')
    array = np.asarray(leaf)
    try:
      safetensors.numpy.save({'probe': np.zeros(0, array.dtype)})
    except Exception as error:  # the type of the error depends on the dtype
      raise ValueError(
        f'{path}: {name}: found dtype {array.dtype}, expected one that safetensors can hold'
      ) from error
    # safetensors writes the memory of an array and disregards its strides
    arrays[name] = array.copy(order='C') if not array.flags.c_contiguous else array
  files.write_bytes(path, safetensors.numpy.save(arrays, dict(metadata) if metadata else None))


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns the `__metadata__` of a file, none of one that is an `.opq` file.

  Raises:
    ValueError, OSError: as `opened`.
  """
  with opened(path) as file:
    return {} if is_opq(file) else dict(file.metadata() or {})


def read(path: Path) -> PyTree:
  """Returns the arrays of a file by name; of an `.opq` file, the decoded network.

  Raises:
    ValueError: a name occurs twice.
    Exception: whatever safetensors raises at damaged bytes.
  """
  # opened first: safetensors reports an unreadable file as a missing one
  with open(path, 'rb'), safetensors.safe_open(path, 'np') as file:
    _check_names(path)
    if is_opq(file):
      with OpqFile(path) as opq:
        return opq.params()
    return {name: read_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
  """Opens a file without mapping it, so that pages which were read do not stay in memory.

  Raises:
    ValueError: it is not a safetensors file, or damaged.
    OSError: it cannot be read.
  """
  # safetensors reports an unreadable file as a missing one
  open(path, 'rb').close()
  try:
    with safetensors.safe_open(path, 'np', backend='pread') as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path}: expected a safetensors file, found this: {error}') from error


def open_leaves(path: str | os.PathLike[str]) -> dict[str, StoredLeaf]:
  """Returns the arrays of a file by name, on disk.

  Raises:
    ValueError: it is not a safetensors file, damaged, an `.opq` file, or a name occurs twice.
    OSError: it cannot be read.
  """

  def fetch(name: str) -> np.ndarray:
    with opened(path) as file:
      return read_tensor(path, file, name)

  def fetch_first(name: str) -> np.ndarray:
    with opened(path) as file:
      return file.get_slice(name)[:1]

  leaves = {}
  with opened(path) as file:
    if is_opq(file):
      raise ValueError(f'{path}: found an .opq file, expected weights: opq_jax.OpqFile reads it')
    _check_names(path)
    for name in file.keys():  # noqa: SIM118, it is no mapping
      piece = file.get_slice(name)
      shape = tuple(piece.get_shape())
      # a slice has NumPy's dtype and reads one row; an empty array has nothing to slice
      dtype, first = extended_dtype(file, name), None
      if dtype is None:
        first = fetch_first if shape and math.prod(shape) else None
        dtype = (piece[:1] if first else file.get_tensor(name)).dtype
      leaves[name] = StoredLeaf(os.fspath(path), name, shape, dtype, fetch, first)
  return leaves


def header(path: str | os.PathLike[str]) -> bytes:
  """Returns the header of a file: eight bytes of length, little-endian, and JSON.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb') as raw:
    length = raw.read(8)
    return length + raw.read(int.from_bytes(length, 'little'))


def _check_names(path: str | os.PathLike[str]) -> None:
  """Raises a ValueError if a name occurs twice: safetensors would keep one of two tensors."""
  try:
    json.loads(header(path)[8:], object_pairs_hook=checks.unique)
  except ValueError as error:
    raise ValueError(f'{os.fspath(path)}: {error}') from error


def is_opq(file: Any) -> bool:
  """Returns whether an open safetensors file is an `.opq` file."""
  return (file.metadata() or {}).get('format') == 'opq'


def extended_dtype(file: Any, name: str) -> np.dtype | None:
  """Returns the dtype of a tensor that safetensors cannot read into NumPy, None for any other."""
  scalar = _FLOAT8.get(file.get_slice(name).get_dtype())
  return None if scalar is None else np.dtype(scalar)


def read_tensor(path: str | os.PathLike[str], file: Any, name: str) -> Shaped[np.ndarray, '...']:
  """Returns a tensor of an open safetensors file, float8 included."""
  dtype = extended_dtype(file, name)
  if dtype is None:
    return file.get_tensor(name)
  with open(path, 'rb') as raw:
    size = int.from_bytes(raw.read(8), 'little')
    begin, end = json.loads(raw.read(size))[name]['data_offsets']
    raw.seek(8 + size + begin)
    data = raw.read(end - begin)
  return np.frombuffer(data, dtype).reshape(file.get_slice(name).get_shape())
