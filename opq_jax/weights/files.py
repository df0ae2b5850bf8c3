"""Weights as they lie about on disk, read into trees of host arrays; and written as safetensors.

    .safetensors   a flat dict by name
    .npz           a flat dict by name
    .msgpack       Flax's `serialization.to_bytes`
    a folder       an Orbax checkpoint, or a CheckpointManager's folder: its latest step
    .opq           the decoded network
    .pt, .pth      a PyTorch state dict; needs torch (`pip install opq_jax[torch]`)
    .h5, .keras    of Keras, by `<layer>/<weight>`; needs h5py (`pip install opq_jax[keras]`)

Nothing in a file is ever executed: NumPy's pickles are refused, and PyTorch's are read by its
`weights_only` unpickler.  A name that occurs twice is an error, and so are arrays that claim more
than their bytes can hold: what a file takes in memory is bounded by its own size.
"""

import errno
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.file import artifact
from opq_jax.weights import keras as keras_files
from opq_jax.weights import orbax as orbax_files

# as safetensors calls them
_FLOAT8 = {
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'F8_E8M0': ml_dtypes.float8_e8m0fnu,
}

ChannelMode = Literal['auto', 'first', 'last']

_STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict')


def read_weights(path: str | os.PathLike[str]) -> PyTree:
  """The tree of weights in a file, as host arrays, bit for bit.

  Args:
    path: a file with one of the suffixes above, or a folder of Orbax.

  Returns:
    A tree of NumPy arrays (bfloat16 and its like as `ml_dtypes`): a flat dict where the format
    has names only, nested dicts where it has a tree.

  Raises:
    ValueError: the format is not known, or the file is not a whole one of that format.  The
      message names the file.
    OSError: it cannot be read.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   np.savez(f'{folder}/net.npz', kernel=np.ones((3, 2), np.float32))
  ...   tree = read_weights(f'{folder}/net.npz')
  >>> tree['kernel'].shape
  (3, 2)
  """
  path = Path(path)
  if path.is_dir():
    return _checked(path, guarded(_read_orbax, path, 'an Orbax checkpoint'))
  reader = _READERS.get(path.suffix.lower())
  if reader is None:
    known = ', '.join(_READERS)
    raise ValueError(
      f'{path}: found suffix {path.suffix!r}, expected {known}, or a folder of Orbax'
    )
  read, what = reader
  return _checked(path, guarded(read, path, what))


def write_safetensors(path: str | os.PathLike[str], tree: PyTree) -> None:
  """Writes a tree as safetensors: names joined by '/', so a flat dict keeps its own exactly.

  The file appears whole or not at all: it is written beside its place and moved there.

  Args:
    path: where to.
    tree: any pytree of arrays.

  Raises:
    ValueError: two leaves have one name, or a leaf has a name or a dtype that safetensors has not.
  """
  arrays = {}
  for name, leaf in trees.named_leaves(tree).items():
    if name == '__metadata__':
      raise ValueError(f'{path}: {name}: found a name that safetensors keeps for itself')
    array = np.asarray(leaf)
    try:
      safetensors.numpy.save({'probe': np.zeros(0, array.dtype)})
    except Exception as error:  # what it raises depends on the dtype
      raise ValueError(
        f'{path}: {name}: found dtype {array.dtype}, expected one that safetensors can hold'
      ) from error
    # safetensors takes the memory as it lies, whatever the strides say
    arrays[name] = array.copy(order='C') if not array.flags.c_contiguous else array
  files.write_bytes(path, safetensors.numpy.save(arrays))


