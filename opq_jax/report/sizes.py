"""The four sizes of a compressed network (METHOD.md section 6): four numbers, never one.

    nominal   what the paper counts: survivors at a fixed width, not where they are
    packed    what plain bit packing needs: fixed-width codes, a mask, a table of levels
    entropy   what no coder that looks at one code at a time can beat
    file      what lies on disk: the exact length of the `.opq` file

All four count the values of escaped weights.  The first three speak of the compressed leaves alone;
`file` counts everything, and is the one to quote.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8, Shaped
from rich import box
from rich.table import Table
from rich.text import Text

from opq_jax.coding.payload import entropy
from opq_jax.compression.codes import ESCAPE, CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.core.limits import MAX_LEVELS
from opq_jax.core.trees import PyTree
from opq_jax.file import writer
from opq_jax.file.reader import OpqFile
from opq_jax.report import tables

ChannelAxis = int | Callable[[str, Any], int]

_MOST_NAMES = 8  # of leaves below a table
_PIECE = 1 << 18  # weights at a time, in float32

_WHAT = {
  'nominal': "compressed leaves: survivors at the paper's widths, no positions",
  'packed': 'compressed leaves: fixed-width codes, 1 mask bit a weight, levels',
  'entropy': 'compressed leaves: zeroth-order entropy of the codes',
  'file': 'bytes on disk: headers and uncompressed leaves included',
}


@dataclasses.dataclass(frozen=True)
class CompressedLeaf:
  """The four sizes of one compressed leaf of n weights.

  Sizes are bytes; a size in bits per weight is `8 * size / weights`, and a rate is against
  float32, `4 * weights / size`, whatever the dtype of the leaf.

  Attributes:
    path: its name in the tree.
    shape, dtype: its own.
    weights: n.
    survivors: weights whose code is not 0.
    escaped: survivors that are stored as they are.
    levels: cells a sign.
    dead_channels: output channels all of whose codes are 0.
    dead_rows: indices of the leading axis all of whose codes are 0, as rows of a table or layers of
      a stack; 0 for a vector.
    original: n times the bytes of its dtype.
    nominal, packed, entropy: as in `SizeReport`.
    file: its payload in the `.opq` file and the 12 bytes of its grid.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  weights: int
  survivors: int
  escaped: int
  levels: int
  dead_channels: int
  dead_rows: int
  original: int
  nominal: float
  packed: int
  entropy: float
  file: int

  @property
  def sparsity(self) -> float:
    """The share of the weights that is pruned."""
    return 1 - self.survivors / self.weights

  @property
  def nominal_bits(self) -> float:
    """Bits per weight by the paper's accounting."""
    return 8 * self.nominal / self.weights

  @property
  def packed_bits(self) -> float:
    """Bits per weight at a fixed width, mask and levels included."""
    return 8 * self.packed / self.weights

  @property
  def entropy_bits(self) -> float:
    """The zeroth-order entropy of the codes, bits per weight."""
    return 8 * self.entropy / self.weights

  @property
  def file_bits(self) -> float:
    """Bits per weight that this leaf takes in the file."""
    return 8 * self.file / self.weights


