"""Reads and writes NumPy archives: a flat dict of arrays by name."""

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import checks


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of an archive; pickled objects are refused.

  Raises:
    ValueError: the file is a single array, an array is of objects, a name occurs twice, or a size
      does not match its shape.
    Exception: whatever NumPy and zipfile raise at damaged bytes.
  """
  # opened here, because np.load leaves a damaged file open
  with open(path, 'rb') as file:
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
      raise ValueError(f'{path}: found a single array, expected an archive of named arrays (.npz)')
    with loaded:
      archive = loaded.zip
      assert archive is not None
      checks.check_zip_members(path, archive)
      checks.unique([(name, None) for name in loaded.files])
      for member in archive.infolist():
        _check_array(path, archive, member)
      return dict(loaded)


def write(path: str | os.PathLike[str], tree: PyTree) -> None:
  """Writes the arrays of a tree by their path names; the file appears whole or not at all.

  Raises:
    ValueError: NumPy cannot read a dtype back, as of bfloat16.
    OSError: the file cannot be written.
  """
  arrays = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}
  for name, array in arrays.items():
    # of NumPy's own: others come back as bytes without a meaning
    if np.dtype(array.dtype.str) != array.dtype:
      raise ValueError(
        f'{path}: {name}: found dtype {array.dtype}, which .npz cannot hold, expected .safetensors'
      )
  with files.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
    # not by np.savez, whose arguments cannot have every name
    for name, array in arrays.items():
      with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _check_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
  """Compares the shape in an array's header with its bytes, before NumPy allocates the shape."""
  with archive.open(member) as file:
    try:
      major, _ = np.lib.format.read_magic(file)
      read_header = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
      )
      shape, _, dtype = read_header(file)
    except ValueError as error:
      raise ValueError(f'{path}: {member.filename}: {error}') from error
    expected = math.prod(shape) * dtype.itemsize
    # the size of pickled objects is unknown; np.load refuses them in its own words
    if (found := member.file_size - file.tell()) != expected and not dtype.hasobject:
      raise ValueError(
        f'{path}: {member.filename}: found {found} bytes, expected {expected} of shape {shape}'
      )