def channel_axis(path: str, leaf: Any, mode: ChannelMode = 'auto') -> int:
  """The axis of a leaf's output channels, for `opq_jax.allocate`.

  JAX, Keras and TensorFlow put the output channel last.  PyTorch and Equinox call their leaves
  `weight` and put it first, except in embedding tables [vocabulary, dim], whose output is the
  last axis.  TensorFlow's depthwise kernels [height, width, channels, 1] have it before a last
  axis of 1.

  A name does not say that a PyTorch layer is transposed (ConvTranspose, the Conv1D of GPT-2); for
  those give 'last'.

  Args:
    path: the leaf's name.
    leaf: anything with a shape.
    mode: 'auto' goes by the name; 'first' and 'last' hold for every leaf.

  Returns:
    0, -1 or -2.

  Raises:
    ValueError: `mode` is none of these.

  >>> kernel, table = np.zeros((16, 3, 3, 3)), np.zeros((1000, 64))
  >>> channel_axis('conv1.weight', kernel), channel_axis('params/conv/kernel', kernel)
  (0, -1)
  >>> channel_axis('embed_tokens.weight', table), channel_axis('classifier.weight', table)
  (-1, 0)
  """
  if mode not in ('auto', 'first', 'last'):
    raise ValueError(f'{path}: found mode {mode!r}, expected auto, first or last')
  if mode != 'auto':
    return 0 if mode == 'first' else -1
  *modules, name = re.split(r'[./]', path)
  module, shape = modules[-1].lower() if modules else '', np.shape(leaf)
  if name.endswith('weight'):
    is_table = len(shape) == 2 and ('emb' in module or module in ('wte', 'wpe'))
    return -1 if is_table else 0
  if 'depthwise' in name and len(shape) == 4 and shape[-1] == 1:
    return -2
  return -1


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
  """The dict of pairs, for parsers that would keep one of two values of a name in silence.

  Raises:
    ValueError: a name occurs twice, or is no string.

  >>> unique([('a', 1), ('b', 2)])
  {'a': 1, 'b': 2}
  """
  found: dict[Any, Any] = {}
  for key, value in pairs:
    if type(key) is not str:
      raise ValueError(f'found {key!r}, expected a string for a name')
    if key in found:
      raise ValueError(f'{key}: found two of this name, expected one')
    found[key] = value
  return found


def guarded(read: Callable[[Path], Any], path: Path, what: str) -> Any:
  """What `read` makes of a file that ought to be `what`.

  Raises:
    ValueError: it is not; or what `read` itself says of this file.
    OSError: it cannot be read.
  """
  try:
    return read(path)
  # what five libraries raise at damaged bytes is no closed list (BadZipFile, OutOfData, TypeError)
  except Exception as error:
    # a damaged offset leads to a place that no file has, which the system calls an invalid argument
    is_damage = type(error) is OSError and error.errno in (None, errno.EINVAL)
    if isinstance(error, OSError) and not is_damage:
      raise
    if isinstance(error, ValueError) and str(error).startswith(str(path)):
      raise
    # PyTorch goes on for a page, with advice on how to execute what is in the file
    reason = str(error).split('\n')[0].split('. ')[0] or type(error).__name__
    raise ValueError(f'{path}: expected {what}, found this: {reason}') from error


def dtype_of_numbers(path: Path, name: str, leaf: Any) -> np.dtype:
  """The dtype of an array, or of what stands for one.

  Raises:
    ValueError: it has none, or one of something else than numbers.
  """
  dtype = np.dtype(getattr(leaf, 'dtype', None) or object)
  # numpy's kinds of numbers; ml_dtypes are of kind V, as are structs, which have no finfo
  if dtype.kind not in 'biufc' and not _is_extended(dtype):
    raise ValueError(
      f'{path}: {name}: found {type(leaf).__name__} of dtype {dtype}, expected an array of numbers'
    )
  return dtype


def _checked(path: Path, tree: PyTree) -> PyTree:
  """The tree with every leaf a host array of numbers."""
  leaves = trees.named_leaves(tree)
  if not leaves:
    raise ValueError(f'{path}: found no weights, expected at least one')
  arrays = []
  for name, leaf in leaves.items():
    array = np.asarray(leaf)
    dtype_of_numbers(path, name, array)
    arrays.append(array)
  return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def _is_extended(dtype: np.dtype) -> bool:
  return hasattr(ml_dtypes, dtype.name) and np.dtype(getattr(ml_dtypes, dtype.name)) == dtype