@dataclasses.dataclass(frozen=True)
class UncompressedLeaf:
  """A leaf that passes through bit-identical.

  Attributes:
    path: its name in the tree.
    shape, dtype: its own.
    original: its bytes.
    file: its share of the packed bytes of all uncompressed leaves.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  original: int
  file: int


@dataclasses.dataclass(frozen=True)
class SizeReport:
  """The sizes of a network, in bytes, and its rates.

  Which number is which, with m_ij weights on the grid in channel j of compressed leaf i, r_ij the
  largest |w| of these less the threshold, e_i escaped weights in leaf i, v_i the bits of a number
  of its dtype, and step_i, levels_i those of the leaf:

    nominal   sum_ij m_ij b_ij / 8,  b_ij = 1 + log2(clip(r_ij / step_i, 1, 127)), and
              sum_i e_i v_i / 8.  The accounting of the paper: no positions, no tables, no headers;
              compressed leaves only.
    packed    sum_i of m_i + e_i codes of 1 + ceil(log2 levels_i) bits, or, where a weight of the
              leaf is escaped, of ceil(log2(2 levels_i + 1)) bits, and a mask of n_i bits, in whole
              bytes, levels_i float32 values and e_i values of v_i bits; compressed leaves only.
    entropy   sum_i (n_i H_i + e_i v_i) / 8, with H_i the empirical zeroth-order entropy of the
              codes of leaf i, given their subsets where they follow a trellis; pruned weights
              (code 0) and escaped ones (code -128) included; no tables; compressed leaves only.
    file      the exact length of the `.opq` file: payloads, tables, headers, metadata, and the
              uncompressed leaves (biases, BatchNorm).

  A nominal, packed or entropy rate is against the compressed leaves as float32, 4 n / size.  The
  file rate is `original / file`, against all leaves in their own dtypes.

  Attributes:
    compressed: one row a compressed leaf, in the order of the tree.
    uncompressed: one row for each of the others.
    file: bytes of the whole file.
  """

  compressed: tuple[CompressedLeaf, ...]
  uncompressed: tuple[UncompressedLeaf, ...]
  file: int

  @property
  def original(self) -> int:
    """Bytes of the whole tree in its own dtypes, uncompressed leaves included."""
    originals = [leaf.original for leaf in self.compressed]
    return sum(originals) + sum(leaf.original for leaf in self.uncompressed)

  @property
  def as_float32(self) -> int:
    """Bytes of the whole tree with all floating leaves in float32."""
    others = [
      4 * math.prod(leaf.shape) if 'float' in leaf.dtype else leaf.original
      for leaf in self.uncompressed
    ]
    return 4 * self.weights + sum(others)

  @property
  def bits_per_weight(self) -> float:
    """Bits that the compressed leaves take in the file, per weight of them."""
    return 8 * sum(leaf.file for leaf in self.compressed) / max(self.weights, 1)

  @property
  def weights(self) -> int:
    """Weights in compressed leaves."""
    return sum(leaf.weights for leaf in self.compressed)

  @property
  def survivors(self) -> int:
    """Weights of compressed leaves that are not pruned."""
    return sum(leaf.survivors for leaf in self.compressed)

  @property
  def sparsity(self) -> float:
    """The share of the weights of compressed leaves that is pruned."""
    return 1 - self.survivors / max(self.weights, 1)

  @property
  def escaped(self) -> int:
    """Weights of compressed leaves that are stored as they are."""
    return sum(leaf.escaped for leaf in self.compressed)

  @property
  def dead_channels(self) -> int:
    """Output channels of compressed leaves all of whose codes are 0."""
    return sum(leaf.dead_channels for leaf in self.compressed)

  @property
  def dead_rows(self) -> int:
    """Indices of the leading axes of compressed leaves all of whose codes are 0."""
    return sum(leaf.dead_rows for leaf in self.compressed)

  @property
  def dead_leaves(self) -> tuple[str, ...]:
    """The compressed leaves all of whose codes are 0."""
    return tuple(leaf.path for leaf in self.compressed if leaf.survivors == 0)

  @property
  def nominal(self) -> float:
    """Bytes by the paper's accounting; compressed leaves only."""
    return sum(leaf.nominal for leaf in self.compressed)

  @property
  def packed(self) -> int:
    """Bytes at a fixed width, masks and levels included; compressed leaves only."""
    return sum(leaf.packed for leaf in self.compressed)

  @property
  def entropy(self) -> float:
    """Bytes of the codes at their zeroth-order entropy; compressed leaves only."""
    return sum(leaf.entropy for leaf in self.compressed)

  @property
  def headers(self) -> int:
    """Bytes of the file that belong to no leaf: header, index, metadata."""
    stored = sum(leaf.file for leaf in self.compressed)
    return self.file - stored - sum(leaf.file for leaf in self.uncompressed)

  @property
  def nominal_rate(self) -> float:
    """4 n / nominal: the compression rate that the paper reports."""
    return _rate(4 * self.weights, self.nominal)

  @property
  def packed_rate(self) -> float:
    """4 n / packed."""
    return _rate(4 * self.weights, self.packed)

  @property
  def entropy_rate(self) -> float:
    """4 n / entropy: a little above `allocate`'s compression_rate, which counts tables too."""
    return _rate(4 * self.weights, self.entropy)

  @property
  def file_rate(self) -> float:
    """original / file: how many times smaller the network is on disk."""
    return _rate(self.original, self.file)

  def __str__(self) -> str:
    return f'{size_table(self)}\n{four_sizes(self)}'


