"""How the nodes of an ONNX graph use its tensors: which are weights, and their axes.

A tensor is a weight where a product or a look-up reads it, as it is or through Identity, Cast and
Transpose:

    node                                    outputs                 slices
    Conv                                    axis 0
    ConvTranspose                           axis 1
    Gemm                                    the columns of B, the rows of A, after transB and transA
    MatMul, second operand                  the last axis           the axes before the last two
    MatMul, first operand                   the last axis but one   the axes before the last two
    Gather                                  the last axis that is not looked up
    LSTM, GRU, RNN: W and R                 axis 1                  directions
    Attention of com.microsoft              axis 1

FusedConv, FusedGemm and FusedMatMul of com.microsoft, which onnxruntime writes, are Conv, Gemm and
MatMul.  A tensor that several nodes read has the axes of the first product, or else look-up.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opq_jax.allocation.leaf_names import kind_of_name
from opq_jax.weights import checks, onnx

_LEAST_SLICE = 1024  # weights: a slice takes a grid and a payload of its own, some 60 bytes
_DOMAINS = ('', 'ai.onnx', 'com.microsoft')


class GraphUse(NamedTuple):
  """What a graph does with a tensor.

  Attributes:
    kind: the type of the node that reads it.
    channel_axis: of its outputs.
    slices: leading axes that count slices, each a matrix of its own.
  """

  kind: str
  channel_axis: int
  slices: int = 0


def graph_uses(path: str | os.PathLike[str]) -> dict[str, GraphUse] | None:
  """Returns how the graph of an ONNX file uses its weights, by name; None of any other file.

  Tensors that no product and no look-up reads are left out, as are tables of positions by name.

  Raises:
    ValueError: onnx is missing, or the file is damaged.
    OSError: it cannot be read.
  """
  path = Path(path)
  if not onnx.is_onnx(path):
    return None
  model = onnx.load(path)
  return checks.guarded(lambda _: uses_of(model), path, onnx.EXPECTED)


def uses_of(model: Any) -> dict[str, GraphUse]:
  """Returns how the graph of a ModelProto uses its weights, by the names of `onnx.constants`.

  >>> from onnx import TensorProto, helper
  >>> weight = helper.make_tensor('w', TensorProto.FLOAT, [4, 3], [0.0] * 12)
  >>> gemm = helper.make_node('Gemm', ['x', 'w'], ['y'], transB=1)
  >>> uses_of(helper.make_model(helper.make_graph([gemm], 'net', [], [], [weight])))
  {'w': GraphUse(kind='Gemm', channel_axis=0, slices=0)}
  """
  names: dict[int, dict[str, str]] = {}
  found = onnx.constants(model)
  for name, constant in found.items():
    names.setdefault(id(constant.graph), {})[constant.output] = name
  uses: dict[str, GraphUse] = {}

  def walk(graph: Any, outer: Mapping[str, _View]) -> None:
    views = dict(outer)
    for output, name in names.get(id(graph), {}).items():
      views[output] = _View(name, tuple(range(len(found[name].tensor.dims))))
    for node in graph.node:
      for position, axis, slices in _read_by(node, views):
        view = views[node.input[position]]
        use = _in_tensor(node.op_type, view, axis, slices, tuple(found[view.name].tensor.dims))
        is_table = use.kind == 'Gather'
        if is_table and kind_of_name(view.name) is not None:
          continue
        if view.name not in uses or (uses[view.name].kind == 'Gather' and not is_table):
          uses[view.name] = use
      if (moved := _moved(node, views)) is not None:
        views[node.output[0]] = moved
      for _, inner in onnx.inner_graphs(node):
        walk(inner, views)

  # one list holds the graphs: a second proxy of the same graph may have another id
  walk(model.graph, {})
  return {name: uses[name] for name in found if name in uses}


class _View(NamedTuple):
  """A tensor with its axes in another order: its name, and the axis at each place."""

  name: str
  axes: tuple[int, ...]


def _moved(node: Any, views: Mapping[str, _View]) -> _View | None:
  """Returns what a node that only moves numbers makes of a tensor, None of any other node."""
  if node.domain not in _DOMAINS or not node.input or node.input[0] not in views:
    return None
  view = views[node.input[0]]
  if node.op_type in ('Identity', 'Cast'):
    return view
  if node.op_type == 'Transpose':
    order = next((list(a.ints) for a in node.attribute if a.name == 'perm'), None)
    order = list(range(len(view.axes)))[::-1] if order is None else order
    return view._replace(axes=tuple(view.axes[axis] for axis in order))
  return None


def _read_by(node: Any, views: Mapping[str, _View]) -> Iterator[tuple[int, int, int]]:
  """Yields input, axis of the outputs and number of slices of the weights that a node reads."""
  if node.domain not in _DOMAINS:
    return
  numbers = {attribute.name: attribute.i for attribute in node.attribute}
  ranks = {
    position: len(views[name].axes)
    for position, name in enumerate(node.input)
    if name in views and len(views[name].axes) > 1
  }
  kind = node.op_type.removeprefix('Fused')
  if kind in ('Conv', 'ConvTranspose') and 1 in ranks:
    yield 1, int(kind == 'ConvTranspose'), 0
  elif kind == 'Gemm':
    if 1 in ranks:
      yield 1, int(not numbers.get('transB')), 0
    if 0 in ranks:
      yield 0, int(bool(numbers.get('transA'))), 0
  elif kind == 'MatMul':
    if 1 in ranks:
      yield 1, ranks[1] - (2 if numbers.get('transB') else 1), ranks[1] - 2
    if 0 in ranks:
      yield 0, ranks[0] - (1 if numbers.get('transA') else 2), ranks[0] - 2
  elif kind == 'Gather' and 0 in ranks:
    looked_up = numbers.get('axis', 0) % ranks[0]
    yield 0, ranks[0] - (2 if looked_up == ranks[0] - 1 else 1), 0
  elif kind in ('LSTM', 'GRU', 'RNN'):
    for position in (1, 2):
      if ranks.get(position) == 3:
        yield position, 1, 1
  elif kind == 'Attention' and node.domain == 'com.microsoft' and 1 in ranks:
    yield 1, 1, 0


def _in_tensor(kind: str, view: _View, axis: int, slices: int, shape: tuple[int, ...]) -> GraphUse:
  """Returns the use of a tensor of this shape, by the axes that a node sees."""
  channel_axis, leading = view.axes[axis], view.axes[:slices]
  is_leading = set(leading) == set(range(slices)) and channel_axis >= slices
  is_large = math.prod(shape[slices:]) >= _LEAST_SLICE and math.prod(shape[:slices]) > 1
  return GraphUse(kind, channel_axis, slices if is_leading and is_large else 0)
