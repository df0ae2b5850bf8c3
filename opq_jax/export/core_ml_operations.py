"""The operations that stand in the place of one constant of an ML program."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from opq_jax.core.array_types import UInt8
from opq_jax.export import palettes
from opq_jax.export.names import fresh_name
from opq_jax.weights import blob_files

BITS = (1, 2, 3, 4, 6, 8)
"""Bits of an index that Core ML has types for."""

_OPERATION = 400
"""Bytes of an operation and of the descriptions of its numbers, beyond those of a constant."""


class Form(NamedTuple):
  """One way to write an array: floats or look-up tables, with its zeros or without.

  Attributes:
    values: the array, or its tables: of the shape of the array, 1 in the place of an axis that
      shares a table, and behind it 2**bits and 1; zeros where fewer values occur.
    numbers: the place of each weight's value in its table; None of floats.
    bits: of a number.
    is_stored: the weights that are not zero, the only ones that are written; None where all are.
  """

  values: Shaped[np.ndarray, '...']
  numbers: UInt8[np.ndarray, '...'] | None = None
  bits: int = 0
  is_stored: Bool[np.ndarray, '...'] | None = None

  def bytes(self) -> int:
    """Returns the bytes that it takes, roughly."""
    array = self.values if self.numbers is None else self.numbers
    count = array.size if self.is_stored is None else int(np.count_nonzero(self.is_stored))
    mask = 0 if self.is_stored is None else self.is_stored.size // 8
    operations = int(self.numbers is not None) + int(self.is_stored is not None)
    if self.numbers is None:
      return mask + count * array.itemsize + operations * _OPERATION
    return mask + count * self.bits // 8 + self.values.nbytes + operations * _OPERATION

  @property
  def name(self) -> str:
    """The form in words."""
    sparse = '' if self.is_stored is None else 'sparse, '
    if self.numbers is None:
      return f'{sparse}floats'
    several = '' if self.values.size == 1 << self.bits else 's'
    return f'{sparse}palette{several} of {self.bits} bits'


def forms_of(array: Shaped[np.ndarray, '...'], axes: Sequence[int]) -> Iterator[Form]:
  """Yields the ways to write an array of float16 or float32.

  Args:
    array: the weights.
    axes: along which each index has other values, or scales.

  >>> weights = np.float16([[0, 1, 2], [0, 0, 5]])
  >>> [form.name for form in forms_of(weights, ())]
  ['floats', 'sparse, floats', 'palette of 2 bits', 'sparse, palette of 2 bits']
  """
  is_stored = array.view(f'u{array.itemsize}') != 0
  yield Form(array)
  if is_stored.any():
    yield Form(array, is_stored=is_stored)
  for own in dict.fromkeys([(), tuple(axes)]):
    yield from _luts_of(array, own)


def _luts_of(array: Shaped[np.ndarray, '...'], axes: Sequence[int]) -> Iterator[Form]:
  """Yields the look-up tables of an array, with zeros in the tables and without.

  Args:
    array: the weights.
    axes: along which each index has a table of its own.

  >>> weights = np.float16([[0, 1, 2], [0, 0, 5]])
  >>> [(lut.name, lut.values.shape) for lut in _luts_of(weights, (0,))]
  [('palettes of 2 bits', (2, 1, 4, 1)), ('sparse, palettes of 1 bits', (2, 1, 2, 1))]
  >>> [lut.name for lut in _luts_of(np.arange(999.0), ())]
  []
  """
  places = tuple(range(len(axes)))
  moved = np.moveaxis(array, axes, places)
  sliced = palettes.sliced_palettes(np.ascontiguousarray(moved), len(axes))
  if sliced is None:
    return
  own = np.split(sliced.palette.values, sliced.offsets[1:])
  numbers = np.moveaxis(sliced.palette.numbers.reshape(moved.shape), places, axes)
  shape = [size if axis in axes else 1 for axis, size in enumerate(array.shape)]
  yield _lut(own, numbers, shape)
  # values are sorted by their bits: zero is the first, and minus zero another value
  is_zero = np.array([not part[:1].view(f'u{array.itemsize}')[0] for part in own])
  is_stored = array.view(f'u{array.itemsize}') != 0
  if is_zero.any() and is_stored.any():
    rest = [part[int(has) :] for part, has in zip(own, is_zero, strict=True)]
    shifts = is_zero.reshape(*moved.shape[: len(axes)], *[1] * (array.ndim - len(axes)))
    shifts = np.moveaxis(shifts, places, axes).astype(np.uint8)
    yield _lut(rest, np.where(is_stored, numbers - shifts, np.uint8(0)), shape, is_stored)


def _lut(
  own: list[Shaped[np.ndarray, ' n']],
  numbers: UInt8[np.ndarray, '...'],
  shape: list[int],
  is_stored: Bool[np.ndarray, '...'] | None = None,
) -> Form:
  bits = next(bits for bits in BITS if max(part.size for part in own) <= 1 << bits)
  values = np.stack([np.pad(part, (0, (1 << bits) - part.size)) for part in own])
  return Form(values.reshape(*shape, 1 << bits, 1), numbers, bits, is_stored)


class Emitter:
  """Emits operations into blocks, and their numbers into a file of weights.

  Args:
    classes: coremltools.proto.MIL_pb2.
    file_name: what the program calls the file.
    writer: writes the file.
    taken: names of the program.
  """

  def __init__(self, classes: Any, file_name: str, writer: blob_files.BlobWriter, taken: set[str]):
    self._classes, self._file_name, self._writer = classes, file_name, writer
    self._taken = taken

  def constant(self, output: str, array: Shaped[np.ndarray, '...']) -> list[Any]:
    """Emits a constant of numbers."""
    operation = self._operation('const', [(output, self._dtype(array), array.shape)], {})
    operation.attributes['val'].CopyFrom(self._array(array))
    return [operation]

  def weights(self, output: str, form: Form) -> list[Any]:
    """Emits weights in this form."""
    values, mask = form.values, form.is_stored
    if form.numbers is None:
      if mask is None:
        return self.constant(output, values)
      inputs = {'nonzero_data': self._array(values[mask]), 'mask': self._mask(mask)}
      return [self._dense(output, values, mask.shape, inputs)]
    dtype, shape = self._dtype(values), form.numbers.shape
    if mask is None:
      inputs = {'indices': self._numbers(form.numbers, form.bits), 'lut': self._array(values)}
      return [self._operation('constexpr_lut_to_dense', [(output, dtype, shape)], inputs)]
    numbers = form.numbers[mask]
    mask_name, stored_name = self._fresh(output, 'mask'), self._fresh(output, 'nonzero')
    inputs = {
      'indices_mask': self._mask(mask),
      'indices_nonzero_data': self._numbers(numbers, form.bits),
      'lut': self._array(values),
    }
    outputs = [(mask_name, 'UINT1', shape), (stored_name, dtype, numbers.shape)]
    return [
      self._operation('constexpr_lut_to_sparse', outputs, inputs),
      self._dense(output, values, shape, {'nonzero_data': stored_name, 'mask': mask_name}),
    ]

  def _dense(
    self, output: str, like: Shaped[np.ndarray, '...'], shape: Sequence[int], inputs: dict[str, Any]
  ) -> Any:
    outputs = [(output, self._dtype(like), shape)]
    return self._operation('constexpr_sparse_to_dense', outputs, inputs)

  def _operation(
    self, kind: str, outputs: list[tuple[str, str, Sequence[int]]], inputs: dict[str, Any]
  ) -> Any:
    """Returns an operation; inputs are values, or the names of outputs of others."""
    made = self._classes.Operation(type=kind)
    for argument, value in inputs.items():
      binding = made.inputs[argument].arguments.add()
      if isinstance(value, str):
        binding.name = value
      else:
        binding.value.CopyFrom(value)
    for name, dtype, shape in outputs:
      made.outputs.add(name=name, type=self._type(dtype, shape))
    label = made.attributes['name']
    label.type.CopyFrom(self._type('STRING', ()))
    # that of the last output is the one of the constant, and known to be unique
    label.immediateValue.tensor.strings.values.append(outputs[-1][0])
    return made

  def _array(self, array: Shaped[np.ndarray, '...']) -> Any:
    dtype = self._dtype(array)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return self._value(dtype, array.shape, blob_files.Blob(blob_files.KINDS[dtype], data))

  def _numbers(self, numbers: UInt8[np.ndarray, '...'], bits: int) -> Any:
    blob = blob_files.packed(np.ascontiguousarray(numbers).reshape(-1), bits)
    return self._value(f'UINT{bits}', numbers.shape, blob)

  def _mask(self, is_stored: Bool[np.ndarray, '...']) -> Any:
    return self._numbers(is_stored.view(np.uint8), 1)

  def _value(self, dtype: str, shape: Sequence[int], blob: blob_files.Blob) -> Any:
    value = self._classes.Value(type=self._type(dtype, shape))
    value.blobFileValue.fileName = self._file_name
    value.blobFileValue.offset = self._writer.add(blob)
    return value

  def _type(self, dtype: str, shape: Sequence[int]) -> Any:
    made = self._classes.ValueType()
    tensor = made.tensorType
    tensor.dataType, tensor.rank = self._classes.DataType.Value(dtype), len(shape)
    for size in shape:
      tensor.dimensions.add().constant.size = size
    return made

  def _dtype(self, array: Shaped[np.ndarray, '...']) -> str:
    return array.dtype.name.upper()

  def _fresh(self, output: str, kind: str) -> str:
    """Returns a name that the program does not have yet."""
    return fresh_name(f'{output}_{kind}', self._taken)
