"""Reads Keras files without Keras or TensorFlow; needs h5py.

    .h5           Keras 1 and 2, and the files that `keras.applications` downloads: a group a layer,
                  with named weights
    .weights.h5   Keras 3: a group a layer, named by its class and number (layers/conv2d_3/vars/0);
                  since Keras 3.6 the group stores the layer's name
    .keras        a zip of a .weights.h5 file and of config.json, which lists the layers by name

Every weight is returned as `<layer>/<weight>`: conv1/kernel, conv1_bn/moving_mean.  Nothing in a
file is executed or unpickled.  HDF5 can link to other files; links are refused.
"""

import collections
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opq_jax.core import extras, messages
from opq_jax.weights import checks

_WEIGHTS = 'model.weights.h5'  # member of a .keras file
_KINDS: dict[str, tuple[str, ...]] = {
  'conv2d': ('kernel', 'bias'),
  'depthwise_conv2d': ('kernel', 'bias'),
  'dense': ('kernel', 'bias'),
  'batch_normalization': ('gamma', 'beta', 'moving_mean', 'moving_variance'),
}
"""Names of the numbered weights of a Keras 3 layer, by the layer's class."""

_CLASSES = {
  'Conv2D': 'conv2d',
  'DepthwiseConv2D': 'depthwise_conv2d',
  'Dense': 'dense',
  'BatchNormalization': 'batch_normalization',
}
_NOT_WEIGHTS = ('optimizer', 'optimizer_weights')


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the weights of a file by `<layer>/<weight>`.

  Warns:
    UserWarning: the state of an optimizer is left out.

  Raises:
    ValueError: h5py is missing; there is a link, data in another file, or an array without stored
      bytes; a layer has no name; weights of Keras 3 are in no layer; or two weights have the same
      name.
    Exception: whatever h5py and zipfile raise at damaged bytes.
  """
  h5py = extras.require('h5py', 'keras', str(path))
  hdf5: Any = path
  names: dict[str, str] = {}
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      if _WEIGHTS not in archive.namelist():
        raise ValueError(f'{path}: found {archive.namelist()[:5]}, expected {_WEIGHTS} among them')
      checks.check_zip_members(path, archive)
      hdf5 = io.BytesIO(archive.read(_WEIGHTS))
      names = layer_names(json.loads(archive.read('config.json')))
  tensors: dict[str, np.ndarray] = {}
  try:
    with h5py.File(hdf5, 'r') as file:
      root = _child(file, 'model_weights') if 'model_weights' in file else file
      is_numbered = 'layer_names' not in root.attrs and 'layers' in root
      _check_others(path, {file.name: file, root.name: root}.values(), is_numbered)
      for name, array in _numbered(root, names) if is_numbered else _named(root):
        if name in tensors:
          raise ValueError(f'{path}: {name}: found two weights of this name, expected one')
        tensors[name] = array
  except OSError as error:
    # h5py raises an OSError without a system error for damaged bytes
    if error.errno is None:
      raise ValueError(str(error)) from error
    raise
  return tensors


def layer_names(config: dict[str, Any]) -> dict[str, str]:
  """Returns the layer name of each group of a Keras 3 file; groups are named by class and number.

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


def _check_others(path: Path, groups: Iterable[Any], is_numbered: bool) -> None:
  """Warns of the state of an optimizer; weights of Keras 3 that no layer has raise a ValueError."""
  for group in groups:
    for name in group:
      is_other = name in _NOT_WEIGHTS or (is_numbered and name != 'layers')
      if not is_other or not any(_datasets(_child(group, name))):
        continue
      if name in _NOT_WEIGHTS:
        messages.warn(f'{path}: {name}: the state of an optimizer is left out')
      else:
        raise ValueError(f'{name}: found weights beside layers, expected all of them in layers')


def _named(root: Any) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the weights of Keras 1 and 2: <layer>/<any scope>/<weight>:0."""
  for layer in root:
    if layer not in _NOT_WEIGHTS:
      for path, dataset in _datasets(_child(root, layer)):
        weight = path[-1].removesuffix(':0').removeprefix('depthwise_')
        yield f'{layer}/{weight}', dataset


def _numbered(root: Any, names: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the weights of Keras 3: layers/<class>_<number>/vars/<number>."""
  layers = _child(root, 'layers')
  for group in layers:
    layer = _child(layers, group)
    variables: Any = _child(layer, 'vars') if 'vars' in layer else {}
    if not len(variables):
      if any(_datasets(layer)):
        raise ValueError(f'{group}: found a layer of layers, expected a flat model')
      continue
    name = variables.attrs.get('name', names.get(group))
    if not isinstance(name, str):
      raise ValueError(
        f'{group}: found no name of the layer, expected one: save as .keras, or with Keras 3.6'
      )
    kinds = _KINDS.get(re.sub(r'_\d+$', '', group), ())
    # a BatchNorm without scale or center numbers its weights differently
    is_known = 'kernel' in kinds or len(kinds) == len(variables)
    for (number,), array in _datasets(variables):
      is_kind = is_known and number.isdecimal() and int(number) < len(kinds)
      yield f'{name}/{kinds[int(number)] if is_kind else number}', array


def _datasets(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields the path and the array of every dataset below a group."""
  for name in group:
    child = _child(group, name)
    if hasattr(child, 'keys'):
      yield from _datasets(child, (*path, name))
      continue
    if child.external or child.is_virtual:
      raise ValueError(f'{child.name}: found data in another file, expected them in this one')
    if child.nbytes > checks.MAX_INFLATION * child.id.get_storage_size():
      raise ValueError(
        f'{child.name}: found {child.id.get_storage_size()} bytes, expected those of {child.shape}'
      )
    yield (*path, name), child[()]


def _child(group: Any, name: str) -> Any:
  """Returns a member of a group; a link raises a ValueError."""
  link = type(group.get(name, getlink=True)).__name__
  if link != 'HardLink':
    raise ValueError(f'{group.name}/{name}: found a {link}, expected no links')
  return group[name]