def size_report(
  params: PyTree,
  state: CompressionState,
  *,
  channel_axis: ChannelAxis = -1,
  metadata: Mapping[str, str] | None = None,
) -> SizeReport:
  """The four sizes of a compressed network; nothing is written.

  Args:
    params: the tree, latent weights included; the ranges r_ij of `nominal` are theirs.
    state: its masks and codebooks.
    channel_axis: axis of the output channels that `nominal` tells apart, or (path, leaf) -> axis,
      as in `opq_jax.allocate`.  A vector is one channel.
    metadata: as for `opq_jax.save`; it takes bytes too.

  Returns:
    A `SizeReport`, whose `file` is what `opq_jax.save(path, params, state, metadata)` writes.

  Raises:
    ValueError: what `opq_jax.save` refuses, or an axis that a leaf does not have.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> report = size_report(params, state)
  >>> round(report.entropy_rate, 1), report.nominal < report.entropy < report.packed
  (16.1, True)
  >>> report.original, report.file < report.original / 12
  (65792, True)
  """
  data = writer.serialize(params, state, metadata)
  return payload_report(data, params, state, channel_axis=channel_axis)


def payload_report(
  data: bytes, params: PyTree, state: CompressionState, *, channel_axis: ChannelAxis = -1
) -> SizeReport:
  """`size_report` of bytes that `opq_jax.file.serialize` has made already."""
  with OpqFile(data) as file:
    return _report(file, len(data), params, state, channel_axis)


def file_report(
  path: str | os.PathLike[str] | bytes, *, channel_axis: ChannelAxis = -1
) -> SizeReport:
  """The four sizes of a network in an `.opq` file; decodes, and so checks, every leaf of it.

  The weights that were compressed are not in the file: the ranges r_ij of `nominal` are those of
  the decoded values, which makes `nominal` a little smaller than that of `size_report`.

  Args:
    path: of the file; or its bytes.
    channel_axis: as in `size_report`.

  Raises:
    ValueError: this is no whole and undamaged `.opq` file, or a leaf does not have the axis.
  """
  size = len(path) if isinstance(path, bytes) else os.stat(path).st_size
  with OpqFile(path) as file:
    params, state = file.load()
    return _report(file, size, params, state, channel_axis)


def size_table(report: SizeReport) -> tables.Printable:
  """A row a compressed leaf: its four sizes in bits per weight, and its bytes in the file.

  Escaped weights, and output channels and rows all of whose codes are 0, have columns where there
  are any.
  """
  return tables.Printable(lambda: _size_table(report))


def four_sizes(report: SizeReport) -> tables.Printable:
  """The totals: bytes, bits per weight and rate of each of the four sizes, and what each is."""
  return tables.Printable(lambda: _four_sizes(report))


