"""The notation of a leaf in the index of a file (`opq_jax.file.index`), written and parsed."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from opq_jax.core.array_types import Int64
from opq_jax.core.limits import MAX_LEVELS

# written out, because every release of ml_dtypes has more: a file is to be read with all of them
_OF_NUMPY = (
  *('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64'),
  *('float16', 'float32', 'float64', 'complex64', 'complex128'),
)
_OF_ML_DTYPES = (
  *('bfloat16', 'float8_e3m4', 'float8_e4m3', 'float8_e4m3b11fnuz', 'float8_e4m3fn'),
  *('float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz', 'float8_e8m0fnu', 'float6_e2m3fn'),
  *('float6_e3m2fn', 'float4_e2m1fn', 'int2', 'int4', 'uint2', 'uint4'),
  *('int1', 'uint1', 'complex32', 'bcomplex32'),  # from 0.6 on
)

DTYPES = {name: np.dtype(name) for name in _OF_NUMPY} | {
  name: np.dtype(getattr(ml_dtypes, name)) for name in _OF_ML_DTYPES if hasattr(ml_dtypes, name)
}
"""The dtypes that a leaf may have, by name."""

# ASCII, because `\d` would take the digits of all scripts
_LEAF = re.compile(
  r'(?P<dtype>\w+)\[(?P<shape>[\d,]*)\]( (?P<levels>[\d,]+) (?P<stored>[\d,]+))?'
  r'(?P<fields>( [a-z_]+=[^ ]+)*)',
  re.ASCII,
)
_SLICES = re.compile(r'[1-9]\d?', re.ASCII)
_NUMBER = re.compile(r'\d{1,18}', re.ASCII)
_TIES = ('same', 'transposed')  # fields of a leaf that is an earlier one again
_FIELDS = ('axes', 'escapes', 'rotated', 'same', 'scales', 'slices', 'transposed')
_DIGITS = 18  # of a number at most, so that it fits int64
_LIST = re.compile(r'[\d,]+', re.ASCII)
_LONG = re.compile(rf'\d{{{_DIGITS + 1}}}', re.ASCII)


class SliceEntry(NamedTuple):
  """One slice of a compressed leaf in the index, or a leaf without slices.

  Attributes:
    levels: cells a sign.
    stored: bytes of its payload.
    escapes: how many of its weights are escaped.
    escape_bytes: bytes of the section of escaped weights, at the end of the payload.
    scale_bytes: bytes of the section of output scales, at its begin; 0 where there are none.
  """

  levels: int
  stored: int
  escapes: int = 0
  escape_bytes: int = 0
  scale_bytes: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class LeafEntry:
  """One leaf in the index.

  Attributes:
    dtype, shape: the leaf's own.
    stored: bytes of all its payloads; of an uncompressed leaf, its own bytes.
    table: of a compressed leaf, a row with the fields of `SliceEntry` for each of its slices in C
      order, or for itself; None where it is not compressed.
    slices: leading axes that count slices.
    axes: the order in which the payloads have the other axes, counted from 0 behind the slices; ()
      where they stay as they are.
    scale_axis: the axis whose outputs have scales, counted as `axes` are; None without scales.
    rotated_axis: the axis whose inputs are rotated, counted as `axes` are; None where none are.
    begin: where its bytes begin in `codes`, or in the unpacked bytes of `uncompressed`.
    tied_to: of a leaf that is an earlier one again, the number of that leaf; None of all others.
      Once it is placed, its other numbers are those of that leaf.
    is_transposed: whether it is the transpose of that leaf.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  stored: int
  table: Int64[np.ndarray, 'slices 5'] | None = None
  slices: int = 0
  axes: tuple[int, ...] = ()
  scale_axis: int | None = None
  rotated_axis: int | None = None
  begin: int = 0
  tied_to: int | None = None
  is_transposed: bool = False

  @property
  def nbytes(self) -> int:
    """Bytes of the leaf, decoded."""
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def coded_shape(self) -> tuple[int, ...]:
    """Shape of the array that the payload codes, of slices that of each."""
    own = self.shape[self.slices :]
    return tuple(own[axis] for axis in self.axes) if self.axes else own

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Shape of the slices' axes; () without slices."""
    return self.shape[: self.slices]

  @property
  def grid_dtype(self) -> np.dtype:
    """Dtype of what its codes stand for: of a rotated leaf float32, whatever its own."""
    return self.dtype if self.rotated_axis is None else np.dtype(np.float32)

  @property
  def rows(self) -> int:
    """How many payloads it has, each with a row of grids; 0 where the leaf is not compressed."""
    return 0 if self.table is None else len(self.table)

  @property
  def has_escapes(self) -> bool:
    """Whether some of its weights are escaped."""
    return self.table is not None and bool(self.table[:, 2].any())

  def parts(self) -> Iterator[SliceEntry]:
    """Returns the slices of a compressed leaf in C order, or itself."""
    # one at a time: a hostile index may list a million
    return (SliceEntry(*map(int, row)) for row in (() if self.table is None else self.table))


