"""How the nodes of an ONNX graph use its tensors: which are weights, and their axes.

A tensor is a weight where a product or a look-up reads it, as it is or through Identity, Cast,
Transpose, Unsqueeze, Slice and Concat, by which PyTorch puts the gates of an LSTM in order:

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
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from opq_jax.allocation.leaf_names import kind_of_name
from opq_jax.weights import onnx

LEAST_SLICE = 1024
"""Weights: a slice takes a grid and a payload of its own, some 60 bytes."""

_MAX_AXES = 16  # integers in a list of axes
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

  def walk(graph: Any, outer: _Scope) -> None:
    scope = _Scope(dict(outer.views), {**outer.integers, **_integers(graph)})
    for output, name in names.get(id(graph), {}).items():
      scope.views[output] = (_View(name, tuple(range(len(found[name].tensor.dims)))),)
    for node in graph.node:
      for position, axis, slices in _read_by(node, scope.views):
        for view in scope.views[node.input[position]]:
          use = _in_tensor(node.op_type, view, axis, slices, tuple(found[view.name].tensor.dims))
          if use is not None and _goes_before(view.name, use, uses):
            uses[view.name] = use
      if moved := _moved(node, scope):
        scope.views[node.output[0]] = moved
      for _, inner in onnx.inner_graphs(node):
        walk(inner, scope)

  # `found` keeps the graphs, so that each is one object throughout
  walk(model.graph, _Scope({}, {}))
  return {name: uses[name] for name in found if name in uses}


class _View(NamedTuple):
  """A tensor with its axes in another order.

  Attributes:
    name: of the tensor.
    axes: the axis of the tensor at each place; None of an axis of length 1 that it does not have.
  """

  name: str
  axes: tuple[int | None, ...]


class _Scope(NamedTuple):
  """What is known of the names in a graph.

  Attributes:
    views: tensors, or several that are one behind the other, by name.
    integers: constant lists of integers, by name.
  """

  views: dict[str, tuple[_View, ...]]
  integers: dict[str, list[int]]


def _integers(graph: Any) -> dict[str, list[int]]:
  """Returns the constant lists of integers of a graph, such as the axes of Unsqueeze."""
  from onnx import TensorProto, numpy_helper

  tensors = {tensor.name: tensor for tensor in graph.initializer}
  for node in graph.node:
    if node.op_type == 'Constant':
      tensors.update((node.output[0], one.t) for one in node.attribute if one.name == 'value')
  return {
    name: numpy_helper.to_array(tensor).reshape(-1).tolist()
    for name, tensor in tensors.items()
    if tensor.data_type == TensorProto.INT64
    and math.prod(tensor.dims) <= _MAX_AXES
    and tensor.data_location != TensorProto.EXTERNAL
  }


def _goes_before(name: str, use: GraphUse, uses: Mapping[str, GraphUse]) -> bool:
  """Returns whether a use is the one that says the axes: the first product, or else look-up."""
  if use.kind == 'Gather':
    return name not in uses and kind_of_name(name) is None
  return name not in uses or uses[name].kind == 'Gather'


def _moved(node: Any, scope: _Scope) -> tuple[_View, ...]:
  """Returns what a node that only moves numbers makes of tensors, () of any other node."""
  views, inputs = scope.views, node.input
  if node.domain not in _DOMAINS or not inputs or inputs[0] not in views:
    return ()
  first = views[inputs[0]]
  attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
  if node.op_type in ('Identity', 'Cast', 'Slice'):
    return first
  if node.op_type == 'Transpose':
    order = attributes.get('perm') or list(range(len(first[0].axes)))[::-1]
    return tuple(view._replace(axes=tuple(view.axes[axis] for axis in order)) for view in first)
  if node.op_type == 'Unsqueeze':
    added = attributes.get('axes') or scope.integers.get(inputs[1] if len(inputs) > 1 else '', [])
    return tuple(_unsqueezed(view, added) for view in first) if added else ()
  if node.op_type == 'Concat' and all(name in views for name in inputs):
    parts = [view for name in inputs for view in views[name]]
    is_alike = all(view.axes == parts[0].axes for view in parts)
    return tuple(dict.fromkeys(parts)) if is_alike else ()
  return ()


def _unsqueezed(view: _View, added: list[int]) -> _View:
  """Returns a view with axes of length 1 at these places."""
  rank = len(view.axes) + len(added)
  places, own = {axis % rank for axis in added}, iter(view.axes)
  return view._replace(axes=tuple(None if i in places else next(own) for i in range(rank)))


def _read_by(node: Any, views: Mapping[str, tuple[_View, ...]]) -> Iterator[tuple[int, int, int]]:
  """Yields input, axis of the outputs and number of slices of the weights that a node reads."""
  if node.domain not in _DOMAINS:
    return
  numbers = {attribute.name: attribute.i for attribute in node.attribute}
  ranks = {
    position: len(views[name][0].axes)
    for position, name in enumerate(node.input)
    if name in views and len(views[name][0].axes) > 1
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


def _in_tensor(
  kind: str, view: _View, axis: int, slices: int, shape: tuple[int, ...]
) -> GraphUse | None:
  """Returns the use of a tensor of this shape, by the axes that a node sees."""
  channel_axis, leading = view.axes[axis], view.axes[:slices]
  if channel_axis is None:
    return None
  is_leading = set(leading) == set(range(slices)) and channel_axis >= slices
  is_large = math.prod(shape[slices:]) >= LEAST_SLICE and math.prod(shape[:slices]) > 1
  return GraphUse(kind, channel_axis, slices if is_leading and is_large else 0)
