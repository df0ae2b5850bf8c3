"""Describes the network in a file for pages and model cards: sizes, and the counts of all codes."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opq_jax.coding.frequencies import histogram
from opq_jax.core.array_types import Int8, Int64
from opq_jax.core.limits import MAX_LEVELS
from opq_jax.file.reader import OpqFile
from opq_jax.report.records import CompressedLeaf, SizeReport, UncompressedLeaf
from opq_jax.report.sizes import ChannelAxis, open_file_report

Description = dict[str, Any]


def file_description(
  path: str | os.PathLike[str] | bytes, *, channel_axis: ChannelAxis = -1, name: str | None = None
) -> Description:
  """Returns what a file holds as dicts and lists that JSON has; decodes and checks every leaf.

  Takes memory for one leaf at a time.  `html_page` and `model_card` show descriptions.

  Args:
    path: the file, or its bytes.
    channel_axis: the axis of the output channels, as in `size_report`.
    name: the name that is shown; by default that of the file.

  Returns:
    `name`; bytes of the file (`bytes`), and those of headers and side files; `metadata` and
    `sideFiles`, lists of pairs; `original` and `asFloat32`, bytes of the uncompressed tree; and
    `leaves` in the order of the tree.  A leaf has path, shape, dtype, its bytes uncompressed and in
    the file, the leaf that it is again (`tiedTo`), and `codes`: None where it is not compressed,
    else the fields of `CompressedLeaf`, the least and the largest threshold, first value and step
    of its slices, and the counts of the codes -m, ..., m, of which the outermost occur.

  Raises:
    ValueError: the file is damaged or no `.opq` file, or a leaf lacks the axis.

  >>> import jax, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64))}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> data = opq_jax.file.serialize(network.params, network.state)
  >>> (leaf,) = file_description(data, name='net.opq')['leaves']
  >>> leaf['path'], leaf['shape'], sum(leaf['codes']['counts'])
  ('kernel', [256, 64], 16384)
  """
  is_bytes = isinstance(path, bytes)
  size = len(path) if isinstance(path, bytes) else os.stat(path).st_size
  counts: dict[str, Any] = {}

  def count(leaf: str, codes: Int8[np.ndarray, '...']) -> None:
    counts[leaf] = histogram(codes)

  with OpqFile(path) as file:
    report = open_file_report(file, size, channel_axis, on_codes=count)
    file.read_side_files()  # checked, as every leaf is by its report
    return {
      'name': name or ('the file' if is_bytes else os.path.basename(os.fspath(path))),
      'bytes': report.file,
      'headers': report.headers,
      'sideBytes': report.side_files,
      'sideFiles': [list(item) for item in file.side_files.items()],
      'metadata': [list(item) for item in file.metadata.items()],
      'original': report.original,
      'asFloat32': report.as_float32,
      'leaves': list(_leaves(file, report, counts)),
    }


def _leaves(
  file: OpqFile, report: SizeReport, counts: Mapping[str, Int64[np.ndarray, '256']]
) -> Iterator[Description]:
  rows: dict[str, CompressedLeaf | UncompressedLeaf] = {}
  rows |= {row.path: row for row in report.compressed}
  rows |= {row.path: row for row in report.uncompressed}
  for path in file:
    row = rows[path]
    yield {
      'path': path,
      'shape': list(row.shape),
      'dtype': row.dtype,
      'original': row.original,
      'bytes': row.file,
      'tiedTo': file.tied_to(path),
      'codes': _codes(file, row, counts[path]) if isinstance(row, CompressedLeaf) else None,
    }


def _codes(file: OpqFile, row: CompressedLeaf, counts: Int64[np.ndarray, '256']) -> Description:
  grids, scales = file.grids(row.path), file.output_scales(row.path)
  occurs = [code for code in range(1, MAX_LEVELS + 1) if counts[code] or counts[-code]]
  most = max(occurs, default=0)
  return {
    'survivors': row.survivors,
    'escaped': row.escaped,
    'levels': row.levels,
    'deadChannels': row.dead_channels,
    'deadRows': row.dead_rows,
    'nominal': round(row.nominal, 1),
    'packed': row.packed,
    'entropy': round(row.entropy, 1),
    'slices': row.slices,
    'isRotated': row.is_rotated,
    'scaledOutputs': 0 if scales is None else scales.size,
    'grids': {
      key: _ends([getattr(grid, key) for grid in grids]) for key in ('threshold', 'first', 'step')
    },
    'counts': [int(counts[code]) for code in range(-most, most + 1)],
  }


def _ends(numbers: list[np.float32]) -> list[float]:
  # the shortest text that is the float32 again: a page has a few hundred of them
  return [float(str(number)) for number in (min(numbers), max(numbers))]
