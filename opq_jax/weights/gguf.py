"""Opens GGUF files of llama.cpp: a flat dict by name, dequantized when a tensor is read.

Needs the package gguf, whose own `dequantize` decodes the tensors.  F16, BF16, F32, F64 and
integers stay as they are; tensors of all other types become float32.

A language model that `opq_jax.weights.gguf_models` knows is opened as the Hugging Face folder of
the same model would be: tensors have transformers' names and order of rows, and config.json and the
tokenizer's files are made from the metadata.
"""

import collections
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.core import extras, messages
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.weights import checks, gguf_models, gguf_tokenizers
from opq_jax.weights.gguf_models import Field, GgufModel, Source

_PIECE = 1 << 22  # weights dequantized at a time: the package takes several copies of them

# types of numbers, not of blocks
_PLAIN = {
  **{name: np.dtype(f'float{name[1:]}') for name in ('F16', 'F32', 'F64')},
  **{name: np.dtype(f'int{name[1:]}') for name in ('I8', 'I16', 'I32', 'I64')},
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


class OpenGguf(NamedTuple):
  """An open file.

  Attributes:
    path: of the file.
    leaves: its tensors by name; those of a language model as transformers has them.
    model: the language model; None where it holds another network.
    problem: why there is none.
    field: of its metadata.
    quantized: a line about tensors that are quantized already; '' where there are none.
  """

  path: Path
  leaves: dict[str, StoredLeaf]
  model: GgufModel | None
  problem: str
  field: Field
  quantized: str

  @property
  def config(self) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ValueError: the file holds no language model that is known.
    """
    if self.model is None:
      raise ValueError(self.problem)
    return self.model.config

  def side_file(self, name: str) -> bytes | None:
    """Returns a file that a Hugging Face folder of the same model has; None for others.

    Raises:
      ValueError: the tokenizer is of a kind that is not known.
    """
    if self.model is not None and name == 'config.json':
      return (json.dumps(self.config, indent=2) + '\n').encode()
    if self.model is not None and name in ('tokenizer.json', 'tokenizer_config.json'):
      files = lambda path: gguf_tokenizers.tokenizer_files(self.field)
      return checks.guarded(files, self.path, 'a tokenizer that is known').get(name)
    return None


def is_gguf(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is that of a GGUF file, by its name."""
  return os.fspath(path).lower().endswith('.gguf')


def open_gguf(path: Path) -> OpenGguf:
  """Opens a file, without a warning.

  Raises:
    ValueError, OSError: as `open_leaves`.
  """
  status = os.stat(path)
  return _opened(path, status.st_size, status.st_mtime_ns)


# a command opens its file several times, and parsing a vocabulary takes a second
@functools.lru_cache(maxsize=1)
def _opened(path: Path, size: int, changed: int) -> OpenGguf:
  gguf = extras.require('gguf', 'gguf', str(path))
  return checks.guarded(lambda path: _open(gguf, path), path, 'a GGUF file')


def open_leaves(path: Path) -> dict[str, StoredLeaf]:
  """Returns the tensors of a file by name, on disk.

  Warns:
    UserWarning: tensors are quantized already; the message counts them by type.

  Raises:
    ValueError: gguf is missing, the file is damaged, of the other byte order, or has tensors of a
      type that the package cannot dequantize.
    OSError: it cannot be read.
  """
  found = open_gguf(path)
  if found.quantized:
    messages.warn(found.quantized)
  return found.leaves


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Warns, Raises:
    As `open_leaves`.
  """
  return {name: leaf.read() for name, leaf in open_leaves(path).items()}


def _open(gguf: Any, path: Path) -> OpenGguf:
  reader = gguf.GGUFReader(path)
  if reader.byte_order != 'I':
    raise ValueError(f'{path}: found the byte order of other machines, expected that of this one')
  places = {tensor.name: _Place(gguf, path, tensor) for tensor in reader.tensors}

  def field(key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()

  model, problem = None, ''
  shapes = {name: place.shape for name, place in places.items()}
  try:
    model = gguf_models.described(field, shapes, lambda name: places[name].read(name))
  except ValueError as error:
    problem = str(error)
  sources = {name: Source(name, 0) for name in places} if model is None else model.sources
  leaves = {
    name: _leaf(path, name, source, places[source.name]) for name, source in sources.items()
  }
  return OpenGguf(path, leaves, model, problem, field, _quantized(path, field, places))


def _leaf(path: Path, name: str, source: Source, place: '_Place') -> StoredLeaf:
  return StoredLeaf(
    *(str(path), name, place.shape, place.dtype),
    fetch=lambda name: source.in_order(place.read(name)),
    # the first row is the first in both orders
    fetch_first=place.first if len(place.shape) > 1 else None,
  )


def _quantized(path: Path, field: Field, places: Mapping[str, '_Place']) -> str:
  """Returns a line about tensors that are quantized already; '' where there are none."""
  kinds = [place.kind for place in places.values() if place.kind not in _PLAIN]
  if not kinds:
    return ''
  counts = ', '.join(f'{n} {kind}' for kind, n in collections.Counter(kinds).most_common())
  texts = [str(text) for key in ('architecture', 'name') if (text := field(f'general.{key}'))]
  return (
    f'{path}: found weights of {" ".join(texts) or "an unnamed model"} that are quantized already '
    f'({counts} of {len(places)} tensors): their float32 values are compressed, and sizes count '
    'against these'
  )


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
