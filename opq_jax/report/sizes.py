"""Measures the four sizes of a network in memory or of a file.

`file_report` needs neither JAX nor the original weights.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from opq_jax.coding import rotations
from opq_jax.core.array_types import Int8, Shaped
from opq_jax.core.axes import ChannelAxes
from opq_jax.file.coded_leaves import CodedLeaf
from opq_jax.file.reader import OpqFile
from opq_jax.report import leaf_sizes
from opq_jax.report.records import CompressedLeaf, SizeReport, UncompressedLeaf

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
  stored, compressed, uncompressed = file.sizes(), [], []
  for path in file if originals is None else originals:
    if not file.grids(path):
      uncompressed.append(uncompressed_leaf(path, file[path], stored[path]))
      continue
    coded = file.coded_leaf(path)
    if on_codes is not None:
      on_codes(path, coded.codes())
    weights = None if originals is None else np.asarray(originals[path])
    if weights is not None and (axis := file.rotated_axis(path)) is not None:
      weights = rotations.rotated(weights, axis)
    compressed.append(compressed_leaf(path, coded, channel_axis, stored[path], weights))
  return SizeReport(tuple(compressed), tuple(uncompressed), size, file.side_bytes())


def uncompressed_leaf(path: str, array: Shaped[np.ndarray, '...'], stored: int) -> UncompressedLeaf:
  """Returns the sizes of a leaf that a file holds as it is, in so many bytes."""
  return UncompressedLeaf(path, array.shape, array.dtype.name, array.nbytes, stored)


def compressed_leaf(
  path: str,
  coded: CodedLeaf,
  channel_axis: ChannelAxis,
  stored: int,
  weights: Shaped[np.ndarray, '...'] | None = None,
) -> CompressedLeaf:
  """Returns the sizes of a leaf as a file codes it, all slices together.

  Args:
    path: its name.
    coded: its codes.
    channel_axis: see `size_report`.
    stored: its bytes in the file.
    weights: the weights on which ranges are measured, rotated where those of the codes are; by
      default the values of the codes.

  Raises:
    ValueError: the leaf lacks the axis.
  """
  weights = coded.coded_values() if weights is None else weights
  axis = channel_axis(path, weights) if callable(channel_axis) else channel_axis
  own, slices = axis if isinstance(axis, tuple) else (axis,), len(coded.slice_shape)
  if not all(-weights.ndim <= a < weights.ndim and not 0 <= a < slices for a in own):
    raise ValueError(
      f'{path}: found channel_axis {axis}, expected an axis of shape {weights.shape[slices:]}'
    )
  return leaf_sizes.sizes_of_coded(path, coded, weights, axis, stored)
