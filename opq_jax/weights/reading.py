"""Reads weights in files of any known format into trees of host arrays.

    .safetensors      a flat dict by name
    .npz              a flat dict by name
    .msgpack          Flax's `serialization.to_bytes`: nested dicts
    a folder          of Hugging Face, a flat dict by name (`open_folder`); an Orbax checkpoint, or
                      the latest step of a CheckpointManager
    .opq              the decoded network
    .pt, .pth, .bin, .ckpt, .th
                      a PyTorch state dict, or a training checkpoint that holds one; needs PyTorch
                      (`pip install opq_jax[torch]`)
    .gguf             tensors of llama.cpp by name, dequantized, those of a language model as
                      transformers has them; needs gguf (`pip install opq_jax[gguf]`)
    .onnx             initializers by name; needs onnx (`pip install opq_jax[onnx]`)
    .mlpackage        constants of a Core ML package by name; needs coremltools
                      (`pip install opq_jax[coreml]`)
    .h5, .hdf5, .keras
                      a Keras file, by `<layer>/<weight>`; needs h5py (`pip install opq_jax[keras]`)

Nothing in a file is executed: NumPy's pickles are refused, and PyTorch's are read by its
`weights_only` unpickler.  A name that occurs twice is an error, and so is an array that claims more
bytes than the file can hold: the memory that a file takes is bounded by its own size.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opq_jax.core import files, messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.weights import (
  checks,
  core_ml,
  gguf,
  hugging_face,
  keras,
  msgpack,
  npz,
  onnx,
  orbax,
  safetensors,
  torch,
)


def read_weights(path: str | os.PathLike[str], *, optimizer: bool = False) -> PyTree:
  """Returns the weights of a file as a tree of host arrays, bit for bit.

  Args:
    path: a file with one of the suffixes above, or a folder.
    optimizer: whether to read the state of an optimizer in a training checkpoint of PyTorch, which
      is left out otherwise, with a warning.  It stands under its own key beside the weights,
      `optimizer/state/0/exp_avg`, ...; numbers and lists of numbers are arrays in it.  Of Keras it
      is always left out, with a warning; files of other formats are trees, and are read whole.

  Returns:
    A tree of NumPy arrays (bfloat16 and the like as `ml_dtypes`): a flat dict if the format is one
    of names, nested dicts if it is one of trees.  None stands in the place of strings and other
    objects, which are no weights.

  Warns:
    UserWarning: leaves that are no arrays of numbers, by name; an optimizer, or tensors beside the
      state dict of a training checkpoint, that are left out.

  Raises:
    ValueError: the format is unknown, or the file is damaged; the message names the file.
    OSError: the file cannot be read.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   np.savez(f'{folder}/net.npz', kernel=np.ones((3, 2), np.float32))
  ...   tree = read_weights(f'{folder}/net.npz')
  >>> tree['kernel'].shape
  (3, 2)
  """
  path = Path(path)
  files.check_readable(path)
  if hugging_face.is_model_folder(path):
    return _checked(path, dict(hugging_face.open_folder(path)))
  if core_ml.is_core_ml(path):
    return _checked(path, core_ml.read(path))
  if path.is_dir():
    return _checked(path, checks.guarded(_read_orbax, path, 'an Orbax checkpoint'))
  if path.name.endswith(hugging_face.INDEX):
    raise ValueError(f'{path}: found the index of shards, expected their folder, {path.parent}')
  if path.suffix.lower() not in _READERS:
    known = ', '.join(_READERS)
    raise ValueError(f'{path}: found suffix {path.suffix!r}, expected {known}, or a folder')
  read, expected = _READERS[path.suffix.lower()]
  if optimizer and read is torch.read:
    read = functools.partial(torch.read, optimizer=True)
  return _checked(path, checks.guarded(read, path, expected))


def _checked(path: Path, tree: PyTree) -> PyTree:
  """Returns the tree with every leaf a host array of numbers, and None in the place of others."""
  leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}
  others = [name for name, leaf in leaves.items() if not checks.is_of_numbers(leaf.dtype)]
  if len(others) == len(leaves):
    raise ValueError(f'{path}: found no weights, expected at least one')
  if path.suffix.lower() not in _CHECKSUMMED:
    for name in others:
      # a damaged array may have become bytes, but hardly a text
      if leaves[name].dtype.kind != 'U':
        checks.dtype_of_numbers(path, name, leaves[name])
  if others:
    kinds = ', '.join(sorted({leaves[name].dtype.name for name in others}))
    messages.warn(
      f'{path}: {messages.listed(others)}: found {kinds}, expected arrays of numbers: left out'
    )
  return trees.replaced(tree, {**leaves, **dict.fromkeys(others)})


def _read_opq(path: Path) -> PyTree:
  with OpqFile(path) as file:
    return file.params()


def _read_orbax(path: Path) -> PyTree:
  folder = orbax.OrbaxFolder(path)
  for name, leaf in trees.named_leaves(folder.tree).items():
    checks.dtype_of_numbers(path, name, leaf)
  return folder.read()


# archives whose members have checksums
_CHECKSUMMED = '.npz', '.pt', '.pth', '.bin', '.ckpt', '.th'

_READERS: dict[str, tuple[Callable[[Path], PyTree], str]] = {
  '.safetensors': (safetensors.read, 'a safetensors file'),
  '.npz': (npz.read, 'a NumPy archive without pickles'),
  '.msgpack': (msgpack.read, "Flax's msgpack"),
  '.opq': (_read_opq, 'an .opq file'),
  '.pt': (torch.read, torch.EXPECTED),
  '.pth': (torch.read, torch.EXPECTED),
  '.bin': (torch.read, torch.EXPECTED),
  '.ckpt': (torch.read, torch.EXPECTED),
  '.th': (torch.read, torch.EXPECTED),
  '.gguf': (gguf.read, 'a GGUF file'),
  '.onnx': (onnx.read, onnx.EXPECTED),
  '.h5': (keras.read, 'an HDF5 file of Keras'),
  '.hdf5': (keras.read, 'an HDF5 file of Keras'),
  '.keras': (keras.read, 'a Keras file'),
}
