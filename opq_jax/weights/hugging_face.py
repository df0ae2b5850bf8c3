"""Opens model folders of Hugging Face: one flat dict of tensors over all files of weights.

The weights of a folder are, the first of these that is there, as in transformers:

    model.safetensors                 one file
    model.safetensors.index.json      shards, and which tensor is in which
    pytorch_model.bin                 a PyTorch state dict; needs PyTorch
    pytorch_model.bin.index.json      shards of it
    the only other .safetensors, .bin, .pt or .pth, or index of such (adapters, diffusers)
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from opq_jax.core import messages
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.weights import checks, safetensors, torch

INDEX = '.index.json'
"""The end of the name of an index of shards."""

MAX_JSON = 1 << 26
"""Bytes of an index or of config.json that are read: an index has some 100 a tensor."""

_PREFERRED = (
  *('model.safetensors', f'model.safetensors{INDEX}'),
  *('pytorch_model.bin', f'pytorch_model.bin{INDEX}'),
)
_WEIGHTS = re.compile(r'.+\.(safetensors|bin|pt|pth)(\.index\.json)?')
# what training leaves beside the weights: no weights of a network
_OF_TRAINING = re.compile(r'(training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+')


class ModelFolder(Mapping[str, Shaped[np.ndarray, '...']]):
  """The tensors of a folder by name, each read from its file when it is asked for.

  Args:
    path: the folder.

  Attributes:
    path: the folder.
    leaves: a `StoredLeaf` for every tensor by name, shard by shard.
    shards: the names of the tensors in every file of weights, by the name of the file.
    index: the name of the index of the shards, None where there is one file without an index.

  Raises:
    ValueError: there are no weights, or more than one set of them; an index or a file of weights is
      damaged; a tensor is in two files, or not in the file that the index names.
    OSError: a file cannot be read.

  Warns:
    UserWarning: the index does not name a tensor of a shard.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = Path(path)
    name = _weights_of(self.path)
    self.index = name if name.endswith(INDEX) else None
    places = None if self.index is None else _weight_map(self.path / name)
    files = [name] if places is None else sorted(set(places.values()))
    self.leaves: dict[str, StoredLeaf] = {}
    self.shards: dict[str, tuple[str, ...]] = {}
    for file in files:
      leaves = _open_shard(self.path / file)
      for tensor in self.leaves.keys() & leaves.keys():
        other = self.leaves[tensor].path
        raise ValueError(f'{self.path / file}: {tensor}: found it in {other} too, expected it once')
      self.leaves |= leaves
      self.shards[file] = tuple(leaves)
    if places is None:
      return
    for tensor, file in places.items():
      if tensor not in self.shards[file]:
        raise ValueError(
          f'{self.path / name}: found {tensor} placed in {file}, expected a tensor that is there'
        )
    if unnamed := [tensor for tensor in self.leaves if tensor not in places]:
      messages.warn(
        f'{self.path / name}: found no place of {messages.listed(unnamed)} of the shards: they are '
        'read as if it had one'
      )

  def __getitem__(self, name: str) -> Shaped[np.ndarray, '...']:
    return self.leaves[name].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self.leaves)

  def __len__(self) -> int:
    return len(self.leaves)

  @cached_property
  def config(self) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ValueError: it is missing, or no JSON of an object.
    """
    path = self.path / 'config.json'
    if not path.is_file():
      raise ValueError(f'{self.path}: found no config.json, expected one')
    return read_object(path)


def open_folder(path: str | os.PathLike[str]) -> ModelFolder:
  """Opens a model folder of Hugging Face and reads no tensor yet.

  Args:
    path: a folder with config.json and weights: model.safetensors, pytorch_model.bin, or shards of
      one with their index.

  Returns:
    A mapping from the names in the files to arrays, in the dtypes of the files, with `config`.

  Raises:
    ValueError, OSError: as `ModelFolder`.

  >>> import pathlib, tempfile, safetensors.numpy
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   safetensors.numpy.save_file({'w': np.eye(3)}, f'{folder}/model.safetensors')
  ...   _ = pathlib.Path(folder, 'config.json').write_text('{"model_type": "llama"}')
  ...   model = open_folder(folder)
  ...   print(model.config, list(model), model['w'].sum())
  {'model_type': 'llama'} ['w'] 3.0
  """
  return ModelFolder(path)


def is_model_folder(path: str | os.PathLike[str]) -> bool:
  """Returns whether a folder holds files of weights, or config.json and no folders."""
  path = Path(path)
  if not path.is_dir():
    return False
  has_folders = any(child.is_dir() for child in path.iterdir())
  return bool(_candidates(path)) or ((path / 'config.json').is_file() and not has_folders)


def read_object(path: Path) -> dict[str, Any]:
  """Returns the JSON object of a file.

  Raises:
    ValueError: the file is larger than `MAX_JSON`, no JSON, or has another value or a key twice.
    OSError: it cannot be read.
  """
  if (size := path.stat().st_size) > MAX_JSON:
    raise ValueError(f'{path}: found {size} bytes, expected JSON of at most {MAX_JSON}')
  try:
    content = json.loads(path.read_bytes(), object_pairs_hook=checks.unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: expected JSON, found this: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path}: found {type(content).__name__}, expected a JSON object')
  return content


def _candidates(path: Path) -> list[str]:
  """Returns the names of the files that may be the weights of a folder."""
  return sorted(
    child.name
    for child in path.iterdir()
    if _WEIGHTS.fullmatch(child.name) and not _OF_TRAINING.fullmatch(child.name) and child.is_file()
  )


def _weights_of(path: Path) -> str:
  """Returns the name of the file of weights, or of the index of shards."""
  found = _candidates(path)
  for name in _PREFERRED:
    if name in found:
      return name
  indices = [name for name in found if name.endswith(INDEX)]
  for names in (indices, [name for name in found if name.endswith('.safetensors')], found):
    if len(names) == 1:
      return names[0]
  raise ValueError(f'{path}: found {found[:10] or "no weights"}, expected one of {[*_PREFERRED]}')


def _weight_map(path: Path) -> dict[str, str]:
  """Returns the file of every tensor by an index.

  Raises:
    ValueError: the file is no index, or names a file that is not in the folder.
  """
  places = read_object(path).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise ValueError(f'{path}: found {str(places)[:80]!r}, expected files by tensor in weight_map')
  suffix = path.name.removesuffix(INDEX).rpartition('.')[2]
  for tensor, file in places.items():
    # a plain name: no index leads out of its folder
    if type(file) is not str or not re.fullmatch(rf'[^/\\:\0]+\.{suffix}', file):
      raise ValueError(
        f'{path}: {tensor}: found file {str(file)[:80]!r}, expected a name in the folder that ends '
        f'in .{suffix}'
      )
    if not (path.parent / file).is_file():
      raise ValueError(f'{path}: {tensor}: found file {file!r}, which is not in the folder')
  return places


def _open_shard(path: Path) -> dict[str, StoredLeaf]:
  if path.suffix == '.safetensors':
    return safetensors.open_leaves(path)
  return checks.guarded(torch.open_leaves, path, torch.EXPECTED)
