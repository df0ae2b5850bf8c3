"""Random `.opq` files of every kind that the format knows: a file is drawn by its number alone.

Trees of all containers and odd keys; leaves of all dtypes; payloads plain, with contexts and along
a trellis, of several arrangements; escaped weights, slices, moved axes, scales of outputs, rotated
inputs, leaves that are earlier ones again, side files; versions 1 to 3.
"""

import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int8, Shaped

from opq_jax.coding import output_scales, trellis
from opq_jax.coding.frequencies import histogram
from opq_jax.core import plain_trees
from opq_jax.core.limits import ESCAPE
from opq_jax.file import checks, leaf_entries, packing, side_files, writer
from opq_jax.file.coded_leaves import CodedSlice, Rotation
from opq_jax.file.front import front_bytes
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids
from opq_jax.file.written_leaves import write_leaf

DTYPES = list(leaf_entries.DTYPES.values())
FLOATS = [dtype for dtype in DTYPES if leaf_entries.can_be_compressed(dtype)]

# one of so many leaves is larger than a block of weights, or than one of uncompressed leaves
_LARGE = 300


class _Written(NamedTuple):
  """A leaf of a file.

  Attributes:
    spec: its notation.
    grids: the rows of its slices.
    payloads: of a compressed leaf.
    raw: the bytes of any other.
    version: the least version that holds it.
  """

  spec: str
  grids: list[list[np.float32]]
  payloads: list[bytes]
  raw: bytes
  version: str


class _Drawn(NamedTuple):
  """What later leaves may be again."""

  number: int
  dtype: np.dtype
  shape: tuple[int, ...]
  is_compressed: bool
  slices: int


def random_file(number: int) -> bytes:
  """Returns the bytes of file `number`."""
  rng = np.random.default_rng(number)
  tree = _tree(rng, itertools.count(), 0)
  order = list(plain_trees.named_leaves(tree).values())
  specs: dict[int, str] = {}
  grids: list[list[np.float32]] = []
  payloads: list[bytes] = []
  raw, versions, drawn = bytearray(), ['1'], []
  for place, key in enumerate(order):
    if drawn and rng.random() < 0.15:
      specs[key] = _tied(rng, drawn)
      versions.append(writer.TIED_VERSION)
      continue
    is_compressed = bool(rng.random() < 0.7)
    dtype = _pick(rng, FLOATS if is_compressed else DTYPES)
    if is_compressed and rng.random() < 0.5:
      dtype = np.dtype(np.float32)
    shape = _shape(rng)
    slices = int(rng.integers(1, len(shape))) if len(shape) > 1 and rng.random() < 0.3 else 0
    slices = slices if is_compressed and 0 < math.prod(shape[:slices]) <= 12 else 0
    leaf = _compressed(rng, dtype, shape, slices) if is_compressed else _plain(rng, dtype, shape)
    specs[key] = leaf.spec
    grids += leaf.grids
    payloads += leaf.payloads
    versions.append(leaf.version)
    if not is_compressed:
      raw += bytes(-len(raw) % dtype.itemsize) + leaf.raw
    drawn.append(_Drawn(place, dtype, shape, is_compressed, slices))
  starts = range(0, len(raw), packing.BLOCK)
  blocks = [packing.pack(raw[at : at + packing.BLOCK], packing.FLOAT_PERIOD) for at in starts]
  carried, packed = None, b''
  if rng.random() < 0.2:
    carried, packed = side_files.packed_files(_side_files(rng))
  front = front_bytes(
    _with_specs(tree, specs),
    grids,
    sum(map(len, payloads)),
    [(len(block), zlib.crc32(block)) for block in blocks],
    {text: _pick(rng, _TEXTS) for text in _some(rng, _TEXTS, int(rng.integers(0, 3)))},
    max(versions),
    carried,
  )
  return b''.join([front, *payloads, *blocks, packed])


_TEXTS = ['', 'a', 'model', '[{"', 'é', ':', '\U0001f600', '\ud800', '\uffee', '7', '__proto__']
_NAMES = [*_TEXTS, 'kernel', 'bias', 'b', 'B', 'constructor', '0']


def _pick(rng: np.random.Generator, choices: Any) -> Any:
  return choices[int(rng.integers(len(choices)))]


def _some(rng: np.random.Generator, choices: list[str], count: int) -> list[str]:
  """Returns a few of the choices, in any order."""
  return [choices[i] for i in rng.permutation(len(choices))[:count]]


def _tree(rng: np.random.Generator, count: Iterator[int], depth: int) -> Any:
  """Returns a tree of numbers, each once."""
  if rng.random() < (0.2 * depth or 0.03):
    return None if rng.random() < 0.1 else next(count)
  children = [_tree(rng, count, depth + 1) for _ in range(rng.integers(0 if depth else 1, 4))]
  match rng.integers(6):
    case 0:
      return children
    case 1:
      return tuple(children)
    case 2:
      keys = rng.choice(np.arange(-15, 15), len(children), replace=False).tolist()
      return dict(zip(keys, children, strict=True))
  # a key with '/' could give two leaves one path
  names = _NAMES if rng.random() < 0.5 else ['a/b', 'x', 'y']
  return dict(zip(_some(rng, names, len(children)), children, strict=True))


