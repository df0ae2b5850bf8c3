"""Opens Core ML packages (.mlpackage) of ML programs: their constants, a flat dict by name.

Needs the package coremltools, for the classes of the format; nothing is compiled, so any system
will do.  Constants whose numbers stand in the files of weights have their own names, those of
nested blocks and of several functions too; scalars, shapes and names are parts of the program.
`opq_jax.weights.core_ml_uses` tells what the program does with a constant.
"""

import json
import logging
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from opq_jax.core import extras, messages
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.weights import blob_files, checks

EXPECTED = 'a Core ML package of an ML program'
MANIFEST = 'Manifest.json'
"""The file that names that of the program."""
_ROOT = '@model_path/'  # of names of files in a program

DTYPES: dict[str, np.dtype] = {
  'FLOAT16': np.dtype('<f2'),
  'FLOAT32': np.dtype('<f4'),
  'UINT8': np.dtype('u1'),
  'INT8': np.dtype('i1'),
  'INT16': np.dtype('<i2'),
  'UINT16': np.dtype('<u2'),
  'INT32': np.dtype('<i4'),
  'UINT32': np.dtype('<u4'),
}
"""The dtype of constants, by the name that a program has for their type."""


class Package(NamedTuple):
  """A package that was opened.

  Attributes:
    path: of the folder.
    program_path: of the file of its program.
    model: the program, a `Model` of coremltools.proto.
  """

  path: Path
  program_path: Path
  model: Any

  def weights_path(self, name: str) -> Path:
    """Returns the file that a program calls by this name.

    Raises:
      ValueError: it lies outside of the package.
    """
    inner = name.removeprefix(_ROOT)
    if not name.startswith(_ROOT) or not _is_within(inner):
      raise ValueError(f'{self.path}: found weights in {name!r}, expected a file of the package')
    return self.program_path.parent / inner

  def check_others(self, known: Collection[Path]) -> None:
    """Checks that all but the files of these paths are plain files and folders, to be copied.

    A link may lead to any file of this machine, and a folder that holds itself has no end.

    Raises:
      ValueError: one is a link, a device or a FIFO.
    """
    for path in sorted(self.path.rglob('*')):
      if path not in known and (path.is_symlink() or not (path.is_dir() or path.is_file())):
        kind = 'a link' if path.is_symlink() else 'no file'
        raise ValueError(f'{path}: found {kind}, expected a file or a folder of the package')


class Constant(NamedTuple):
  """A constant whose numbers stand in a file of weights.

  Attributes:
    block: in which it stands, a `Block`.
    operation: that makes it.
    dtype: of its numbers.
    shape: its shape.
  """

  block: Any
  operation: Any
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def output(self) -> str:
    """The name by which operations know it."""
    return self.operation.outputs[0].name

  @property
  def value(self) -> Any:
    """Name of the file, and place in it."""
    return self.operation.attributes['val'].blobFileValue


