"""Reads PyTorch state dicts; needs PyTorch.  Pickled code is refused (`weights_only=True`)."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.allocation.optimizer_states import is_in_optimizer
from opq_jax.core import extras, messages
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.weights import checks

EXPECTED = 'a PyTorch state dict that loads with weights_only=True'
"""What a file is expected to be, for messages."""

# keys under which training checkpoints keep the weights, beside epochs and optimizers
_STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict')


def read(path: Path, *, optimizer: bool = False) -> Any:
  """Returns the tensors of a state dict, or of the state dict inside a training checkpoint.

  Args:
    path: the file.
    optimizer: whether to return the states of optimizers in the checkpoint too, each under its key
      beside the tensors.  Numbers become arrays, and so do lists and tuples of numbers.

  Warns:
    UserWarning: a training checkpoint has tensors beside the state dict, or the state of an
      optimizer, which are not read; or, with `optimizer`, parts of it that are neither tensors nor
      numbers.

  Raises:
    ValueError: PyTorch is missing, there is no state dict, a matrix stands beside it, a tensor is
      sparse, quantized or of a dtype that NumPy and ml_dtypes lack, it claims more bytes than the
      file has, or it has the name of an optimizer's key.
    Exception: whatever PyTorch raises at damaged bytes and at pickled code.
  """
  checkpoint = _loaded(path)
  optimizers, weights = checkpoint.optimizers, _to_numpy(checkpoint.state_dict, f'{path}: ')
  _warn_of_others(path, checkpoint)
  if not optimizer:
    _warn_of_optimizers(path, optimizers)
    return weights
  if both := sorted(weights.keys() & optimizers.keys()):
    raise ValueError(f'{path}: {both[0]}: found a tensor and an optimizer of this name')
  left: list[str] = []
  arrays = {key: _to_numpy(state, f'{path}: {key}/') for key, state in optimizers.items()}
  kept = {key: _numbers(state, key, left) for key, state in arrays.items()}
  if left:
    messages.warn(f'{path}: {", ".join(left)}: found neither tensors nor numbers, left out')
  return weights | kept


def open_leaves(path: Path) -> dict[str, StoredLeaf]:
  """Returns the tensors of a flat state dict by name, on disk.

  Each is read through a mapping of the file that ends with the read.  Files that PyTorch wrote
  before 1.6 cannot be mapped: such a file is read at once and stays in memory.

  Raises:
    ValueError: as `read`; or something in the state dict is no tensor.
    Exception: whatever PyTorch raises at damaged bytes and at pickled code.
  """
  is_mapped = zipfile.is_zipfile(path)
  checkpoint = _loaded(path, mmap=is_mapped)
  loaded = checkpoint.state_dict
  _warn_of_others(path, checkpoint)
  _warn_of_optimizers(path, checkpoint.optimizers)

  def tensor(name: str) -> Any:
    # the whole mapping would count as memory of the process once its pages are read
    return (_loaded(path, mmap=True).state_dict if is_mapped else loaded)[name]

  def fetch(name: str) -> Shaped[np.ndarray, '...']:
    return np.array(_array(tensor(name), f'{path}: {name}'))

  def fetch_first(name: str) -> Shaped[np.ndarray, '...']:
    return np.array(_array(tensor(name), f'{path}: {name}', first=True))

  leaves = {}
  for name, stored in loaded.items():
    if type(name) is not str or not hasattr(stored, 'detach'):
      raise ValueError(f'{path}: {name}: found {type(stored).__name__}, expected a tensor')
    known = _array(stored, f'{path}: {name}', first=True).dtype
    first = fetch_first if stored.ndim else None
    leaves[name] = StoredLeaf(str(path), name, tuple(stored.shape), known, fetch, first)
  return leaves


class _Checkpoint(NamedTuple):
  """What a file holds.

  Attributes:
    state_dict: the file's own, or that inside a training checkpoint.
    optimizers: the states of optimizers beside it, by their keys.
    others: paths of all else beside it that holds tensors.
  """

  state_dict: Mapping[Any, Any]
  optimizers: dict[str, Any]
  others: list[str]


def _loaded(path: Path, mmap: bool = False) -> _Checkpoint:
  torch = extras.require('torch', 'torch', str(path))
  loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
  optimizers: dict[str, Any] = {}
  others: dict[str, Any] = {}
  place = ''
  while isinstance(loaded, Mapping) and (key := _state_dict_key(loaded)) is not None:
    states = _optimizer_states(loaded)
    optimizers |= states
    others |= {
      f'{place}{other}': part
      for other, part in loaded.items()
      if other != key and str(other) not in states and next(_tensors(part), None) is not None
    }
    loaded, place = loaded[key], f'{place}{key}/'
  if not isinstance(loaded, Mapping):
    raise ValueError(f'{path}: found {type(loaded).__name__}, expected a state dict')
  # vectors, also of shape (3, 1, 1), are means of inputs, weights of classes, random states
  is_matrix = lambda part: sum(size > 1 for size in getattr(part, 'shape', ())) > 1
  if matrices := [name for name, part in others.items() if is_matrix(part)]:
    raise ValueError(
      f'{path}: {messages.listed(matrices)}: found weights beside the state dict {place[:-1]}, '
      'expected all weights in one: to read them, torch.save them to a file of their own'
    )
  return _Checkpoint(loaded, optimizers, list(others))


def _warn_of_others(path: Path, checkpoint: _Checkpoint) -> None:
  """Warns of tensors beside the state dict, but for those of optimizers."""
  if checkpoint.others:
    messages.warn(
      f'{path}: {messages.listed(checkpoint.others)}: found tensors beside the state dict, left '
      'out; to compress them, torch.save them to a file of their own'
    )


def _warn_of_optimizers(path: Path, optimizers: Mapping[str, Any]) -> None:
  """Warns of the tensors of optimizers that are not read."""
  for key, state in optimizers.items():
    if size := sum(tensor.nbytes for tensor in _tensors(state)):
      messages.warn(
        f'{path}: {key}: {size:,} bytes of an optimizer are left out; opq compress '
        '--keep-optimizer and read_weights(path, optimizer=True) read them'
      )


def _state_dict_key(loaded: Mapping[str, Any]) -> str | None:
  """Returns the key of a training checkpoint's state dict, None if there is none."""
  keys = (key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping))
  return next(keys, None)