def _with_specs(node: Any, specs: dict[int, str]) -> Any:
  if isinstance(node, dict):
    return {key: _with_specs(child, specs) for key, child in node.items()}
  if isinstance(node, list | tuple):
    return type(node)(_with_specs(child, specs) for child in node)
  return None if node is None else specs[node]


def _shape(rng: np.random.Generator) -> tuple[int, ...]:
  """Returns a shape of 0 to 5 axes: of matrices, windows and stacks, most of them small."""
  if rng.random() < 1 / _LARGE:
    return _pick(rng, [(640, 500), (3, 3, 200, 170), (300_000,), (3, 70_000)])
  if rng.random() < 0.05:
    return tuple(rng.integers(0, 4, rng.integers(0, 6)).tolist())
  window = tuple(rng.integers(1, 4, rng.integers(0, 4)).tolist())
  # contexts are worth their tables where there are some thousand weights
  inputs, outputs = rng.integers(1, _pick(rng, [20, 20, 20, 60]), 2).tolist()
  match rng.integers(4):
    case 0:
      return (*window, inputs, outputs)
    case 1:
      return (outputs, inputs, *window)
    case 2:
      return (int(rng.integers(1, 5)), 4 * inputs, 4 * outputs)
  return (int(rng.integers(1, 400)),)


def _plain(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> _Written:
  size = math.prod(shape) * dtype.itemsize
  raw = rng.bytes(size) if rng.random() < 0.5 else bytes(size)
  if dtype.kind == 'b':
    raw = rng.integers(0, 2, size, np.uint8).tobytes()
  return _Written(leaf_entries.spec(dtype, shape), [], [], raw, '1')


def _tied(rng: np.random.Generator, drawn: list[_Drawn]) -> str:
  first = _pick(rng, drawn)
  can_turn = first.is_compressed and not first.slices and len(first.shape) == 2
  is_transposed = bool(can_turn and rng.random() < 0.7)
  shape = first.shape[::-1] if is_transposed else first.shape
  return leaf_entries.tied_spec(first.dtype, shape, first.number, is_transposed)


def _compressed(
  rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...], slices: int
) -> _Written:
  """Draws a compressed leaf: its payloads have moved axes where its codes follow the trellis so."""
  own, axes = shape[slices:], ()
  kind = _pick(rng, ['independent', 'smooth', 'scaled', 'sparse', 'zeros', 'trellis', 'trellis'])
  if 2 <= len(own) <= 5 and rng.random() < 0.3:
    axes = tuple(rng.permutation(len(own)).tolist())
    axes = axes if list(axes) != sorted(axes) else ()
  scale_axis = rotation = None
  if own and rng.random() < 0.15:
    scale_axis = int(rng.integers(len(own)))
  if own and rng.random() < 0.15:
    rotation = Rotation(int(rng.integers(len(own))), dtype)
  parts = [
    _slice(rng, dtype, own, axes, kind, scale_axis, rotation)
    for _ in range(math.prod(shape[:slices]))
  ]
  payloads: list[bytes] = []
  contexts = bool(rng.random() < 0.4)  # they take most of the time
  written = write_leaf(parts, shape, slices, payloads.append, contexts=contexts, axes=axes)
  return _Written(written.spec, written.grids, payloads, b'', written.version)


def _slice(
  rng: np.random.Generator,
  dtype: np.dtype,
  shape: tuple[int, ...],
  axes: tuple[int, ...],
  kind: str,
  scale_axis: int | None,
  rotation: Rotation | None,
) -> CodedSlice:
  """Draws the codes of one slice, in the order of its own axes."""
  dtype = dtype if rotation is None else np.dtype(np.float32)
  least_levels = 12 if kind in ('smooth', 'scaled') else 0
  grids, allowed = _grids(rng, dtype, least_levels, shape, scale_axis)
  coded = tuple(shape[axis] for axis in axes) if axes else shape
  is_escaped = rng.random(coded) < (_pick(rng, [0.01, 0.2, 1.0]) if rng.random() < 0.3 else 0)
  codes = None
  if kind == 'trellis':
    codes = _along_trellis(rng, is_escaped, allowed)
  if codes is None:
    codes = _codes(rng, coded, kind, allowed)
  codes = np.where(is_escaped, np.int8(ESCAPE), codes)
  if axes:
    codes = np.ascontiguousarray(codes.transpose(np.argsort(axes)))
  # sums of rotated weights are finite
  escaped = _finite(rng, dtype, int(is_escaped.sum()), is_small=rotation is not None)
  return CodedSlice(codes, escaped, grids, rotation)