def _size_table(report: SizeReport) -> Table:
  has_dead = report.dead_channels or report.dead_rows
  optional = ('escaped',) * bool(report.escaped) + ('dead',) * bool(has_dead)
  counts = lambda of: [
    f'{of.escaped:,}' if column == 'escaped' else f'{of.dead_channels}/{of.dead_rows}'
    for column in optional
  ]
  columns = (
    *('path', 'weights', 'pruned', *optional, 'levels'),
    *('nominal', 'packed', 'entropy', 'file', 'bytes'),
  )
  lines = [
    (
      leaf.path,
      f'{leaf.weights:,}',
      f'{leaf.sparsity:.1%}',
      *counts(leaf),
      f'{leaf.levels}',
      f'{leaf.nominal_bits:.3f}',
      f'{leaf.packed_bits:.3f}',
      f'{leaf.entropy_bits:.3f}',
      f'{leaf.file_bits:.3f}',
      f'{leaf.file:,}',
    )
    for leaf in report.compressed
  ]
  others = sum(leaf.file for leaf in report.uncompressed)
  sizes = report.nominal, report.packed, report.entropy, report.file - others - report.headers
  means = [f'{8 * size / max(report.weights, 1):.3f}' for size in sizes]
  blank = [''] * (len(columns) - 2)
  totals = [
    (
      f'{len(report.compressed)} compressed',
      f'{report.weights:,}',
      f'{report.sparsity:.1%}',
      *counts(report),
      '',
      *means,
      f'{sizes[3]:,}',
    ),
    (f'{len(report.uncompressed)} uncompressed', *blank, f'{others:,}'),
    ('header, index', *blank, f'{report.headers:,}'),
    ('the file', *blank, f'{report.file:,}'),
  ]
  styles = ['' if leaf.survivors else 'red' for leaf in report.compressed]
  table = tables.leaf_table('sizes in bits per weight', columns, lines, styles, totals)
  notes = []
  if has_dead:
    notes.append('dead: output channels / indices of the first axis, all of whose codes are 0')
  if dead := report.dead_leaves:
    names = ', '.join(map(tables.visible, dead[:_MOST_NAMES]))
    more = f' and {len(dead) - _MOST_NAMES} more' if len(dead) > _MOST_NAMES else ''
    notes.append(f'all codes are 0: {names}{more}')
  # Text, because a path may hold what rich would take for markup
  table.caption = Text('\n'.join(notes)) if notes else None
  return table


def _four_sizes(report: SizeReport) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify='left')
  for name in ('size', 'bytes', 'rate'):
    table.add_column(name, justify='left' if name == 'size' else 'right', no_wrap=True)
  table.add_column('what it is')
  for name, what in _WHAT.items():
    size = getattr(report, name)
    base = report.as_float32 if name == 'file' else 4 * report.weights
    style = 'bold green' if name == 'file' else ''
    table.add_row(name, f'{size:,.0f}', f'{_rate(base, size):.2f}x', what, style=style)
  table.caption = (
    f'rate: times smaller than in float32, compressed leaves {4 * report.weights:,} bytes, all '
    f'{report.as_float32:,}\n'
    f'the file is {report.file_rate:.2f} times smaller than the {report.original:,} bytes of the '
    'network as it came'
  )
  return table


def _report(
  file: OpqFile, size: int, params: PyTree, state: CompressionState, channel_axis: ChannelAxis
) -> SizeReport:
  stored = file.sizes()
  compressed, uncompressed = [], []
  records = trees.records(params, state.tree, LeafState)
  for (path, leaf), record in zip(trees.named_leaves(params).items(), records, strict=True):
    array = np.asarray(leaf)
    if record is None:
      facts = path, array.shape, array.dtype.name, array.nbytes, stored[path]
      uncompressed.append(UncompressedLeaf(*facts))
    else:
      axis = channel_axis(path, leaf) if callable(channel_axis) else channel_axis
      codes = file.codes(path)
      compressed.append(_measured_leaf(path, array, record, codes, axis, stored[path]))
  return SizeReport(tuple(compressed), tuple(uncompressed), size)


