"""Reads `.opq` files by docs/format.md alone, in plain Python.

It imports nothing of the library.  numpy makes the arrays and rounds to float32.  It decodes a few
thousand weights a second and checks no more than it needs: its purpose is to hold the page to the
files.
"""

import bisect
import itertools
import json
import lzma
import math
import re
import zlib
from fractions import Fraction

import ml_dtypes  # adds bfloat16 and the float8 types to numpy's names too
import numpy as np

BLOCK = 1 << 20
EDGES = (1, 3, 6, 10, 16, 28, 48, 90, 160)


class Bits:
  """Bits of a string of bytes, the highest first."""

  def __init__(self, data):
    self.text = ''.join(f'{byte:08b}' for byte in data)
    self.place = 0

  def take(self, count):
    self.place += count
    return int(self.text[self.place - count : self.place] or '0', 2)

  def golomb(self, order):
    """Reads an exponential Golomb code."""
    zeros = 0
    while self.take(1) == 0:
      zeros += 1
    rest = self.take(zeros + order)
    return (1 << (zeros + order)) + rest - (1 << order)

  def bytes_read(self):
    return -(-self.place // 8)


def read_table(bits):
  """Returns {symbol: frequency} in the order of the table, and the precision."""
  precision = bits.take(4) + 1
  largest, least = bits.golomb(2), -bits.golomb(2)
  symbols = sorted(range(least, largest + 1), key=lambda s: (abs(s), s < 0))
  frequencies, previous = [0], (1 << precision) >> 3
  for _ in symbols[1:]:
    previous = bits.golomb(max(0, previous.bit_length() - 2))
    frequencies.append(previous)
  frequencies[0] = (1 << precision) - sum(frequencies)
  used = {s: f for s, f in zip(symbols, frequencies, strict=True) if f}
  return used, precision


class Coder:
  """An asymmetric numeral system: a head of 64 bits above a stack of words of 32 bits."""

  def __init__(self, data):
    data += bytes(-len(data) % 4)
    self.words = np.frombuffer(data, '<u4').tolist()
    self.head = 0
    for _ in range(min(2, len(self.words))):
      self.head = self.head << 32 | self.words.pop()

  def take(self, symbols, bounds, precision):
    slot = self.head & ((1 << precision) - 1)
    place = bisect.bisect_right(bounds, slot) - 1
    share = bounds[place + 1] - bounds[place]
    self.head = (self.head >> precision) * share + slot - bounds[place]
    if self.head < 1 << 32 and self.words:
      self.head = self.head << 32 | self.words.pop()
    return symbols[place]

  def check_end(self, codes, head=b''):
    checksum = zlib.crc32(np.asarray(codes, np.int8).tobytes(), zlib.crc32(head))
    assert not self.words and self.head == checksum | 1 << 31, 'found another checksum'


def bounds_24(table):
  """Returns symbols, the bounds of their shares of 2**24, and 24."""
  used, precision = table
  sums = [0, *itertools.accumulate(used.values())]
  free = (1 << 24) - len(used)
  bounds = [math.floor(Fraction(c * free, 1 << precision)) + i for i, c in enumerate(sums[:-1])]
  return list(used), [*bounds, 1 << 24], 24


def bounds_own(table):
  """Returns symbols, the bounds of their shares of 2**precision, and the precision."""
  used, precision = table
  return list(used), [0, *itertools.accumulate(used.values())], precision


def read_payload(data, shape):
  """Returns the codes of a payload, flat, in C order."""
  size = math.prod(shape)
  if size == 0:
    return []
  marker = Bits(data[:2]).take(10)
  if marker in (0b0000100100, 0b0001100100):
    return read_contexts(data, shape, marker == 0b0001100100)
  bits = Bits(data)
  model = bounds_24(read_table(bits))
  coder = Coder(data[bits.bytes_read() :])
  codes = [coder.take(*model) for _ in range(size)]
  coder.check_end(codes)
  return codes


def read_contexts(data, shape, has_trellis):
  bits = Bits(data)
  bits.take(10)
  arrangement = bits.take(2)
  scored = [read_table(bits) if bits.take(1) else None for _ in range(3)]
  count = bits.golomb(2) + 1
  starts = []
  for i in range(count - 1):
    starts.append(starts[-1] + 1 + bits.golomb(2) if i else bits.golomb(8))
  tables = [read_table(bits) for _ in range(count * (2 if has_trellis else 1))]
  end = bits.bytes_read()
  coder = Coder(data[end:])

  places = np.arange(math.prod(shape)).reshape(shape)
  if arrangement == 0:
    window, places = shape[:-2], places.reshape(-1, *shape[-2:])
  elif arrangement == 1:
    window, places = shape[2:], np.moveaxis(places.reshape(*shape[:2], -1), -1, 0)
  elif arrangement == 2:
    window, places = (), places.reshape(1, -1, shape[-1])
  else:
    window, places = (), places.reshape(1, shape[0], -1)
  taps, inputs, outputs = places.shape
  scores = [
    [coder.take(*bounds_24(table)) for _ in range(n)] if table else [0] * n
    for table, n in zip(scored, (inputs, outputs, 1 + 2 * (len(EDGES) + 1)), strict=True)
  ]
  models = [(bounds_own if has_trellis else bounds_24)(table) for table in tables]
  kernel = np.zeros(places.shape, int)  # codes, or along a trellis indices in their subsets
  subsets = np.zeros(places.shape, int)
  state, rows = 0, (1 << 18) // outputs
  for tap in range(taps):
    beside = neighbours(window, tap) if scored[2] else []
    for begin in range(0, inputs, rows):
      block = []
      for i, o in itertools.product(range(begin, min(begin + rows, inputs)), range(outputs)):
        level, sign = level_of([(w, int(kernel[t, i, o])) for t, w in beside])
        kind = (level - 1) % 2 if level else 0
        score = scores[0][i] + scores[1][o] + scores[2][level] + 384 + 768 * kind
        block.append((bisect.bisect_right(starts, score), i, o, sign))
      if not has_trellis:  # range by range
        block.sort(key=lambda weight: weight[0])
      for r, i, o, sign in block:
        if not has_trellis:
          kernel[tap, i, o] = sign * coder.take(*models[r])
          continue
        subset = (state & 9).bit_count() & 1
        index = coder.take(*models[2 * r + subset])
        kernel[tap, i, o], subsets[tap, i, o] = sign * index, subset
        state = (state << 1) & 31 | (((state & 29).bit_count() & 1) ^ (index & 1))
  codes = np.zeros(places.size, int)
  codes[places] = 2 * kernel - np.sign(kernel) * subsets if has_trellis else kernel
  coder.check_end(codes, data[:end])
  return codes.tolist()


def neighbours(window, tap):
  """Returns earlier taps, one step away along one axis or two, with their weights."""
  place = np.unravel_index(tap, window)
  found = []
  for offset in itertools.product((-1, 0, 1), repeat=len(window)):
    other = [int(a) + b for a, b in zip(place, offset, strict=True)]
    inside = all(0 <= a < n for a, n in zip(other, window, strict=True))
    steps = sum(map(abs, offset))
    if offset < (0,) * len(window) and steps <= 2 and inside:
      found.append((int(np.ravel_multi_index(other, window)), 6 if steps == 1 else 1))
  return found


def level_of(beside):
  """Returns the level of a weight's neighbours, and the factor of its sign."""
  if not beside:
    return 0, 1
  signed = sum(w * c for w, c in beside)
  magnitude = sum(w * abs(c) for w, c in beside)
  twelfths = 12 * magnitude // sum(w for w, _ in beside)
  level = 1 + 2 * bisect.bisect_right(EDGES, twelfths) + (2 * abs(signed) >= magnitude)
  return level, -1 if signed < 0 else 1


def read_escapes(data, count, dtype):
  """Returns positions and values of the escaped weights of a section."""
  assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], 'little')
  place = 4 + int.from_bytes(data[:4], 'little')
  buckets = read_payload(data[4:place], (count,))
  gaps = []
  for begin in range(0, count, 1 << 16):
    bits = Bits(data[place:-4])
    for bucket in buckets[begin : begin + (1 << 16)]:
      gaps.append((1 << (bucket - 1)) + bits.take(bucket - 1) if bucket else 0)
    place += bits.bytes_read()
  positions = np.cumsum(np.array(gaps) + 1) - 1
  size = int.from_bytes(data[place : place + 4], 'little')
  usual, place = data[place + 4], place + 5
  heads = [(h + usual) % 256 for h in read_payload(data[place : place + size], (count,))]
  rests, width = data[place + size : -4], np.dtype(dtype).itemsize
  numbers, sign_bits = [], Bits(rests)
  for i, head in enumerate(heads):
    if width == 1:
      numbers.append(sign_bits.take(1) << 7 | head)
      continue
    rest = int.from_bytes(rests[i * (width - 1) : (i + 1) * (width - 1)], 'little')
    low = 8 * width - 9
    numbers.append(rest >> low << (8 * width - 1) | head << low | rest & ((1 << low) - 1))
  return positions, np.array(numbers, f'<u{width}').view(dtype)


