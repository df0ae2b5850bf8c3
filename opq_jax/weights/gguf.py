"""Opens GGUF files of llama.cpp: a flat dict by name, dequantized when a tensor is read.

Needs the package gguf, whose own `dequantize` decodes the tensors.  F16, BF16, F32, F64 and
integers stay as they are; tensors of all other types become float32.
"""

import collections
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.core import extras, messages
from opq_jax.weights import checks
from opq_jax.weights.stored_leaves import StoredLeaf

_PIECE = 1 << 22  # weights dequantized at a time: the package takes several copies of them

# types of numbers, not of blocks
_PLAIN = {
  **{name: np.dtype(f'float{name[1:]}') for name in ('F16', 'F32', 'F64')},
  **{name: np.dtype(f'int{name[1:]}') for name in ('I8', 'I16', 'I32', 'I64')},
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


def open_leaves(path: Path) -> dict[str, StoredLeaf]:
  """Returns the tensors of a file by name, on disk.

  Warns:
    UserWarning: tensors are quantized already; the message counts them by type.

  Raises:
    ValueError: gguf is missing, the file is damaged, of the other byte order, or has tensors of a
      type that the package cannot dequantize.
    OSError: it cannot be read.
  """
  gguf = extras.require('gguf', 'gguf', str(path))
  return checks.guarded(lambda path: _open(gguf, path), path, 'a GGUF file')


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Warns, Raises:
    As `open_leaves`.
  """
  return {name: leaf.read() for name, leaf in open_leaves(path).items()}


def _open(gguf: Any, path: Path) -> dict[str, StoredLeaf]:
  reader = gguf.GGUFReader(path)
  if reader.byte_order != 'I':
    raise ValueError(f'{path}: found the byte order of other machines, expected that of this one')
  places = {tensor.name: _Place(gguf, path, tensor) for tensor in reader.tensors}
  kinds = [place.kind for place in places.values() if place.kind not in _PLAIN]
  if kinds:
    counts = ', '.join(f'{n} {kind}' for kind, n in collections.Counter(kinds).most_common())
    messages.warn(
      f'{path}: found weights of {_model(reader)} that are quantized already ({counts} of '
      f'{len(places)} tensors): their float32 values are compressed, and sizes count against these'
    )
  return {
    name: StoredLeaf(
      *(str(path), name, place.shape, place.dtype, place.read),
      fetch_first=place.first if len(place.shape) > 1 else None,
    )
    for name, place in places.items()
  }


class _Place:
  """Where the bytes of a tensor lie, and what they are.

  The file is not mapped while it is read: pages of a mapping would count as memory.
  """

  def __init__(self, gguf: Any, path: Path, tensor: Any):
    self._gguf, self._path, self._type = gguf, path, tensor.tensor_type
    self._begin, self._stored = int(tensor.data_offset), tuple(tensor.data.shape)
    self.kind = tensor.tensor_type.name
    self.shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    self.dtype = _PLAIN.get(self.kind, np.dtype(np.float32))
    if self.kind not in _PLAIN:
      block = np.zeros((1, gguf.GGML_QUANT_SIZES[self._type][1]), np.uint8)
      try:
        gguf.quants.dequantize(block, self._type)
      except NotImplementedError as error:
        raise ValueError(
          f'{path}: {tensor.name}: found type {self.kind}, expected one that the package gguf can '
          'dequantize'
        ) from error

  def read(self, _: str) -> Shaped[np.ndarray, '...']:
    """Returns the tensor."""
    return self._entries(self.shape)

  def first(self, _: str) -> Shaped[np.ndarray, '...']:
    """Returns the first entry along the first of two axes or more."""
    return self._entries((1, *self.shape[1:]))

  def _entries(self, shape: tuple[int, ...]) -> Shaped[np.ndarray, '...']:
    """Returns the first numbers of the tensor, in a shape that differs in its first axis alone."""
    if self.kind in _PLAIN:
      return self._numbers(0, int(np.prod(shape)), self.dtype).reshape(shape)
    row_bytes, width = self._stored[-1], shape[-1]
    rows = np.empty((int(np.prod(shape[:-1])), width), np.float32)
    count = max(_PIECE // max(width, 1), 1)
    for start in range(0, len(rows), count):
      piece = rows[start : start + count]
      data = self._numbers(start * row_bytes, len(piece) * row_bytes, np.dtype(np.uint8))
      piece[:] = self._gguf.quants.dequantize(data.reshape(len(piece), row_bytes), self._type)
    return rows.reshape(shape)

  def _numbers(self, begin: int, count: int, dtype: np.dtype) -> Shaped[np.ndarray, ' count']:
    data = np.fromfile(self._path, dtype, count, offset=self._begin + begin)
    if len(data) != count:
      raise ValueError(f'{self._path}: found {len(data)} numbers, expected {count}')
    return data


def _model(reader: Any) -> str:
  """Returns architecture and name by the metadata of a file."""
  fields = (reader.get_field(key) for key in ('general.architecture', 'general.name'))
  texts = [str(field.contents()) for field in fields if field is not None]
  return ' '.join(texts) or 'an unnamed model'