def _read_safetensors(path: Path) -> PyTree:
  # opened first, since safetensors would say of a file that may not be read that there is none
  with open(path, 'rb') as raw, safetensors.safe_open(path, 'np') as file:
    # of a name that occurs twice it would keep one
    text = raw.read(int.from_bytes(raw.read(8), 'little'))
    json.loads(text, object_pairs_hook=unique)
    if (file.metadata() or {}).get('format') == 'opq':
      return _read_opq(path)
    return {name: read_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118


def tensor_dtype(file: Any, name: str) -> np.dtype | None:
  """The dtype of a tensor of an open safetensors file, where it is one that numpy has not."""
  scalar = _FLOAT8.get(file.get_slice(name).get_dtype())
  return None if scalar is None else np.dtype(scalar)


def read_tensor(path: str | os.PathLike[str], file: Any, name: str) -> Shaped[np.ndarray, '...']:
  """A tensor of an open safetensors file, which itself reads none of float8 into numpy."""
  dtype = tensor_dtype(file, name)
  if dtype is None:
    return file.get_tensor(name)
  with open(path, 'rb') as raw:
    size = int.from_bytes(raw.read(8), 'little')
    begin, end = json.loads(raw.read(size))[name]['data_offsets']
    raw.seek(8 + size + begin)
    data = raw.read(end - begin)
  return np.frombuffer(data, dtype).reshape(file.get_slice(name).get_shape())


def _read_npz(path: Path) -> PyTree:
  # opened here, because np.load leaves a damaged file open
  with open(path, 'rb') as file:
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
      raise ValueError(f'{path}: found a single array, expected an archive of named arrays (.npz)')
    with loaded:
      archive = loaded.zip
      assert archive is not None
      keras_files.check_members(path, archive)
      unique([(name, None) for name in loaded.files])
      for member in archive.infolist():
        _check_array(path, archive, member)
      return dict(loaded)


def _check_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
  """The header of an array speaks of the bytes that are there, before NumPy allocates for it."""
  with archive.open(member) as file:
    try:
      major, _ = np.lib.format.read_magic(file)
      read = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
      )
      shape, _, dtype = read(file)
    except ValueError as error:
      raise ValueError(f'{path}: {member.filename}: {error}') from error
    expected = math.prod(shape) * dtype.itemsize
    # of objects the size says nothing; np.load refuses them in words of its own
    if (found := member.file_size - file.tell()) != expected and not dtype.hasobject:
      raise ValueError(
        f'{path}: {member.filename}: found {found} bytes, expected {expected} of shape {shape}'
      )


def _read_msgpack(path: Path) -> PyTree:
  data = path.read_bytes()
  # of a name that occurs twice Flax would keep one
  msgpack.unpackb(data, object_pairs_hook=unique, ext_hook=lambda *_: None, raw=False)
  tree = flax.serialization.msgpack_restore(data)
  if not isinstance(tree, dict):
    raise ValueError(f'{path}: found {type(tree).__name__}, expected a tree of arrays')
  return tree


def _read_opq(path: Path) -> PyTree:
  return artifact.load(path)[0]


def _read_orbax(path: Path) -> PyTree:
  folder = orbax_files.OrbaxFolder(path)
  for name, leaf in trees.named_leaves(folder.tree).items():
    dtype_of_numbers(path, name, leaf)
  return folder.read()


def _read_torch(path: Path) -> PyTree:
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f'{path}: found a PyTorch file and no PyTorch, expected it: pip install opq_jax[torch]'
    ) from error
  loaded = torch.load(path, map_location='cpu', weights_only=True)
  while isinstance(loaded, Mapping) and (key := _inner_key(loaded)) is not None:
    loaded = loaded[key]
  if not isinstance(loaded, Mapping):
    raise ValueError(f'{path}: found {type(loaded).__name__}, expected a state dict')
  return _from_torch(loaded)


def _inner_key(loaded: Mapping[str, Any]) -> str | None:
  """Under which key a training checkpoint keeps its weights, beside epochs and optimizers."""
  keys = (key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping))
  return next(keys, None)


def _from_torch(node: Any) -> Any:
  if isinstance(node, Mapping):
    return {key: _from_torch(child) for key, child in node.items()}
  if isinstance(node, list | tuple):
    return [_from_torch(child) for child in node]
  if not hasattr(node, 'detach'):
    return node
  # a stride of 0 makes any size of one stored number
  stored = node.untyped_storage().nbytes()
  if node.nbytes > keras_files.MOST * stored:
    raise ValueError(f'found {stored} bytes, expected those of shape {tuple(node.shape)}')
  tensor = node.detach().contiguous()
  name = str(tensor.dtype).removeprefix('torch.')
  if not hasattr(ml_dtypes, name):
    return tensor.numpy()
  # numpy has no such dtype, so PyTorch hands over the bytes
  import torch

  dtype = np.dtype(getattr(ml_dtypes, name))
  integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
  return tensor.view(integer).numpy().view(dtype)


_READERS: dict[str, tuple[Callable[[Path], PyTree], str]] = {
  '.safetensors': (_read_safetensors, 'a safetensors file'),
  '.npz': (_read_npz, 'a NumPy archive without pickles'),
  '.msgpack': (_read_msgpack, "Flax's msgpack"),
  '.opq': (_read_opq, 'an .opq file'),
  '.pt': (_read_torch, 'a PyTorch state dict that loads with weights_only=True'),
  '.pth': (_read_torch, 'a PyTorch state dict that loads with weights_only=True'),
  '.h5': (keras_files.read, 'an HDF5 file of Keras'),
  '.keras': (keras_files.read, 'a Keras file'),
}