def _optimizer_states(loaded: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the states of optimizers beside a state dict, by their keys."""
  return {
    str(key): part
    for key, part in loaded.items()
    if isinstance(part, Mapping | list | tuple) and is_in_optimizer(str(key))
  }


def _numbers(node: Any, name: str, left: list[str]) -> Any:
  """Returns a tree of arrays alone: numbers become arrays, and lists of numbers one array.

  Args:
    node: a tree of arrays, numbers and anything else.
    name: its path.
    left: takes the paths of anything else, which becomes None.
  """
  is_number = lambda value: isinstance(value, bool | int | float)
  if isinstance(node, dict):
    return {key: _numbers(child, f'{name}/{key}', left) for key, child in node.items()}
  if isinstance(node, list) and not (node and all(map(is_number, node))):
    return [_numbers(child, f'{name}/{i}', left) for i, child in enumerate(node)]
  if node is None or isinstance(node, np.ndarray):
    return node
  if isinstance(node, list) or is_number(node):
    array = np.asarray(node)
    if array.dtype != object:  # of integers that no array holds
      return array
  left.append(name)
  return None


def _tensors(node: Any) -> Iterator[Any]:
  if isinstance(node, Mapping):
    node = list(node.values())
  if isinstance(node, list | tuple):
    for child in node:
      yield from _tensors(child)
  elif hasattr(node, 'untyped_storage'):
    yield node


def _to_numpy(node: Any, place: str) -> Any:
  """Replaces the tensors of a tree by NumPy arrays; other leaves stay.

  Args:
    node: the tree, or a tensor.
    place: the file and the path in it, for errors; ends in a slash below the root.

  Raises:
    ValueError: as `_array`.
  """
  if isinstance(node, Mapping):
    return {key: _to_numpy(child, f'{place}{key}/') for key, child in node.items()}
  if isinstance(node, list | tuple):
    return [_to_numpy(child, f'{place}{i}/') for i, child in enumerate(node)]
  return _array(node, place.removesuffix('/')) if hasattr(node, 'detach') else node


def _array(tensor: Any, place: str, *, first: bool = False) -> Shaped[np.ndarray, '...']:
  """Returns a tensor, or its first row, as an array.

  Raises:
    ValueError: it is sparse, quantized or of a dtype that NumPy and ml_dtypes lack, or claims more
      bytes than the file has.
  """
  try:
    tensor = tensor[:1] if first and tensor.ndim else tensor
    # a stride of 0 makes a tensor of any size from one stored number
    stored = tensor.untyped_storage().nbytes()
    if tensor.nbytes > checks.MAX_INFLATION * stored:
      raise ValueError(
        f'{place}: found {stored} bytes, expected those of shape {tuple(tensor.shape)}'
      )
    tensor = tensor.detach().contiguous()
    dtype = str(tensor.dtype).removeprefix('torch.')
    if not hasattr(ml_dtypes, dtype):
      return tensor.resolve_conj().resolve_neg().numpy()
    # PyTorch converts no dtype that NumPy lacks: the bytes are handed over as integers
    import torch

    known = np.dtype(getattr(ml_dtypes, dtype))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[known.itemsize]
    return tensor.view(integer).numpy().view(known)
  except (RuntimeError, TypeError) as error:
    raise ValueError(
      f'{place}: found a tensor of {tensor.dtype}, {tensor.layout}, expected a dense one of a '
      f'dtype of NumPy or ml_dtypes: {error}'
    ) from error
