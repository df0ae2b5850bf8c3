"""Puts the weights of an `.opq` file into a Core ML package: indices, and the values that occur.

In the place of a compressed leaf's constant stand operations of iOS 18 that Core ML computes when
it loads a network, or while it runs, as the device likes.  Nothing is rounded, but where a package
of float16 takes a file of float32:

    weights                         in their place
    up to 256 values                constexpr_lut_to_dense, of 1, 2, 3, 4, 6 or 8 bits
    many zeros among them           constexpr_lut_to_sparse, and constexpr_sparse_to_dense: a mask,
                                    and indices of the others
    slices, or outputs with scales  a table for each
    more values, many zeros         constexpr_sparse_to_dense of floats
    all others                      the float constant

Each leaf has the form of the fewest bytes.  All else in a package stays as it is.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.core import files, messages
from opq_jax.export.core_ml_operations import Emitter, Form, forms_of
from opq_jax.export.records import ExportedLeaf, ExportedModel
from opq_jax.file.reader import OpqFile
from opq_jax.weights import blob_files, checks, core_ml, core_ml_uses

_LEAST_VERSION = 9
"""The first version of the format whose operations take indices of 3 bits, masks and tables."""

_SYSTEMS = {6: 'iOS 15', 7: 'iOS 16', 8: 'iOS 17'}
_DTYPES = 'float16', 'float32'


def write_core_ml(
  path: str | os.PathLike[str],
  file: OpqFile,
  into: str | os.PathLike[str],
  *,
  floats: bool = False,
) -> ExportedModel:
  """Writes a Core ML package with the weights of an `.opq` file in the places of its own.

  A leaf stands in the place of the constant of its name.  If there is none, then of its name as
  coremltools writes it, `_` for what is no letter or digit, perhaps with `_to_fp16` behind it.

  Args:
    path: the package to write, which is new; it appears whole or not at all.
    file: the compressed network.
    into: the package of the float network, an ML program for iOS 18 or later.
    floats: whether to write float constants, which any package can hold.

  Returns:
    What was written.

  Raises:
    ValueError: coremltools is missing, `into` or a leaf is damaged or for an earlier system, no
      leaf has the name of a constant, shapes differ, or a dtype cannot hold the weights.
    OSError: a file cannot be read or written.
  """
  into = Path(into)
  files.check_free(path)
  package = core_ml.load(into)
  version = package.model.specificationVersion
  if version < _LEAST_VERSION and not floats:
    raise ValueError(
      f'{into}: found a package for {_SYSTEMS.get(version, f"version {version}")}, expected one '
      'for iOS 18 or later (minimum_deployment_target=coremltools.target.iOS18)'
    )
  guarded = lambda function: checks.guarded(
    lambda _: function(package), into, f'{core_ml.EXPECTED} whose weights are whole'
  )
  found = guarded(core_ml.constants)
  places = _places(file, into, found)
  with files.new_folder(path) as new, contextlib.ExitStack() as stack:
    writer = _Writer(package, found, new, stack, floats=floats)
    leaves, changed = [], []
    for name, place in places.items():
      if file.grids(name):
        leaves.append(writer.add_compressed(name, place, file))
      elif writer.add_uncompressed(name, place, file[name]):
        changed.append(name)
    guarded(lambda _: writer.finish())
    stack.close()
    size = sum(part.stat().st_size for part in new.rglob('*') if part.is_file())
  taken = {*places.values()}
  left = {
    name: found[name].dtype.itemsize * int(np.prod(found[name].shape))
    for name in guarded(core_ml_uses.uses_of)
    if name not in taken
  }
  without = tuple(name for name in file if name not in places)
  return ExportedModel(tuple(leaves), size, tuple(changed), without, left, tuple(writer.rounded))


def _places(file: OpqFile, into: Path, found: Mapping[str, core_ml.Constant]) -> dict[str, str]:
  """Returns the names of the constants in whose places leaves stand, by the names of these.

  Raises:
    ValueError: there are none, two leaves have one place, or shapes differ.
  """
  places: dict[str, str] = {}
  owners: dict[str, str] = {}
  for name in file:
    place = next((one for one in _names(name) if one in found), None)
    if place is None:
      continue
    if place in owners:
      raise ValueError(
        f'{into}: {place}: found the leaves {owners[place]} and {name}, expected one'
      )
    places[name], owners[place] = place, name
  if not any(file.grids(name) for name in places):
    raise ValueError(
      f'{into}: found no constant of the name of a compressed leaf, expected one of '
      f'{messages.listed(name for name in file if file.grids(name))}'
    )
  shapes = {name: found[place].shape for name, place in places.items()}
  if lines := messages.differences(shapes, {name: file.shape(name) for name in places}):
    raise ValueError('\n'.join([f'{into}: found constants of other shapes:', *lines]))
  return places


def _names(leaf: str) -> Iterator[str]:
  """Yields the names that a constant of a leaf may have, the likeliest first.

  >>> list(_names('conv.1.weight'))
  ['conv.1.weight', 'conv_1_weight', 'conv_1_weight_to_fp16']
  """
  clean = re.sub(r'[^A-Za-z0-9_]', '_', leaf)
  clean = f'_{clean}' if clean[:1].isdigit() else clean
  yield leaf
  yield clean
  yield f'{clean}_to_fp16'


class _Writer:
  """A new package, whose constants are replaced.

  Args:
    package: the old one, whose program becomes that of the new one.
    found: its constants.
    new: the folder of the new package.
    stack: closes its files.
    floats: whether to write float constants.

  Attributes:
    rounded: leaves that float16 has changed.
  """

  def __init__(
    self,
    package: core_ml.Package,
    found: Mapping[str, core_ml.Constant],
    new: Path,
    stack: contextlib.ExitStack,
    *,
    floats: bool,
  ):
    self._package, self._found, self._new, self._stack = package, found, new, stack
    self._as_floats = floats
    self._classes = core_ml.protocol(str(package.path)).MIL_pb2
    every = [one for _, _, one in core_ml.operations(package.model)]
    self._taken = {output.name for one in every for output in one.outputs}
    self._replaced: dict[str, list[Any]] = {}  # what stands in the place of a constant
    self._writers: dict[str, blob_files.BlobWriter] = {}
    self.rounded: list[str] = []
    names = dict.fromkeys(value.blobFileValue.fileName for value in _stored(every))
    written = {package.program_path, *map(package.weights_path, names)}
    package.check_others({*written, package.path / core_ml.MANIFEST})
    left_out = lambda folder, children: [
      child for child in children if Path(folder, child) in written
    ]
    shutil.copytree(package.path, new, ignore=left_out, dirs_exist_ok=True)
    for name in names:
      self._open(name)

  def add_compressed(self, name: str, place: str, file: OpqFile) -> ExportedLeaf:
    """Puts a compressed leaf into the place of its constant, in the form of the fewest bytes."""
    array = self._in_dtype(name, place, file[name])
    if array.dtype.name in _DTYPES and array.ndim and not self._as_floats:
      forms = list(forms_of(array, _axes_of_tables(name, file)))
    else:
      forms = [Form(array)]
    form = min(forms, key=lambda form: form.bytes())
    reason = ''
    if form.numbers is None and form.is_stored is None and not self._as_floats:
      reason = 'larger as indices' if len(forms) > 2 else 'more than 256 values'
      if array.dtype.name not in _DTYPES:
        reason = f'{array.dtype}, of which Core ML has no tables'
    emitter, writer = self._emitter(place)
    before = writer.size
    operations = emitter.weights(self._found[place].output, form)
    self._replaced[place] = operations
    size = writer.size - before + sum(operation.ByteSize() for operation in operations)
    float_size = array.nbytes + self._found[place].operation.ByteSize()
    return ExportedLeaf(name, form.name, size, float_size, reason)

  def add_uncompressed(self, name: str, place: str, array: Shaped[np.ndarray, '...']) -> bool:
    """Puts a leaf into the place of its constant where they differ; returns whether they do."""
    constant = self._found[place]
    read = lambda _: core_ml.array_of(constant, self._package)
    expected = f'{core_ml.EXPECTED} whose weights are whole'
    old = checks.guarded(read, self._package.path, expected)
    array = self._in_dtype(name, place, array)
    if old.tobytes() == array.tobytes():
      return False
    emitter, _ = self._emitter(place)
    self._replaced[place] = emitter.constant(constant.output, array)
    return True

  def finish(self) -> None:
    """Writes the other blobs, and the program."""
    replaced = {id(self._found[place].operation): made for place, made in self._replaced.items()}
    readers: dict[str, blob_files.BlobReader] = {}
    every = [one for _, _, one in core_ml.operations(self._package.model)]
    for value in _stored(operation for operation in every if id(operation) not in replaced):
      stored = value.blobFileValue
      if stored.fileName not in readers:
        path = self._package.weights_path(stored.fileName)
        readers[stored.fileName] = blob_files.BlobReader(path)
      blob = readers[stored.fileName].blob(stored.offset)
      stored.offset = self._writers[stored.fileName].add(blob)
    for writer in self._writers.values():
      writer.finish()
    blocks = {id(block): block for _, block, _ in core_ml.operations(self._package.model)}
    # inner blocks first: an operation is copied with the blocks that it has
    for block in [*blocks.values()][::-1]:
      operations = [
        made for operation in block.operations for made in replaced.get(id(operation), [operation])
      ]
      del block.operations[:]
      block.operations.extend(operations)
    program = self._new / self._package.program_path.relative_to(self._package.path)
    program.write_bytes(self._package.model.SerializeToString())

  def _emitter(self, place: str) -> tuple[Emitter, blob_files.BlobWriter]:
    """Returns what emits operations in the place of a constant, and the writer of their numbers."""
    name = self._found[place].value.fileName
    writer = self._writers[name]
    return Emitter(self._classes, name, writer, self._taken), writer

  def _open(self, name: str) -> None:
    """Opens the new file of weights that the program calls by this name."""
    old = self._package.weights_path(name)
    path = self._new / old.relative_to(self._package.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = self._stack.enter_context(path.open('wb'))
    self._writers[name] = blob_files.BlobWriter(file)

  def _in_dtype(
    self, name: str, place: str, array: Shaped[np.ndarray, '...']
  ) -> Shaped[np.ndarray, '...']:
    """Returns a leaf in the dtype of its constant; float16 may round it, and is noted then."""
    dtype = self._found[place].dtype
    if array.dtype == dtype:
      return array
    with np.errstate(over='ignore', invalid='ignore'):
      there = array.astype(dtype)
      is_exact = there.astype(array.dtype).tobytes() == array.tobytes()
    is_float = dtype == np.float16 and array.dtype in (np.float32, ml_dtypes.bfloat16)
    if not is_exact and not (is_float and np.isfinite(there).all()):
      raise ValueError(
        f'{self._package.path}: {place}: found a constant of {dtype}, expected {array.dtype}, '
        f'whose numbers in {name} it must hold'
      )
    if not is_exact:
      self.rounded.append(name)
    return there


def _axes_of_tables(name: str, file: OpqFile) -> tuple[int, ...]:
  """Returns the axes of a leaf along which values differ: those of slices, and of scales."""
  slices, scales = file.slices(name), file.output_scales(name)
  own = () if scales is None else tuple(np.flatnonzero(np.array(scales.shape) > 1).tolist())
  return tuple(sorted({*range(slices), *own}))


def _stored(operations: Iterable[Any]) -> Iterator[Any]:
  """Yields the values of operations that stand in files of weights."""
  for operation in operations:
    bindings = [one for argument in operation.inputs.values() for one in argument.arguments]
    values = [one.value for one in bindings if one.WhichOneof('binding') == 'value']
    for value in [*operation.attributes.values(), *values]:
      if value.WhichOneof('value') == 'blobFileValue':
        yield value