def _grids(
  rng: np.random.Generator,
  dtype: np.dtype,
  least_levels: int,
  shape: tuple[int, ...],
  scale_axis: int | None,
) -> tuple[OutputGrids, Int8[np.ndarray, ' k']]:
  """Draws the grids of outputs, and returns them with the codes that all of them may have."""
  grid = _grid(rng, dtype, least_levels, has_scales=scale_axis is not None)
  grids = OutputGrids(grid)
  if scale_axis is not None and shape[scale_axis]:
    codes = rng.integers(-_pick(rng, [1, 8, 20]), 12, shape[scale_axis]).astype(np.int8)
    grids = OutputGrids(grid, output_scales.scales_of(codes), scale_axis)
  allowed = np.arange(-grid.levels, grid.levels + 1).astype(np.int8)
  for own in (grid,) if grids.scales is None else grids._each():
    if not _are_allowed(allowed, own):
      allowed = allowed[[_are_allowed(code[None], own) for code in allowed]]
  return grids, allowed


def _grid(rng: np.random.Generator, dtype: np.dtype, least_levels: int, has_scales: bool) -> Grid:
  """Draws a grid; with scales, one of few bits."""
  exponent = int(rng.integers(-40, 40)) if dtype.itemsize >= 4 else int(rng.integers(-4, 1))
  # multiples of a step are exact: 7 bits of a level, and 4 of a scale
  bits = 12 if has_scales else 17
  step = np.float32(_pick(rng, [1.0, 1.5, float(rng.integers(1, 1 << bits)) / (1 << bits - 1)]))
  step *= np.float32(2.0**exponent)
  levels = max(int(_pick(rng, [0, 1, 2, 5, 12, 127, rng.integers(1, 128)])), least_levels)
  begins, places = [0.0, 0.5, 1.0, rng.random() * 3], [0.5, 0.25, rng.random()]
  if has_scales:
    begins, places = begins[:-1], places[:-1]
  threshold = np.float32(step * np.float32(_pick(rng, begins)))
  first = threshold + np.float32(step * np.float32(_pick(rng, places)))
  grid = Grid(threshold, np.float32(first), step, levels, dtype)
  checks.check_grid('grid', grid, '2')
  return grid


def _are_allowed(codes: Int8[np.ndarray, ' k'], grid: Grid) -> bool:
  try:
    checks.check_cells('leaf', histogram(codes), grid)
  except ValueError:
    return False
  return True


def _codes(
  rng: np.random.Generator, shape: tuple[int, ...], kind: str, allowed: Int8[np.ndarray, ' k']
) -> Int8[np.ndarray, '...']:
  """Draws codes that are alike in some way; 0 in the place of codes that are not allowed."""
  size = _pick(rng, [0.5, 1.5, 6.0, 40.0])
  numbers = rng.laplace(scale=size, size=shape)
  if kind == 'smooth':
    # along all axes but the last two of a window, or all but the first two
    own = range(len(shape) - 2) if rng.random() < 0.5 else range(2, len(shape))
    for axis in own:
      numbers = np.cumsum(numbers, axis)
  if kind == 'scaled':
    for axis, length in enumerate(shape):
      scale = rng.gamma(0.5, size=length)
      numbers *= scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
  if kind == 'sparse':
    numbers *= rng.random(shape) < 0.05
  if kind == 'zeros':
    numbers *= 0
  codes = np.clip(np.rint(numbers), -127, 127).astype(np.int8)
  return np.where(np.isin(codes, allowed), codes, np.int8(0))


def _along_trellis(
  rng: np.random.Generator,
  is_escaped: Shaped[np.ndarray, '...'],
  allowed: Int8[np.ndarray, ' k'],
) -> Int8[np.ndarray, '...'] | None:
  """Draws codes that follow the trellis in C order, 0 where a weight is escaped."""
  known, state, codes = set(allowed.tolist()), 0, []
  subset_of, following = trellis.SUBSET_OF.tolist(), trellis.NEXT.tolist()
  magnitudes = rng.geometric(_pick(rng, [0.3, 0.5, 0.8]), is_escaped.size) - 1
  signs = rng.choice([-1, 1], is_escaped.size)
  drawn = zip(magnitudes.tolist(), signs.tolist(), is_escaped.flat, strict=True)
  for magnitude, sign, escaped in drawn:
    code = sign * max(0, 2 * magnitude - subset_of[state]) if not escaped else 0
    code = code if code in known else 0
    codes.append(code)
    state = following[state][((abs(code) + 1) >> 1) & 1]
  return np.array(codes, np.int8).reshape(is_escaped.shape)


def _finite(
  rng: np.random.Generator, dtype: np.dtype, count: int, is_small: bool
) -> Shaped[np.ndarray, ' m']:
  """Draws finite numbers of a dtype, of all magnitudes or of a few."""
  if is_small or rng.random() < 0.5:
    return rng.integers(-6, 7, count).astype(np.float32).astype(dtype)
  values = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()
  with np.errstate(invalid='ignore'):  # ml_dtypes warns of NaN
    values[~np.isfinite(values)] = 1
  return values


def _side_files(rng: np.random.Generator) -> dict[str, bytes]:
  names = ['config.json', 'a/b.txt', 'a/é', '\U0001f600', '\uffee', 'Z', 'tokenizer.json']
  chosen = _some(rng, names, int(rng.integers(1, 5)))
  text = bytes(rng.integers(32, 127, 40, np.uint8)) * int(rng.integers(0, 60))
  return {name: text[: rng.integers(0, len(text) + 1)] + rng.bytes(3) for name in chosen}