def _measured_leaf(
  path: str,
  weights: Shaped[np.ndarray, '...'],
  record: LeafState,
  codes: Int8[np.ndarray, '...'],
  axis: int,
  stored: int,
) -> CompressedLeaf:
  if not -weights.ndim <= axis < weights.ndim:
    raise ValueError(f'{path}: found channel_axis {axis}, expected an axis of shape {codes.shape}')
  reach = largest_on_grid(weights, codes, axis)
  return compressed_leaf(path, record, codes, reach, axis, stored)


def largest_on_grid(
  weights: Shaped[np.ndarray, '...'], codes: Int8[np.ndarray, '...'], axis: int
) -> Float32[np.ndarray, ' channels']:
  """The largest |w| on the grid of every channel, 0 where none is.  Made in pieces of a leaf."""
  shape = 1, 1, weights.size
  if weights.ndim > 1:
    axis %= weights.ndim
    before, after = weights.shape[:axis], weights.shape[axis + 1 :]
    shape = math.prod(before), weights.shape[axis], math.prod(after)
  weights, codes = weights.reshape(shape), codes.reshape(shape)
  before, channels, after = weights.shape
  largest = np.zeros(channels, np.float32)
  columns = max(1, _PIECE // max(after, 1))
  rows = max(1, columns // max(channels, 1))
  for row, column in itertools.product(range(0, before, rows), range(0, channels, columns)):
    part = np.s_[row : row + rows, column : column + columns]
    is_on_grid = (codes[part] != 0) & (codes[part] != ESCAPE)
    found = np.max(np.abs(weights[part].astype(np.float32)), (0, 2), where=is_on_grid, initial=0)
    np.maximum(largest[part[1]], found, out=largest[part[1]])
  return largest


def _all_but(axis: int, ndim: int) -> tuple[int, ...]:
  """The axes that are not the channels'; a vector is one channel."""
  return tuple(i for i in range(ndim) if i != axis % ndim) if ndim > 1 else (0,)


def compressed_leaf(
  path: str,
  record: LeafState,
  codes: Int8[np.ndarray, '...'],
  largest: Float32[np.ndarray, ' channels'],
  axis: int,
  stored: int,
) -> CompressedLeaf:
  """The four sizes of one leaf.

  Args:
    path: its name.
    record: its levels, threshold, step and dtype.
    codes: in its shape.
    largest: the largest |w| on the grid of every channel; of no matter where none is.
    axis: of the output channels.
    stored: the bytes that it takes in the file.
  """
  levels, size, dtype = int(record.levels), codes.size, np.dtype(record.dtype)
  others = _all_but(axis, codes.ndim)
  survivors = np.count_nonzero(codes, axis=others)
  escapes = np.count_nonzero(codes == ESCAPE, axis=others)
  reach = largest - float(record.threshold)
  bits = 1 + np.log2(np.clip(reach / float(record.step), 1, MAX_LEVELS))
  kept, escaped = int(survivors.sum()), int(escapes.sum())
  # a code that may say 'escaped' is one of 2 levels + 1
  choices = 2 * levels + (escaped > 0)
  width = math.ceil(math.log2(choices)) if choices else 0
  values = escaped * dtype.itemsize
  is_row = codes.any(axis=tuple(range(1, codes.ndim))) if codes.ndim > 1 else np.ones(0, bool)
  return CompressedLeaf(
    path=path,
    shape=codes.shape,
    dtype=dtype.name,
    weights=size,
    survivors=kept,
    escaped=escaped,
    levels=levels,
    dead_channels=int(np.count_nonzero(survivors == 0)),
    dead_rows=int(np.count_nonzero(~is_row)),
    original=size * dtype.itemsize,
    nominal=float(np.sum((survivors - escapes) * bits)) / 8 + values,
    packed=-(-(kept * width) // 8) + -(-size // 8) + 4 * levels + values,
    entropy=size * entropy(codes) / 8 + values,
    file=stored,
  )


def _rate(original: float, size: float) -> float:
  return original / size if size else math.inf
