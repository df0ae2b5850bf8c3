"""The nodes and tensors that stand in the place of one constant of an ONNX file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from opq_jax.export import palettes
from opq_jax.export.names import fresh_name

_SLICE_OPSET = 10
"""The first operator set whose Slice takes its ends as tensors."""


class Parts(NamedTuple):
  """Nodes and tensors that make the output of a constant."""

  nodes: list[Any]
  tensors: list[Any]
  form: str

  def bytes(self) -> int:
    """Returns their bytes in a file."""
    return sum(part.ByteSize() for part in (*self.nodes, *self.tensors))


class Emitter:
  """Emits the nodes of one tensor."""

  def __init__(self, output: str, taken: set[str], opset: int, knows_four_bits: bool):
    self._output, self._taken, self._opset = output, taken, opset
    self._knows_four_bits = knows_four_bits
    self._nodes: list[Any] = []
    self._tensors: list[Any] = []
    self._form: list[str] = []

  def done(self, name: str) -> Parts:
    """Returns the parts, whose last tensor gets the name that nodes read."""
    for node in self._nodes:
      if node.output[0] == name:
        node.output[0] = self._output
    return Parts(self._nodes, self._tensors, ', '.join(self._form))

  def looked_up(self, palette: palettes.Palette, shape: tuple[int, ...]) -> str:
    """Emits the weights of a palette; returns their name."""
    from onnx import TensorProto, helper

    size = palette.numbers.size
    run = palette.run(whole=self._opset < _SLICE_OPSET)
    has_nibbles = self._knows_four_bits and palette.values.size <= 16
    if has_nibbles and (size + 1) // 2 + palette.values.nbytes < palette.bytes_of(run):
      numbers = np.append(palette.numbers, np.zeros(size % 2, np.uint8))
      data = (numbers[::2] | (numbers[1::2] << 4)).tobytes()
      indices = self._fresh('indices')
      self._tensors.append(helper.make_tensor(indices, TensorProto.UINT4, shape, data, raw=True))
      self._form.append('UINT4')
      return self._gathered(palette.values, indices)
    if run == 1:
      self._form.append('UINT8')
      return self._gathered(palette.values, self._tensor('indices', palette.numbers.reshape(shape)))
    table, rows = palette.runs_of(run)
    self._form.append(f'UINT8 of {run} weights')
    runs = self._gathered(table, self._tensor('indices', rows))
    if rows.size * run != size:
      flat = self._reshaped(runs, [-1])
      start, stop = (self._tensor('end', np.array([end])) for end in (0, size))
      runs = self._node('Slice', [flat, start, stop])
    return self._reshaped(runs, shape)

  def looked_up_in_slices(
    self, sliced: palettes.SlicedPalettes, shape: tuple[int, ...], slices: int
  ) -> str:
    """Emits the weights of slices, each with values of its own; returns their name."""
    from onnx import TensorProto

    indices = self._tensor('indices', sliced.palette.numbers.reshape(shape))
    offsets = sliced.offsets.astype(np.int32)
    offsets = offsets.reshape(*shape[:slices], *[1] * (len(shape) - slices))
    wide = self._node('Cast', [indices], to=TensorProto.INT32)
    places = self._node('Add', [wide, self._tensor('offsets', offsets)])
    self._form.append('UINT8 by slice')
    return self._node('Gather', [self._tensor('values', sliced.palette.values), places])

  def scaled(self, name: str, scales: Shaped[np.ndarray, '...']) -> str:
    """Emits the product of weights with the scales of outputs; returns its name."""
    self._form.append('output scales')
    return self._node('Mul', [name, self._tensor('scales', scales)])

  def scattered(
    self, name: str, array: Shaped[np.ndarray, '...'], positions: Shaped[np.ndarray, ' n']
  ) -> str:
    """Emits weights with escaped ones in their places; returns their name."""
    self._form.append(f'{positions.size} escaped')
    wide = np.int32 if array.size <= np.iinfo(np.int32).max else np.int64
    places = self._tensor('places', positions.astype(wide))
    escaped = self._tensor('escaped', array.reshape(-1)[positions])
    flat = self._node('ScatterElements', [self._reshaped(name, [-1]), places, escaped], axis=0)
    return self._reshaped(flat, array.shape)

  def _gathered(self, values: Shaped[np.ndarray, '...'], indices: str) -> str:
    from onnx import TensorProto

    # Gather takes no other integers than of four bytes and eight
    wide = self._node('Cast', [indices], to=TensorProto.INT32)
    return self._node('Gather', [self._tensor('values', values), wide])

  def _reshaped(self, name: str, shape: Sequence[int]) -> str:
    return self._node('Reshape', [name, self._tensor('shape', np.array(shape, np.int64))])

  def _node(self, kind: str, inputs: list[str], **options: Any) -> str:
    from onnx import helper

    output = self._fresh(kind.lower())
    self._nodes.append(helper.make_node(kind, inputs, [output], **options))
    return output

  def _tensor(self, kind: str, array: Shaped[np.ndarray, '...']) -> str:
    from onnx import numpy_helper

    name = self._fresh(kind)
    self._tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name

  def _fresh(self, kind: str) -> str:
    """Returns a name that the model does not have yet."""
    return fresh_name(f'{self._output}.{kind}', self._taken)
