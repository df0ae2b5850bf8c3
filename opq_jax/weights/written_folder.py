"""Writes the model folder that an `.opq` file was made of, tensor by tensor."""

import json
import math
import os
from typing import BinaryIO, NamedTuple

import numpy as np

from opq_jax.core import files
from opq_jax.file.reader import OpqFile
from opq_jax.weights import checks, safetensors
from opq_jax.weights.carried import HEADER


class _Tensor(NamedTuple):
  """A tensor of a file of weights: its name, its dtype there and its bytes."""

  name: str
  dtype: np.dtype
  size: int


def holds_folder(file: OpqFile) -> bool:
  """Returns whether a file was made of a model folder, which `write_folder` gives back."""
  return any(name.endswith(HEADER) for name in file.side_files)


def write_folder(path: str | os.PathLike[str], file: OpqFile) -> None:
  """Writes the model folder that a file was made of: weights, index, config, tokenizer.

  Files beside the weights come back bit for bit, and so do headers of weights and tensors that are
  not compressed.  The folder appears whole or not at all; one tensor is in memory at a time.

  Args:
    path: the folder; it must not exist, or be empty.
    file: an `.opq` file of a model folder.

  Raises:
    ValueError: the file is damaged, or holds other tensors than its headers of weights name; or the
      folder holds anything.
    OSError: the folder cannot be written.

  >>> import tempfile, opq_jax
  >>> from opq_jax.weights import carried_files, open_folder, write_safetensors
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   os.mkdir(f'{folder}/in')
  ...   write_safetensors(f'{folder}/in/model.safetensors', {'w': np.ones((8, 8))})
  ...   model = open_folder(f'{folder}/in')
  ...   params, files = dict(model), carried_files(model).files
  ...   state = opq_jax.CompressionState({'w': None})
  ...   opq_jax.save(f'{folder}/net.opq', params, state, side_files=files)
  ...   with opq_jax.OpqFile(f'{folder}/net.opq') as file:
  ...     write_folder(f'{folder}/out', file)
  ...   print(open_folder(f'{folder}/out')['w'].shape)
  (8, 8)
  """
  side_files = file.read_side_files()
  shards = {
    name: _tensors(name, data, file) for name, data in side_files.items() if name.endswith(HEADER)
  }
  _check_once(shards, file)
  with files.new_folder(path) as folder:
    for name, data in side_files.items():
      place = folder / name
      # not the folder itself, which whoever interrupts has removed
      for parent in reversed(place.relative_to(folder).parents[:-1]):
        (folder / parent).mkdir(exist_ok=True)
      with files.errors_of(path, place), open(place, 'xb') as output:
        output.write(data)
        for tensor in shards.get(name, ()):
          _write(output, file[tensor.name], tensor.dtype)
        output.flush()
        os.fsync(output.fileno())


def _write(output: BinaryIO, array: np.ndarray, dtype: np.dtype) -> None:
  output.write(
    np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(-1).view(np.uint8).data
  )


def _tensors(name: str, header: bytes, file: OpqFile) -> list[_Tensor]:
  """Returns the tensors of a header in the order of their bytes.

  Raises:
    ValueError: the text is no header of safetensors, or names another tensor than the file holds.
  """
  length = int.from_bytes(header[:8], 'little')
  try:
    if len(header) != 8 + length:
      raise ValueError(f'found {len(header)} bytes, expected {8 + length}')
    content = json.loads(header[8:], object_pairs_hook=checks.unique)
    content.pop('__metadata__', None)
    placed = sorted((*entry['data_offsets'], key) for key, entry in content.items())
    tensors, last = [], 0
    for begin, end, key in placed:
      dtype, shape = safetensors.DTYPES[content[key]['dtype']], tuple(content[key]['shape'])
      if begin != last:
        raise ValueError(f'{key}: found an offset of {begin}, expected {last}')
      last = end
      tensors.append(_checked(key, dtype, shape, end - begin, file))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f'{name}: expected a header of safetensors, found this: {error}') from error
  return tensors


def _checked(
  name: str, dtype: np.dtype, shape: tuple[int, ...], size: int, file: OpqFile
) -> _Tensor:
  """Returns a tensor of a header if the file holds it in this shape."""
  if name not in file:
    raise ValueError(f'{name}: found no such tensor in the file')
  own_dtype, own_shape = file.dtype(name), file.shape(name)
  # float64 is compressed as float32, and comes back from it without loss
  is_wider = (own_dtype, dtype) == (np.float32, np.float64)
  if own_shape != shape or (own_dtype != dtype and not is_wider):
    raise ValueError(f'{name}: found {dtype}{shape}, expected {own_dtype}{own_shape}')
  if size != (expected := math.prod(shape) * dtype.itemsize):
    raise ValueError(f'{name}: found {size} bytes, expected {expected}')
  return _Tensor(name, dtype, size)


def _check_once(shards: dict[str, list[_Tensor]], file: OpqFile) -> None:
  """Checks that every leaf of a file is a tensor of one file of weights."""
  counts = dict.fromkeys(file, 0)
  for tensors in shards.values():
    for tensor in tensors:
      counts[tensor.name] += 1
  wrong = {name: count for name, count in counts.items() if count != 1}
  if wrong:
    name, count = next(iter(wrong.items()))
    raise ValueError(f'{name}: found in {count} files of weights, expected one')
