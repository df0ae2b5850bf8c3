"""Weights in files of Keras, read without Keras or TensorFlow; needs h5py.

    .h5           of Keras 1 and 2, and of the applications that Keras downloads: a group per layer,
                  whose weights have names
    .weights.h5   of Keras 3: a group per layer by its class and number, layers/conv2d_3/vars/0;
                  since Keras 3.6 the group knows the layer's name
    .keras        a zip of the latter and of config.json, which lists the layers by name

All become `<layer>/<weight>`: conv1/kernel, conv1_bn/moving_mean.  Nothing in a file is executed
or unpickled, and nothing outside of it is opened: HDF5 can link to other files, which is refused.
"""

import collections
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_WEIGHTS = 'model.weights.h5'  # the member of a .keras file
_KINDS: dict[str, tuple[str, ...]] = {
  'conv2d': ('kernel', 'bias'),
  'depthwise_conv2d': ('kernel', 'bias'),
  'dense': ('kernel', 'bias'),
  'batch_normalization': ('gamma', 'beta', 'moving_mean', 'moving_variance'),
}
"""Names of the weights of a layer that Keras 3 numbers, by the layer's class."""

_CLASSES = {
  'Conv2D': 'conv2d',
  'DepthwiseConv2D': 'depthwise_conv2d',
  'Dense': 'dense',
  'BatchNormalization': 'batch_normalization',
}
_NOT_WEIGHTS = ('optimizer', 'optimizer_weights')
MOST = 1032  # bytes that deflate can make of one: what claims more has nothing stored


def read(path: Path) -> dict[str, np.ndarray]:
  """The weights of a file by `<layer>/<weight>`.

  Raises:
    ValueError: h5py is missing; there are links, or data outside of the file or not in it; layers
      have no name; or two weights have the same.
    Exception: what h5py and zipfile raise at damaged bytes.
  """
  try:
    import h5py
  except ImportError as error:
    raise ValueError(
      f'{path}: found a file of Keras and no h5py, expected it: pip install opq_jax[keras]'
    ) from error
  opened: Any = path
  named: dict[str, str] = {}
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      if _WEIGHTS not in archive.namelist():
        raise ValueError(f'{path}: found {archive.namelist()[:5]}, expected {_WEIGHTS} among them')
      check_members(path, archive)
      opened = io.BytesIO(archive.read(_WEIGHTS))
      named = layer_names(json.loads(archive.read('config.json')))
  tensors: dict[str, np.ndarray] = {}
  try:
    with h5py.File(opened, 'r') as file:
      root = _child(file, 'model_weights') if 'model_weights' in file else file
      is_numbered = 'layer_names' not in root.attrs and 'layers' in root
      for name, array in _numbered(root, named) if is_numbered else _named(root):
        if name in tensors:
          raise ValueError(f'{path}: {name}: found two weights of this name, expected one')
        tensors[name] = array
  except OSError as error:
    # h5py's word for damaged bytes, which the system knows nothing of
    if error.errno is None:
      raise ValueError(str(error)) from error
    raise
  return tensors


def check_members(path: Path, archive: zipfile.ZipFile) -> None:
  """Nothing in an archive is there twice, or makes more of its bytes than deflate can.

  bzip2, which a zip may use as well, makes a gigabyte of one thousand bytes.

  Raises:
    ValueError: something is, or does.
  """
  names: set[str] = set()
  for member in archive.infolist():
    if member.filename in names:
      raise ValueError(f'{path}: {member.filename}: found two members of this name, expected one')
    names.add(member.filename)
    if member.file_size > MOST * member.compress_size:
      raise ValueError(
        f'{path}: {member.filename}: found {member.compress_size} bytes that claim to be '
        f'{member.file_size}, expected at most {MOST} times as many'
      )
  stored = sum(member.compress_size for member in archive.infolist())
  if stored > (size := path.stat().st_size):
    raise ValueError(f'{path}: found members of {stored} bytes in a file of {size}')


def layer_names(config: dict[str, Any]) -> dict[str, str]:
  """The names of a model's layers by what Keras 3 calls their groups: their class and number.

  >>> layers = [{'class_name': 'Conv2D', 'config': {'name': name}} for name in ('stem', 'last')]
  >>> layer_names({'class_name': 'Functional', 'config': {'layers': layers}})
  {'conv2d': 'stem', 'conv2d_1': 'last'}
  """
  count: collections.Counter[str] = collections.Counter()
  names = {}
  for layer in config['config']['layers']:
    group = _CLASSES.get(layer['class_name'])
    if group is not None:
      number = count[group]
      names[f'{group}_{number}' if number else group] = layer['config']['name']
      count[group] += 1
  return names


def _named(root: Any) -> Iterator[tuple[str, np.ndarray]]:
  """Of Keras 1 and 2: <layer>/<any scope>/<weight>:0."""
  for layer in root:
    if layer not in _NOT_WEIGHTS:
      for path, dataset in _datasets(_child(root, layer)):
        weight = path[-1].removesuffix(':0').removeprefix('depthwise_')
        yield f'{layer}/{weight}', dataset


def _numbered(root: Any, named: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
  """Of Keras 3: layers/<class>_<number>/vars/<number>."""
  layers = _child(root, 'layers')
  for group in layers:
    layer = _child(layers, group)
    variables: Any = _child(layer, 'vars') if 'vars' in layer else {}
    if not len(variables):
      if any(_datasets(layer)):
        raise ValueError(f'{group}: found a layer of layers, expected a flat model')
      continue
    name = variables.attrs.get('name', named.get(group))
    if not isinstance(name, str):
      raise ValueError(
        f'{group}: found no name of the layer, expected one: save as .keras, or with Keras 3.6'
      )
    kinds = _KINDS.get(re.sub(r'_\d+$', '', group), ())
    # without a scale or a center, BatchNorm numbers its weights otherwise
    is_known = 'kernel' in kinds or len(kinds) == len(variables)
    for (number,), array in _datasets(variables):
      is_kind = is_known and number.isdecimal() and int(number) < len(kinds)
      yield f'{name}/{kinds[int(number)] if is_kind else number}', array


def _datasets(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """All arrays below a group."""
  for name in group:
    child = _child(group, name)
    if hasattr(child, 'keys'):
      yield from _datasets(child, (*path, name))
      continue
    if child.external or child.is_virtual:
      raise ValueError(f'{child.name}: found data in another file, expected them in this one')
    if child.nbytes > MOST * child.id.get_storage_size():
      raise ValueError(
        f'{child.name}: found {child.id.get_storage_size()} bytes, expected those of {child.shape}'
      )
    yield (*path, name), child[()]


def _child(group: Any, name: str) -> Any:
  """What lies in a group itself."""
  link = type(group.get(name, getlink=True)).__name__
  if link != 'HardLink':
    raise ValueError(f'{group.name}/{name}: found a {link}, expected no links')
  return group[name]
