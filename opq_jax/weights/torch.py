"""Reads PyTorch state dicts; needs PyTorch.  Pickled code is refused (`weights_only=True`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opq_jax.allocation.optimizer_states import is_in_optimizer
from opq_jax.core import extras, messages
from opq_jax.weights import checks

# keys under which training checkpoints keep the weights, beside epochs and optimizers
_STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict')


def read(path: Path) -> Any:
  """Returns the tensors of a state dict, or of the state dict inside a training checkpoint.

  Warns:
    UserWarning: a training checkpoint has the state of an optimizer, which is not read.

  Raises:
    ValueError: PyTorch is missing, there is no state dict, or a tensor claims more bytes than the
      file has.
    Exception: whatever PyTorch raises at damaged bytes and at pickled code.
  """
  torch = extras.require('torch', 'torch', str(path))
  loaded = torch.load(path, map_location='cpu', weights_only=True)
  while isinstance(loaded, Mapping) and (key := _state_dict_key(loaded)) is not None:
    _note_optimizers(path, loaded)
    loaded = loaded[key]
  if not isinstance(loaded, Mapping):
    raise ValueError(f'{path}: found {type(loaded).__name__}, expected a state dict')
  return _to_numpy(loaded)


def _state_dict_key(loaded: Mapping[str, Any]) -> str | None:
  """Returns the key of a training checkpoint's state dict, None if there is none."""
  keys = (key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping))
  return next(keys, None)


def _note_optimizers(path: Path, loaded: Mapping[str, Any]) -> None:
  """Warns of the tensors of optimizers beside a state dict: they are not read."""
  for key, part in loaded.items():
    if isinstance(part, Mapping) and is_in_optimizer(str(key)):
      size = sum(tensor.nbytes for tensor in _tensors(part))
      if size:
        messages.warn(f'{path}: {key}: {size:,} bytes of an optimizer are left out')


def _tensors(node: Any) -> Iterator[Any]:
  if isinstance(node, Mapping):
    node = list(node.values())
  if isinstance(node, list | tuple):
    for child in node:
      yield from _tensors(child)
  elif hasattr(node, 'untyped_storage'):
    yield node


def _to_numpy(node: Any) -> Any:
  """Replaces the tensors of a tree by NumPy arrays; other leaves stay."""
  if isinstance(node, Mapping):
    return {key: _to_numpy(child) for key, child in node.items()}
  if isinstance(node, list | tuple):
    return [_to_numpy(child) for child in node]
  if not hasattr(node, 'detach'):
    return node
  # a stride of 0 makes a tensor of any size from one stored number
  stored = node.untyped_storage().nbytes()
  if node.nbytes > checks.MAX_INFLATION * stored:
    raise ValueError(f'found {stored} bytes, expected those of shape {tuple(node.shape)}')
  tensor = node.detach().contiguous()
  name = str(tensor.dtype).removeprefix('torch.')
  if not hasattr(ml_dtypes, name):
    return tensor.numpy()
  # PyTorch converts no dtype that NumPy lacks: the bytes are handed over as integers
  import torch

  dtype = np.dtype(getattr(ml_dtypes, name))
  integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
  return tensor.view(integer).numpy().view(dtype)