def spec(dtype: np.dtype, shape: tuple[int, ...]) -> str:
  """Returns the notation of an uncompressed leaf; that of every leaf begins so.

  >>> spec(np.dtype(np.float32), (3, 16))
  'float32[3,16]'
  """
  return f'{dtype.name}[{",".join(map(str, shape))}]'


def compressed_spec(
  dtype: np.dtype,
  shape: tuple[int, ...],
  parts: Sequence[SliceEntry],
  slices: int = 0,
  axes: tuple[int, ...] = (),
  scale_axis: int | None = None,
  rotated_axis: int | None = None,
) -> str:
  """Returns the notation of a compressed leaf (see `LeafEntry`).

  >>> compressed_spec(np.dtype(np.float32), (3, 16), [SliceEntry(9, 141, 2, 40)])
  'float32[3,16] 9 141 escapes=2,40'
  >>> compressed_spec(np.dtype(np.float32), (2, 3, 16), [SliceEntry(9, 99), SliceEntry(7, 80)], 1)
  'float32[2,3,16] 9,7 99,80 slices=1'
  >>> compressed_spec(np.dtype(np.float32), (3, 16), [SliceEntry(9, 141)], axes=(1, 0))
  'float32[3,16] 9 141 axes=1,0'
  >>> compressed_spec(np.dtype(np.float32), (3, 16), [SliceEntry(9, 141, 0, 0, 22)], scale_axis=1)
  'float32[3,16] 9 141 scales=1,22'
  >>> compressed_spec(np.dtype(np.float32), (3, 16), [SliceEntry(9, 141)], rotated_axis=0)
  'float32[3,16] 9 141 rotated=0'
  """
  listed = lambda numbers: ','.join(map(str, numbers))
  text = f'{spec(dtype, shape)} {listed(p.levels for p in parts)} {listed(p.stored for p in parts)}'
  if axes:
    text += f' axes={listed(axes)}'
  if any(part.escapes for part in parts):
    text += f' escapes={listed(n for part in parts for n in (part.escapes, part.escape_bytes))}'
  if rotated_axis is not None:
    text += f' rotated={rotated_axis}'
  if scale_axis is not None:
    text += f' scales={listed([scale_axis, *(part.scale_bytes for part in parts)])}'
  return f'{text} slices={slices}' if slices else text


def tied_spec(dtype: np.dtype, shape: tuple[int, ...], number: int, is_transposed: bool) -> str:
  """Returns the notation of a leaf that is an earlier one again.

  >>> tied_spec(np.dtype(np.float32), (16, 3), 0, True)
  'float32[16,3] transposed=0'
  """
  return f'{spec(dtype, shape)} {_TIES[is_transposed]}={number}'


def can_be_compressed(dtype: np.dtype) -> bool:
  """Returns whether a compressed leaf may have this dtype: floats of whole bytes that know 0."""
  if dtype.kind == 'c':  # whose `finfo` is that of its parts
    return False
  try:
    info = ml_dtypes.finfo(dtype)
  except ValueError:  # not of floats
    return False
  # floats of 4 and 6 bits fill bytes only in part; float8_e8m0fnu has no mantissa, and no zero
  return bool(info.bits == 8 * dtype.itemsize and info.nmant > 0)


def parsed_leaf(text: str) -> LeafEntry:
  """Parses the notation of a leaf.

  Raises:
    ValueError: it is none, or no file can hold such a leaf.
  """
  match = _LEAF.fullmatch(text)
  if match is None or match['dtype'] not in DTYPES:
    raise ValueError(f'found leaf {text[:80]!r}, expected dtype and shape, or levels and bytes too')
  dtype = DTYPES[match['dtype']]
  shape = tuple(map(int, _numbers(text, match['shape']))) if match['shape'] else ()
  # limits of NumPy, which multiplies all axes but those of 0 elements; sizes below fit int64
  if len(shape) > 64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 62:
    raise ValueError(f'found leaf {text[:80]!r}, expected a shape that an array can have')
  fields = _parsed_fields(match['fields'])
  ties = [name for name in fields if name in _TIES]
  if match['levels'] is None:
    if len(fields) > len(ties) or len(ties) > 1:
      raise ValueError(f'found leaf {text[:80]!r}, expected fields of compressed leaves only')
    if ties:
      if _NUMBER.fullmatch(fields[ties[0]]) is None:
        raise ValueError(f'found leaf {text[:80]!r}, expected {ties[0]}=NUMBER')
      number, is_transposed = int(fields[ties[0]]), ties[0] == 'transposed'
      return LeafEntry(dtype, shape, 0, tied_to=number, is_transposed=is_transposed)
    return LeafEntry(dtype, shape, math.prod(shape) * dtype.itemsize)
  if ties:
    raise ValueError(f'found leaf {text[:80]!r}, expected no payload of a leaf with {ties[0]}')
  table, slices = _parsed_table(text, shape, match, fields)
  axes = _parsed_axes(text, fields['axes'], len(shape) - slices) if 'axes' in fields else ()
  rotated_axis, scale_axis = None, None
  if 'rotated' in fields:
    rotated_axis = _parsed_axis(text, fields['rotated'], len(shape) - slices)
  if 'scales' in fields:
    scale_axis, table[:, 4] = _parsed_scales(text, fields['scales'], len(shape) - slices, table)
  if table[:, 0].max() > MAX_LEVELS or not can_be_compressed(dtype):
    raise ValueError(
      f'found leaf {text[:80]!r}, expected floats of whole bytes, of at most {MAX_LEVELS} levels'
    )
  # Python's integers: the sum of hostile sizes does not wrap around
  stored = sum(map(int, table[:, 1]))
  return LeafEntry(dtype, shape, stored, table, slices, axes, scale_axis, rotated_axis)