def unpack(data, period):
  place = {1: 0, 4: 2}[period]
  filters = [{'id': lzma.FILTER_LZMA1, 'dict_size': BLOCK, 'lc': 0, 'lp': place, 'pb': 0}]
  return lzma.decompress(data, lzma.FORMAT_RAW, filters=filters)


def read_value(k, threshold, first, step, levels, dtype):
  """Returns the value of cell k = 0, 1, ... in the dtype of the leaf, inside its cell."""
  exact = np.float32(first) + np.float32(step) * np.float32(k)
  value = np.array(exact).astype(dtype)
  if np.dtype(dtype).itemsize >= 4:
    return value
  cell = lambda v: math.floor((np.float32(v) - threshold) * (np.float32(1) / step))
  unsigned = np.dtype(f'u{value.dtype.itemsize}')
  if cell(value) < k:
    return (value.view(unsigned) + unsigned.type(1)).view(dtype)
  if cell(value) > k and k < levels - 1:
    return (value.view(unsigned) - unsigned.type(1)).view(dtype)
  return value


def read_table_of_values(grid, levels, dtype):
  """Returns {code: value} of a grid."""
  values = [read_value(k, *grid, levels, dtype) for k in range(levels)]
  zero = np.zeros((), dtype)
  table = {0: zero} | {k + 1: v for k, v in enumerate(values)}
  return table | {-k - 1: -v for k, v in enumerate(values)}


