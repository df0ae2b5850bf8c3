"""Measures the four sizes of a network in memory or of a file.

`file_report` needs neither JAX nor the original weights.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from opq_jax.coding import rotations
from opq_jax.core import axes
from opq_jax.core.array_types import Int8
from opq_jax.core.axes import ChannelAxes
from opq_jax.file.output_grids import OutputGrids
from opq_jax.file.reader import OpqFile
from opq_jax.report import leaf_sizes
from opq_jax.report.records import SizeReport, UncompressedLeaf

if TYPE_CHECKING:
  from opq_jax.compression import CompressionState
  from opq_jax.core.trees import PyTree

ChannelAxis = ChannelAxes | Callable[[str, Any], ChannelAxes]


def size_report(
  params: 'PyTree',
  state: 'CompressionState',
  *,
  channel_axis: ChannelAxis = -1,
  metadata: Mapping[str, str] | None = None,
) -> SizeReport:
  """Returns the four sizes of a compressed network without writing a file.

  Args:
    params: the tree, of latent or decoded weights; the ranges r_ij of `nominal` are measured on
      them.
    state: the masks and codebooks of the tree.
    channel_axis: the axis of the output channels in `nominal`, or (path, leaf) -> axis, as in
      `opq_jax.allocate`.  A vector is one channel.
    metadata: metadata for `opq_jax.save`, counted in `file`.

  Returns:
    A `SizeReport` whose `file` is the length of the file that `opq_jax.save(path, params, state,
    metadata)` writes.

  Raises:
    ValueError: `opq_jax.save` refuses the network, or a leaf lacks the axis.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> report = size_report(params, state)
  >>> round(report.entropy_rate, 1), report.nominal < report.entropy < report.packed
  (16.1, True)
  >>> report.original, report.file < report.original / 12
  (65792, True)
  """
  from opq_jax.file import writer

  data = writer.serialize(params, state, metadata)
  return payload_report(data, params, channel_axis=channel_axis)


def payload_report(data: bytes, params: 'PyTree', *, channel_axis: ChannelAxis = -1) -> SizeReport:
  """Returns `size_report` of a network that `opq_jax.file.serialize` has made into bytes already.

  Args:
    data: the bytes of the file.
    params: the tree, of latent or decoded weights.
    channel_axis: see `size_report`.
  """
  from opq_jax.core import trees

  with OpqFile(data) as file:
    return open_file_report(file, len(data), channel_axis, trees.named_leaves(params))


def file_report(
  path: str | os.PathLike[str] | bytes, *, channel_axis: ChannelAxis = -1
) -> SizeReport:
  """Returns the four sizes of the network in an `.opq` file; decodes and checks every leaf.

  A file does not contain the original weights.  The ranges r_ij of `nominal` are measured on the
  decoded values, so `nominal` is slightly smaller than in `size_report`.

  Args:
    path: the file, or its bytes.
    channel_axis: see `size_report`.

  Raises:
    ValueError: the file is damaged or no `.opq` file, or a leaf lacks the axis.
  """
  size = len(path) if isinstance(path, bytes) else os.stat(path).st_size
  with OpqFile(path) as file:
    return open_file_report(file, size, channel_axis)


def open_file_report(
  file: OpqFile,
  size: int,
  channel_axis: ChannelAxis,
  originals: Mapping[str, Any] | None = None,
  *,
  on_codes: Callable[[str, Int8[np.ndarray, '...']], None] | None = None,
) -> SizeReport:
  """Returns the report of an open file.

  Args:
    file: the file.
    size: its bytes.
    channel_axis: see `size_report`.
    originals: the weights by path, on which ranges are measured; by default the file's own.
    on_codes: called with path and codes of each compressed leaf, which are decoded once like this.
  """
  stored = file.sizes()
  compressed, uncompressed = [], []
  for path in file if originals is None else originals:
    grids, slices = file.grids(path), file.slices(path)
    if not grids:
      array = file[path]
      facts = path, array.shape, array.dtype.name, array.nbytes, stored[path]
      uncompressed.append(UncompressedLeaf(*facts))
      continue
    codes = file.codes(path)
    if on_codes is not None:
      on_codes(path, codes)
    weights = file[path] if originals is None else np.asarray(originals[path])
    axis = channel_axis(path, weights) if callable(channel_axis) else channel_axis
    own = axis if isinstance(axis, tuple) else (axis,)
    if not all(-weights.ndim <= a < weights.ndim and not 0 <= a < slices for a in own):
      raise ValueError(
        f'{path}: found channel_axis {axis}, expected an axis of shape {codes.shape[slices:]}'
      )
    dtype, rotated_axis = file.dtype(path), file.rotated_axis(path)
    if rotated_axis is not None:
      # the codes are those of rotated weights
      weights = (
        file.coded_values(path) if originals is None else rotations.rotated(weights, rotated_axis)
      )
    axis = axes.in_slice(axis, slices)
    rows, scales = [], file.output_scales(path)
    for index, grid in zip(np.ndindex(codes.shape[:slices]), grids, strict=True):
      outputs = OutputGrids.of(grid, None if scales is None else scales[index], codes[index].shape)
      largest = leaf_sizes.largest_on_grid(outputs.in_units(weights[index]), codes[index], axis)
      row = leaf_sizes.compressed_leaf(
        path,
        outputs,
        codes[index],
        largest,
        axis,
        stored[path],
        dtype,
        is_rotated=rotated_axis is not None,
      )
      rows.append(row)
    whole = leaf_sizes.sum_of_slices(path, codes.shape, rows, stored[path])
    compressed.append(whole if slices else rows[0])
  return SizeReport(tuple(compressed), tuple(uncompressed), size, file.side_bytes())