def _parsed_axes(text: str, listed: str, count: int) -> tuple[int, ...]:
  """Returns the order of axes of a compressed leaf."""
  axes, own = tuple(map(int, _numbers(text, listed))), tuple(range(count))
  # one notation for each order
  if tuple(sorted(axes)) != own or axes == own or listed != ','.join(map(str, axes)):
    raise ValueError(f'found leaf {text[:80]!r}, expected axes= with another order of its axes')
  return axes


def _parsed_axis(text: str, listed: str, count: int) -> int:
  """Returns the axis whose inputs are rotated."""
  if _NUMBER.fullmatch(listed) is None or int(listed) >= count or str(int(listed)) != listed:
    raise ValueError(f'found leaf {text[:80]!r}, expected rotated=AXIS that it can have')
  return int(listed)


def _parsed_scales(
  text: str, listed: str, count: int, table: Int64[np.ndarray, 'slices 5']
) -> tuple[int, Int64[np.ndarray, ' slices']]:
  """Returns the axis of output scales, and the bytes of the section of every slice."""
  axis, *sizes = (int(n) for n in _numbers(text, listed))
  fits = axis < count and len(sizes) == len(table)
  if not fits or not all(0 < n <= row[1] - row[3] for n, row in zip(sizes, table, strict=True)):
    raise ValueError(f'found leaf {text[:80]!r}, expected scales=AXIS,BYTES that it can have')
  return axis, np.array(sizes, np.int64)


def _parsed_table(
  text: str, shape: tuple[int, ...], match: re.Match[str], fields: dict[str, str]
) -> tuple[Int64[np.ndarray, 'slices 5'], int]:
  """Returns the table of a compressed leaf, and how many of its axes count slices.

  Its last column is 0.
  """
  slices = 0
  if 'slices' in fields:
    slices = int(fields['slices']) if _SLICES.fullmatch(fields['slices']) else len(shape)
    if slices >= len(shape):
      raise ValueError(
        f'found leaf {text[:80]!r}, expected slices=N of 1 or more, and fewer than its axes'
      )
  count = math.prod(shape[:slices])
  levels, stored = _numbers(text, match['levels']), _numbers(text, match['stored'])
  if not len(levels) == len(stored) == count:
    raise ValueError(
      f'found leaf {text[:80]!r} of {len(levels)} levels and {len(stored)} sizes, expected {count} '
      f'of each{", one for every slice" if slices else ""}'
    )
  escapes = np.zeros((count, 2), np.int64)
  if 'escapes' in fields:
    listed = _numbers(text, fields['escapes'])
    fits = len(listed) == 2 * count and listed.any()
    escapes = listed.reshape(-1, 2) if fits else escapes
    counts, sizes = escapes.T
    # one count and one number of bytes for every slice, and not all of them 0
    fits = fits and (counts <= math.prod(shape[slices:])).all() and (sizes <= stored).all()
    if not fits or ((counts > 0) != (sizes > 0)).any():
      raise ValueError(f'found leaf {text[:80]!r}, expected escapes=COUNT,BYTES that it can have')
  return np.column_stack([levels, stored, escapes, np.zeros(count, np.int64)]), slices


def _numbers(text: str, listed: str) -> Int64[np.ndarray, ' n']:
  """Returns the numbers of a list with commas in between.

  Raises:
    ValueError: it is no such list, or a number has too many digits; with the text of the leaf.
  """
  has_gap = listed.startswith(',') or listed.endswith(',') or ',,' in listed
  if not _LIST.fullmatch(listed) or has_gap or _LONG.search(listed):
    raise ValueError(f'found leaf {text[:80]!r}, expected numbers of 1 to {_DIGITS} digits')
  # no object for each of a million numbers
  return np.fromstring(listed, np.int64, sep=',')


def _parsed_fields(text: str) -> dict[str, str]:
  """Returns the fields of an entry by name."""
  pairs = [field.split('=', 1) for field in text.split(' ')[1:]]
  names = [name for name, _ in pairs]
  for name in names:
    # a field says what bytes mean: weights read without it would be wrong ones
    if name not in _FIELDS:
      raise ValueError(
        f'found field {name}, which a newer opq_jax wrote, expected one of {", ".join(_FIELDS)}'
      )
  if names != sorted(set(names)):
    raise ValueError(f'found fields {names}, expected every name once, in order')
  return dict(pairs)