def is_core_ml(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path has the suffix of Core ML packages."""
  return os.fspath(path).rstrip('/').lower().endswith('.mlpackage')


def protocol(purpose: str) -> Any:
  """Returns coremltools.proto, the classes of the format.

  Raises:
    ValueError: coremltools is not installed.
  """
  # it tells on stderr which other frameworks it has not been tried with, and that this is no Mac
  log = logging.getLogger('coremltools')
  before = log.level
  log.setLevel(logging.ERROR)
  try:
    return extras.require('coremltools.proto', 'coreml', purpose)
  finally:
    log.setLevel(before)


def load(path: Path) -> Package:
  """Opens a package; its weights stay on disk.

  Raises:
    ValueError: coremltools is missing, or this is no package of an ML program.
    OSError: a file cannot be read.
  """
  classes = protocol(str(path))
  program_path = checks.guarded(_program_path, path, EXPECTED)

  def parsed(path: Path) -> Any:
    model = classes.Model_pb2.Model()
    model.ParseFromString(program_path.read_bytes())
    return model

  model = checks.guarded(parsed, path, EXPECTED)
  if (kind := model.WhichOneof('Type')) != 'mlProgram':
    raise ValueError(f'{path}: found a model of type {kind}, expected an ML program')
  return Package(path, program_path, model)


def operations(model: Any) -> Iterator[tuple[str, Any, Any]]:
  """Yields the name of the function, the block, and each operation; outer blocks first."""
  for name, function in model.mlProgram.functions.items():
    for block in function.block_specializations.values():
      for inner in _blocks(block):
        for operation in inner.operations:
          yield name, inner, operation


def is_compressed(operation: Any) -> bool:
  """Returns whether an operation makes weights of compressed ones."""
  return operation.type.startswith('constexpr_')


def constants(package: Package) -> dict[str, Constant]:
  """Returns the constants of a program by the names that they have in a tree.

  A name that another function or block has given to another constant already stands behind the
  name of its function: `decode/weight`.

  Raises:
    ValueError: two constants of one function have the same name.
  """
  found: dict[str, Constant] = {}
  types = protocol(str(package.path)).MIL_pb2.DataType
  for function, block, operation in operations(package.model):
    if operation.type != 'const':
      continue
    value = operation.attributes['val']
    tensor = value.type.tensorType
    if value.WhichOneof('value') != 'blobFileValue' or types.Name(tensor.dataType) not in DTYPES:
      continue
    shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
    constant = Constant(block, operation, DTYPES[types.Name(tensor.dataType)], shape)
    name = constant.output
    name = f'{function}/{name}' if name in found else name
    if name in found:
      raise ValueError(f'{package.path}: {name}: found two constants of this name, expected one')
    found[name] = constant
  return found


def array_of(constant: Constant, package: Package) -> Shaped[np.ndarray, '...']:
  """Returns the array of a constant, which is read when its numbers are.

  Raises:
    ValueError: the file of weights has others in its place.
    OSError: it cannot be read.
  """
  path = package.weights_path(constant.value.fileName)
  blob = blob_files.BlobReader(path).blob(constant.value.offset)
  expected = constant.dtype.itemsize * math.prod(constant.shape)
  if blob.data.size != expected:
    raise ValueError(
      f'{path}: {constant.output}: found {blob.data.size} bytes, expected {expected} of '
      f'{constant.dtype} {constant.shape}'
    )
  return blob.data.view(constant.dtype).reshape(constant.shape)


def open_leaves(path: Path) -> dict[str, StoredLeaf]:
  """Returns the constants of a package by name, which stay on disk.

  Warns:
    UserWarning: weights are compressed already.

  Raises:
    ValueError: coremltools is missing, or the package is damaged.
    OSError: it cannot be read.
  """
  package = load(path)
  found = checks.guarded(lambda _: constants(package), path, EXPECTED)
  compressed = [
    operation.outputs[0].name
    for _, _, operation in operations(package.model)
    if is_compressed(operation)
  ]
  if compressed:
    messages.warn(
      f'{path}: {messages.listed(compressed)}: found weights that are compressed already: left out'
    )

  def fetch(name: str) -> Shaped[np.ndarray, '...']:
    read = lambda _: np.array(array_of(found[name], package))
    return checks.guarded(read, path, f'{EXPECTED} whose weights are whole')

  return {
    name: StoredLeaf(os.fspath(path), name, constant.shape, constant.dtype, fetch)
    for name, constant in found.items()
  }


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the constants of a package by name.

  Raises:
    As `open_leaves`.
  """
  return {name: leaf.read() for name, leaf in open_leaves(path).items()}


def _program_path(path: Path) -> Path:
  """Returns the file of the program, which the manifest of a package names."""
  manifest_path = path / MANIFEST
  # a FIFO would be waited for
  if manifest_path.exists() and not manifest_path.is_file():
    raise ValueError(f'{manifest_path}: found no file')
  manifest = json.loads(manifest_path.read_bytes())
  item = manifest['itemInfoEntries'][manifest['rootModelIdentifier']]
  if not isinstance(item['path'], str) or not _is_within(item['path']):
    raise ValueError(f'found the program in {item["path"]!r}')
  place = path / 'Data' / item['path']
  if place.exists() and not place.is_file():
    raise ValueError(f'{place}: found no file')
  return place


def _is_within(name: str) -> bool:
  """Returns whether a name is that of a file in a folder: it does not lead out of it."""
  path = PurePosixPath(name)
  is_relative = not path.is_absolute() and not Path(name).is_absolute()
  return is_relative and '..' not in Path(name).parts and '\0' not in name and bool(path.parts)


def _blocks(block: Any) -> Iterator[Any]:
  """Yields a block and all blocks within, outer ones first."""
  yield block
  for operation in block.operations:
    for inner in operation.blocks:
      yield from _blocks(inner)