def read_slice(payload, shape, grid, levels, escapes, section, scales, dtype):
  """Returns the values of a leaf or of a slice, flat.

  `scales` are the bytes of their section, and the axis of the payload's array that has them.
  """
  size, axis = scales
  factors = [np.float32(1)] * (shape[axis] if size else 1)
  if size:
    codes = read_payload(payload[:size], (shape[axis],))
    factors = [np.float32((1 + c % 8 / 8) * 2.0 ** (c // 8)) for c in codes]
  tables = [read_table_of_values([f * x for x in grid], levels, dtype) for f in factors]
  end = len(payload) - section
  codes = read_payload(payload[size:end], shape)
  output = np.indices(shape)[axis].reshape(-1) if size else [0] * len(codes)
  array = np.array([tables[j][code] for j, code in zip(output, codes, strict=True)], dtype)
  if escapes:
    positions, escaped = read_escapes(payload[end:], escapes, dtype)
    array[positions] = escaped
  return array


def turned_back(rows):
  """Returns Q times rows, one row at a time; of rotated inputs these are the weights."""
  inputs, rows = len(rows), [row.astype(np.float32) for row in rows]
  size = 2 ** (inputs.bit_length() - 1)
  passes = [(inputs - size, inputs), (0, 0)] if size < inputs else [(0, 0)]
  for begin, first_sign in passes:
    for bit in range(size.bit_length() - 1):
      for i in range(size):
        if not i >> bit & 1:
          low, high = begin + i, begin + i + 2**bit
          rows[low], rows[high] = rows[low] + rows[high], rows[low] - rows[high]
    for i in range(size):
      rows[begin + i] = rows[begin + i] * np.float32(size**-0.5)
    for i in range(inputs):
      rows[i] = rows[i] * np.float32(sign_of(first_sign + i))
  return np.stack(rows)


def sign_of(number):
  """Returns the sign of a number, 1 or -1."""
  hashed = number + 1
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    hashed = (hashed ^ hashed >> shift) * factor % 2**32
  return -1 if hashed >> 31 else 1


def read_parts(path):
  """Returns the parts of a file by name, and its index."""
  with open(path, 'rb') as file:
    data = file.read()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  assert header['__metadata__']['format'] == 'opq' and header['__metadata__']['version'] in '123'
  part = {}
  for name in ('grids', 'index', 'codes', 'uncompressed', 'files'):
    if name not in header:  # files are not in every file
      continue
    begin, end = header[name]['data_offsets']
    part[name] = data[8 + length + begin : 8 + length + end]
  checksum = zlib.crc32(part['index'], zlib.crc32(part['grids']))
  assert f'{checksum:08x}' == header['__metadata__']['crc32']
  return part, json.loads(unpack(part['index'], 1))


def read_side_files(path):
  """Returns {name: bytes} of the side files of a file."""
  part, index = read_parts(path)
  size, expected, sizes = index['files']
  assert size == len(part['files']) and zlib.crc32(part['files']) == expected
  filters = [{'id': lzma.FILTER_LZMA1, 'dict_size': 1 << 23, 'lc': 4, 'lp': 0, 'pb': 0}]
  data = lzma.decompress(part['files'], lzma.FORMAT_RAW, filters=filters)
  ends = list(itertools.accumulate(sizes.values()))
  assert ends[-1] == len(data) and list(sizes) == sorted(sizes)
  return {name: data[end - sizes[name] : end] for name, end in zip(sizes, ends, strict=True)}


def read(path):
  """Returns {path name: array} and the metadata of a file."""
  part, index = read_parts(path)
  blocks, raw = part['uncompressed'], b''
  for size, expected in zip(index['blocks'][::2], index['blocks'][1::2], strict=True):
    assert zlib.crc32(blocks[:size]) == expected
    raw, blocks = raw + unpack(blocks[:size], 4), blocks[size:]

  names = [name for name, _ in leaves(index['tree'])]
  arrays, grids, codes_at, raw_at = {}, iter(np.frombuffer(part['grids'], '<f4').tolist()), 0, 0
  for name, text in leaves(index['tree']):
    tie = re.fullmatch(r'\S+ (same|transposed)=(\d+)', text)
    if tie:
      earlier = arrays[names[int(tie[2])]]
      arrays[name] = earlier.T.copy() if tie[1] == 'transposed' else earlier
      continue
    match = re.match(
      r'(\w+)\[([\d,]*)\](?: ([\d,]+) ([\d,]+))?(?: axes=([\d,]+))?(?: escapes=([\d,]+))?'
      r'(?: rotated=(\d+))?(?: scales=([\d,]+))?(?: slices=(\d+))?',
      text,
    )
    dtype = np.dtype(match[1])
    shape = tuple(map(int, match[2].split(','))) if match[2] else ()
    if match[3] is None:
      raw_at += -raw_at % dtype.itemsize
      size = math.prod(shape) * dtype.itemsize
      arrays[name] = np.frombuffer(raw[raw_at : raw_at + size], dtype).reshape(shape)
      raw_at += size
      continue
    listed = lambda text: list(map(int, text.split(',')))
    leading = int(match[9] or 0)
    count, own_shape = math.prod(shape[:leading]), shape[leading:]
    axes = listed(match[5]) if match[5] else list(range(len(own_shape)))
    coded_shape = tuple(own_shape[axis] for axis in axes)
    levels, stored = listed(match[3]), listed(match[4])
    escapes = listed(match[6]) if match[6] else [0, 0] * count
    scale_axis, *scales = listed(match[8]) if match[8] else [0] * (1 + count)
    slices = zip(levels, stored, escapes[::2], escapes[1::2], scales, strict=True)
    arrays[name] = []
    for own_levels, size, escaped, section, scale_bytes in slices:
      grid = [np.float32(next(grids)) for _ in range(3)]
      payload = part['codes'][codes_at : codes_at + size]
      codes_at += size
      own = scale_bytes, axes.index(scale_axis)
      of_codes = dtype if match[7] is None else np.dtype(np.float32)
      values = read_slice(payload, coded_shape, grid, own_levels, escaped, section, own, of_codes)
      values = values.reshape(coded_shape).transpose(np.argsort(axes))
      if match[7] is not None:
        values = np.moveaxis(turned_back(np.moveaxis(values, int(match[7]), 0)), 0, int(match[7]))
        largest = np.float32(min(float(ml_dtypes.finfo(t).max) for t in (dtype, np.float32)))
        values = np.clip(values, -largest, largest).astype(dtype)
      arrays[name].append(values)
    assert len(arrays[name]) == count
    arrays[name] = np.stack(arrays[name]).reshape(shape)
  return arrays, index['metadata']


def leaves(node, names=()):
  """Yields path names and notations in the order of JAX: keys of a dict are sorted."""
  if node is None:
    return
  if isinstance(node, str):
    yield '/'.join(names), node
  elif isinstance(node, list):
    for i, child in enumerate(node[1:]):
      yield from leaves(child, (*names, str(i)))
  else:
    keys = {}
    for key, child in node.items():
      is_number = key.startswith(':') and not key.startswith('::')
      keys[int(key[1:]) if is_number else key.removeprefix(':')] = child
    for key in sorted(keys):
      yield from leaves(keys[key], (*names, str(key)))
