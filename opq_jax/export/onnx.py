"""Puts the weights of an `.opq` file into an ONNX file: indices, and the values that occur.

In the place of a compressed leaf's initializer stand its values and the number of each weight's
value, and nodes that look them up.  Nothing is rounded: the tensor that nodes read is that of the
file, bit for bit.  Runtimes compute such constants when they load a network, so its time stays that
of floats; what shrinks is the file.

    weights                         in their place
    up to 256 values                Gather(values, indices): UINT8, of several weights each where
                                    few values occur (`opq_jax.export.palettes`); UINT4 where the
                                    file knows it, from operator set 21 on
    slices, each of 256 at most     Gather(values of all, indices + the first of each slice)
    outputs with scales             Gather(...) * scales, where these products are exact
    weights that are escaped        ScatterElements over the others
    rotated inputs, and all others  the float initializer

Operator sets are left as they are: raising them converts nodes that are not ours.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from opq_jax.core import extras, files, messages
from opq_jax.core.limits import ESCAPE
from opq_jax.export import palettes
from opq_jax.export.onnx_nodes import Emitter, Parts
from opq_jax.export.records import ExportedLeaf, ExportedModel
from opq_jax.file.reader import OpqFile
from opq_jax.weights import checks
from opq_jax.weights import onnx as onnx_files
from opq_jax.weights.onnx_uses import uses_of

_LEAST_OPSET = 6
"""The first operator set whose Cast is that of today."""

_SCATTER_OPSET = 11
_FOUR_BITS = 21, 10
"""The first operator set, and version of the format, with UINT4."""

_LARGEST = (1 << 31) - 1
"""Bytes of a file: the bound of protocol buffers."""

_FLOATS = 'floats'


def write_onnx(
  path: str | os.PathLike[str],
  file: OpqFile,
  into: Any,
  *,
  floats: bool = False,
) -> ExportedModel:
  """Writes an ONNX file with the weights of an `.opq` file in the places of its own.

  Args:
    path: the file to write; an existing one is replaced.  It appears whole or not at all.
    file: the compressed network, whose leaves have the names of tensors of `into`.
    into: the path of the ONNX file of the float network, beside which data in other files are
      read; or an `onnx.ModelProto`, such as `onnx_program` makes.
    floats: whether to write float initializers.

  Returns:
    What was written.

  Raises:
    ValueError: onnx is missing, `into` or a leaf is damaged, no leaf has the name of a tensor,
      shapes differ, a dtype cannot hold the weights, a place of a program stays without weights, or
      the file would have 2 GiB or more.
    OSError: a file cannot be read or written.

  >>> import tempfile, onnx, opq_jax
  >>> kernel = np.random.default_rng(0).laplace(size=(64, 32)).astype(np.float32)
  >>> network = opq_jax.compress({'kernel': kernel}, compression_rate=8.0)
  >>> data = opq_jax.file.serialize(network.params, network.state)
  >>> tensor = onnx.numpy_helper.from_array(kernel, 'kernel')
  >>> graph = onnx.helper.make_graph([], 'net', [], [], [tensor])
  >>> with tempfile.TemporaryDirectory() as folder, OpqFile(data) as file:
  ...   onnx.save(onnx.helper.make_model(graph), f'{folder}/net.onnx')
  ...   written = write_onnx(f'{folder}/small.onnx', file, f'{folder}/net.onnx')
  >>> [leaf.form for leaf in written.leaves]
  ['UINT8']
  """
  model, source = _opened(into)
  external = extras.require('onnx.external_data_helper', 'onnx', str(source))
  found = checks.guarded(lambda _: onnx_files.constants(model), source, onnx_files.EXPECTED)
  shared = _shared(file, source, found)
  # a model in memory has no files beside it
  places = _places(found, source.parent if isinstance(into, str | os.PathLike) else None)
  if missing := sorted(places.difference(shared)):
    raise ValueError(
      f'{source}: found no data of {messages.listed(missing)}, expected leaves of these names'
    )
  writer = _Writer(model, source, found, places, floats=floats)
  leaves, changed = [], []
  for name in shared:
    if file.grids(name):
      leaves.append(writer.add_compressed(name, file))
    elif writer.add_uncompressed(name, file[name]):
      changed.append(name)
  weights = checks.guarded(lambda _: uses_of(model), source, onnx_files.EXPECTED)
  left = {
    name: found[name].tensor.ByteSize()
    for name in weights
    if name not in writer.parts and name not in file
  }
  writer.place()
  checks.guarded(
    lambda path: external.load_external_data_for_model(model, str(path.parent)),
    source,
    f'{onnx_files.EXPECTED} whose data are whole',
  )
  if (size := model.ByteSize()) > _LARGEST:
    raise ValueError(f'{path}: found {size} bytes to write, expected at most {_LARGEST}')
  files.write_bytes(path, model.SerializeToString())
  without = tuple(name for name in file if name not in found)
  return ExportedModel(tuple(leaves), size, tuple(changed), without, left)


def _opened(into: Any) -> tuple[Any, Path]:
  """Returns a model that may be changed, and the path of its file, or what messages call it."""
  if isinstance(into, str | os.PathLike):
    return onnx_files.load(Path(into)), Path(into)
  model = type(into)()
  model.CopyFrom(into)
  return model, Path(model.graph.name or 'model')


def _places(found: Mapping[str, Any], folder: Path | None) -> set[str]:
  """Returns the tensors of a model without data, whose weights must come from elsewhere."""
  return {name for name, one in found.items() if onnx_files.is_place(one.tensor, folder)}


def _shared(file: OpqFile, into: Path, found: Mapping[str, Any]) -> list[str]:
  """Returns the leaves of a file that are tensors of a model.

  Raises:
    ValueError: there are none, or shapes differ.
  """
  shared = [name for name in file if name in found]
  if not any(file.grids(name) for name in shared):
    raise ValueError(
      f'{into}: found no tensor of the name of a compressed leaf, expected one of '
      f'{messages.listed(name for name in file if file.grids(name))}'
    )
  shapes = {name: tuple(found[name].tensor.dims) for name in shared}
  if lines := messages.differences(shapes, {name: file.shape(name) for name in shared}):
    raise ValueError('\n'.join([f'{into}: found tensors of other shapes:', *lines]))
  return shared


class _Writer:
  """A model whose tensors are replaced.

  Attributes:
    parts: what stands in the place of a constant, by its name in the tree.
  """

  def __init__(
    self,
    model: Any,
    into: Path,
    found: Mapping[str, Any],
    places: Collection[str],
    *,
    floats: bool,
  ):
    self._model, self._into, self._found, self._as_floats = model, into, found, floats
    self._places = places
    self._opset = max(
      (one.version for one in model.opset_import if one.domain in ('', 'ai.onnx')), default=0
    )
    if self._opset < _LEAST_OPSET and not floats:
      raise ValueError(
        f'{into}: found operator set {self._opset}, expected {_LEAST_OPSET} or a later one'
      )
    self._taken = set(_names(model))
    self._palettes: set[str] = set()  # leaves that are no float initializers
    self.parts: dict[str, Parts] = {}

  def add_compressed(self, name: str, file: OpqFile) -> ExportedLeaf:
    """Puts a compressed leaf into the place of its tensor, as indices where that is smaller."""
    from onnx import numpy_helper

    array, output = self._in_dtype(name, file[name]), self._found[name].output
    as_floats = Parts([], [numpy_helper.from_array(array, output)], _FLOATS)
    parts, reason = as_floats, ''
    if not self._as_floats:
      coded = self._coded(name, array, file)
      if isinstance(coded, str):
        reason = coded
      elif coded.bytes() >= as_floats.bytes():
        reason = 'larger as indices'
      else:
        parts = coded
        self._palettes.add(name)
    self.parts[name] = parts
    return ExportedLeaf(name, parts.form, parts.bytes(), as_floats.bytes(), reason)

  def add_uncompressed(self, name: str, array: Shaped[np.ndarray, '...']) -> bool:
    """Puts a leaf into the place of its tensor where they differ; returns whether they do."""
    from onnx import numpy_helper

    constant = self._found[name]
    array = self._in_dtype(name, array)
    new = Parts([], [numpy_helper.from_array(array, constant.output)], _FLOATS)
    if name in self._places:
      self.parts[name] = new
      return False
    read = lambda path: onnx_files.array_of(constant, path.parent)
    old = checks.guarded(read, self._into, f'{onnx_files.EXPECTED} whose data are whole')
    if old.tobytes() == array.tobytes():
      return False
    self.parts[name] = new
    return True

  def place(self) -> None:
    """Puts all parts into the graphs."""
    changes: dict[int, tuple[Any, list[str]]] = {}
    for name in self.parts:
      graph = self._found[name].graph
      changes.setdefault(id(graph), (graph, []))[1].append(name)
    if self._model.ir_version < 4:
      # before version 4 every initializer is an input as well, and constant all the same
      self._model.ir_version = 4
      graph = self._model.graph
      _remove_inputs(graph, {tensor.name for tensor in graph.initializer})
    inner_first = [graph for graph in onnx_files.graphs(self._model.graph) if id(graph) in changes][
      ::-1
    ]
    for graph in inner_first:
      names = changes[id(graph)][1]
      _replace(graph, {self._found[name].output: self.parts[name] for name in names})

  def _in_dtype(self, name: str, array: Shaped[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns a leaf in the dtype of its tensor, which must hold it exactly."""
    dtype = onnx_files.dtype_of(self._found[name].tensor)
    if dtype is None or array.dtype == dtype:
      return array
    with np.errstate(over='ignore', invalid='ignore'):
      there = array.astype(dtype)
      is_exact = there.astype(array.dtype).tobytes() == array.tobytes()
    if not is_exact:
      raise ValueError(
        f'{self._into}: {name}: found a tensor of {dtype}, expected {array.dtype}, whose numbers '
        'it must hold'
      )
    return there

  def _coded(self, name: str, array: Shaped[np.ndarray, '...'], file: OpqFile) -> Parts | str:
    """Returns the parts of a leaf, or why there are none."""
    if (parts := self._again(name, array, file)) is not None:
      return parts
    if file.rotated_axis(name) is not None:
      return 'rotated inputs'
    if array.itemsize == 1:
      return 'a byte each, which Gather does not take'
    emit = Emitter(self._found[name].output, self._taken, self._opset, self._knows_four_bits())
    if (palette := palettes.palette_of(array)) is not None:
      return emit.done(emit.looked_up(palette, array.shape))
    rest, positions = array, np.flatnonzero(file.codes(name).reshape(-1) == ESCAPE)
    if positions.size:
      if self._opset < _SCATTER_OPSET:
        return (
          f'{positions.size} of its weights are escaped, which takes operator set '
          f'{_SCATTER_OPSET}, found {self._opset}'
        )
      rest = array.copy()
      # any value of the leaf
      rest.reshape(-1)[positions] = 0
    coded = self._with_scales(emit, rest, file.slices(name), file.output_scales(name))
    if coded is None:
      return f'more than {palettes.MAX_VALUES} values'
    if positions.size:
      coded = emit.scattered(coded, array, positions)
    return emit.done(coded)

  def _with_scales(
    self, emit: Emitter, array: Shaped[np.ndarray, '...'], slices: int, scales: Any
  ) -> str | None:
    """Emits a leaf without its escaped weights; returns its name, None where that is not exact."""
    if scales is not None:
      if array.dtype not in (np.float32, np.float64):
        return None
      scales = scales.astype(array.dtype)
      base = array / scales
      if (base * scales).tobytes() != array.tobytes():
        return None
      inner = self._with_scales(emit, base, slices, None)
      return None if inner is None else emit.scaled(inner, scales)
    if (palette := palettes.palette_of(array)) is not None:
      return emit.looked_up(palette, array.shape)
    sliced = palettes.sliced_palettes(array, slices) if slices else None
    return None if sliced is None else emit.looked_up_in_slices(sliced, array.shape, slices)

  def _again(self, name: str, array: Shaped[np.ndarray, '...'], file: OpqFile) -> Parts | None:
    """Returns the node that repeats an earlier leaf, None where the leaf is none again."""
    from onnx import helper

    first = file.tied_to(name)
    if first is None or first not in self._palettes:
      return None
    here, there = self._found[name], self._found[first]
    is_visible = there.graph is here.graph or there.graph is self._model.graph
    if not is_visible or there.tensor.data_type != here.tensor.data_type:
      return None
    is_same = file.shape(first) == array.shape and file[first].tobytes() == file[name].tobytes()
    kind = 'Identity' if is_same else 'Transpose'
    options: dict[str, Any] = {} if is_same else {'perm': [1, 0]}
    node = helper.make_node(kind, [there.output], [here.output], **options)
    return Parts([node], [], f'{kind} of another')

  def _knows_four_bits(self) -> bool:
    return self._opset >= _FOUR_BITS[0] and self._model.ir_version >= _FOUR_BITS[1]


def _names(model: Any) -> list[str]:
  """Returns all names of a model's graphs."""
  names = []
  for graph in onnx_files.graphs(model.graph):
    names += [one.name for one in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
      names += [*node.input, *node.output]
  return names


def _replace(graph: Any, parts: Mapping[str, Parts]) -> None:
  """Puts parts into a graph in the places of the constants of these outputs."""
  nodes = [node for own in parts.values() for node in own.nodes]
  nodes += [
    node for node in graph.node if not (node.op_type == 'Constant' and node.output[0] in parts)
  ]
  tensors = [tensor for tensor in graph.initializer if tensor.name not in parts]
  tensors += [tensor for own in parts.values() for tensor in own.tensors]
  del graph.node[:], graph.initializer[:]
  graph.node.extend(nodes)
  graph.initializer.extend(tensors)
  _remove_inputs(graph, parts)


def _remove_inputs(graph: Any, names: Any) -> None:
  """Removes the inputs of a graph that are constants."""
  inputs = [one for one in graph.input if one.name not in names]
  if len(inputs) < len(graph.input):
    del graph.input[:]
    graph.input.extend(inputs)
