"""Leaves to compress, and their parts: the slices, or whole leaves, that the solver knows.

A slice of a leaf is a leaf of its own to the solver, so the answer does not depend on how a tree is
cut: layers stacked in one leaf get the grids that they get as leaves apart.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Shaped

from opq_jax.allocation.records import LeafAllocation
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.core import trees

Weights = Array | np.ndarray

_OF_ZEROS = {
  'sparsity': 1,
  'step': 1,
  'offset': 0.5,
  'laplace_fit': 1,
  'bits': 1,
}
"""Fields of a slice of zeros, as of a leaf of zeros in a trace; all others are 0."""


class MeasuredLeaf(NamedTuple):
  """One leaf to compress.

  Attributes:
    name: its path.
    statistics: its statistics, on the host unless they are traced.
    read: returns its weights; None where only statistics are known.
    omega: its weight in the objective, or one of every slice; None where all are 1.
  """

  name: str
  statistics: LeafStatistics
  read: Callable[[], Weights] | None
  omega: Array | None


class Part(NamedTuple):
  """A slice of a leaf, or a leaf without slices.

  Attributes:
    leaf: number of its leaf.
    place: of the slice; () of a whole leaf.
    name: for messages.
    statistics: of the slice.
    omega: its weight in the objective, or None.
  """

  leaf: int
  place: tuple[int, ...]
  name: str
  statistics: LeafStatistics
  omega: Array | None


def parts_of(leaves: Sequence[MeasuredLeaf]) -> list[Part]:
  """Returns the slices of all leaves, and the leaves without slices, in order."""
  parts = []
  for number, leaf in enumerate(leaves):
    for index in np.ndindex(leaf.statistics.slice_shape):
      omega = leaf.omega
      if omega is not None and np.ndim(omega):
        omega = omega[index]
      name = trees.slice_name(leaf.name, index)
      parts.append(Part(number, index, name, leaf.statistics.of_slice(index), omega))
  return parts


def by_leaf(parts: Sequence[Part]) -> dict[int, slice]:
  """Returns where the parts of every leaf stand in their list."""
  places: dict[int, slice] = {}
  for place, part in enumerate(parts):
    first = places[part.leaf].start if part.leaf in places else place
    places[part.leaf] = slice(first, place + 1)
  return places


def spread(
  values: Shaped[Array | np.ndarray, 'parts ...'],
  shape: tuple[int, ...],
  parts: Sequence[Part],
  fill: float = 0,
) -> Any:
  """Returns one array for all slices of a leaf.

  Args:
    values: of the parts of the leaf.
    shape: of the slices' axes; of a leaf without slices (), and its value is returned.
    parts: of the leaf; slices of zeros may be missing.
    fill: value of the missing slices.
  """
  if not shape:
    return values[0]
  if len(parts) == int(np.prod(shape)):
    return values.reshape(*shape, *values.shape[1:])
  whole = np.full((*shape, *values.shape[1:]), fill, values.dtype)
  for part, value in zip(parts, values, strict=True):
    whole[part.place] = value
  return whole


def leaf_allocations(
  leaves: Sequence[MeasuredLeaf],
  parts: Sequence[Part],
  per_part: dict[str, Any],
  per_channel: dict[str, Any],
  palette_bits: int | None = None,
) -> dict[str, LeafAllocation]:
  """Returns the `LeafAllocation` of every leaf that has a part, by path.

  Args:
    leaves: all leaves.
    parts: the parts that were solved for.
    per_part: fields of all parts.
    per_channel: fields of the channels of all parts, one part after the other.
    palette_bits: as in `opq_jax.allocate`.
  """
  ends = np.cumsum([0, *(part.statistics.channels for part in parts)])
  solved = {}
  for number, places in by_leaf(parts).items():
    name, stats = leaves[number].name, leaves[number].statistics
    shape, own = stats.slice_shape, parts[places]
    channels = slice(ends[places.start], ends[places.stop])
    fields = {field: values[places] for field, values in per_part.items()}
    fields |= {
      field: values[channels].reshape(len(own), -1) for field, values in per_channel.items()
    }
    solved[name] = LeafAllocation(
      **{
        field: spread(values, shape, own, _OF_ZEROS.get(field, 0))
        for field, values in fields.items()
      },
      shape=stats.shape,
      channel_axis=stats.channel_axis,
      slices=stats.slices,
      output_scales=stats.output_scales,
      palette_bits=palette_bits,
    )
  return solved
