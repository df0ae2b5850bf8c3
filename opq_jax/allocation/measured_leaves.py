"""The chosen leaves of a tree: measured, compared with each other, read where they must be."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opq_jax.allocation.lattices import has_few_magnitudes, numbers_of
from opq_jax.allocation.output_scales import cost_of_units, in_units, scales_for
from opq_jax.allocation.parts import MeasuredLeaf, Part, Weights, by_leaf
from opq_jax.allocation.records import LeafAllocation
from opq_jax.allocation.selection import axis_of, slices_of
from opq_jax.allocation.statistics import LeafStatistics, leaf_statistics
from opq_jax.core import axes, trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.ties import Candidate, Tie


class Axes(NamedTuple):
  """The axes of a leaf's output channels, and how many leading axes count slices."""

  channel_axis: ChannelAxes
  slices: int


def axes_of(
  name: str,
  leaf: Any,
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes],
  slices: Callable[[str, Any], int] | None,
) -> Axes:
  """Returns the axes of a leaf; of statistics, their own."""
  if isinstance(leaf, LeafStatistics):
    return Axes(leaf.channel_axis, leaf.slices)
  count = slices_of(name, leaf, slices)
  return Axes(axis_of(name, leaf, channel_axis, count), count)


def measured(
  named: dict[str, Any],
  axes: dict[str, Axes],
  omegas: list[Array] | None,
  corrected: bool,
  read: Callable[[str], Weights] | None,
  scales_of_palettes: Mapping[str, Any] = MappingProxyType({}),
) -> list[MeasuredLeaf]:
  """Returns the chosen leaves with their statistics, measured or as they were given.

  Args:
    named: all leaves by path; some may be statistics.
    axes: of the chosen ones.
    omegas: their weights in the objective, or None.  One of each output chooses the scales of the
      outputs; those of statistics are chosen already.
    corrected: whether histograms are needed.
    read: as for `allocate`.
    scales_of_palettes: scales of the outputs of leaves, by path, where the objective chooses none.
  """
  stats: list[LeafStatistics] = []
  readers: list[Callable[[], Weights] | None] = []
  weights: list[Any] = [None] * len(axes) if omegas is None else list(omegas)
  for number, (name, (axis, count)) in enumerate(axes.items()):
    leaf, of_outputs = named[name], np.ndim(weights[number]) > count
    if isinstance(leaf, LeafStatistics):
      stats.append(_given_statistics(name, leaf, corrected))
      scales = leaf.output_scales
      readers.append(read and functools.partial(_read_units, functools.partial(read, name), scales))
    else:
      scales = scales_of_palettes.get(name)
      if of_outputs:
        scales = _chosen_scales(name, weights[number], leaf, count)
      stats.append(
        leaf_statistics(leaf, axis, slices=count, histogram=corrected, output_scales=scales)
      )
      readers.append(functools.partial(_read_units, functools.partial(_identity, leaf), scales))
    if of_outputs:
      weights[number] = jnp.asarray(cost_of_units(weights[number], scales, count), jnp.float32)
  stats = trees.on_host(stats)
  return [MeasuredLeaf(*row) for row in zip(axes, stats, readers, weights, strict=True)]


def _chosen_scales(name: str, costs: Any, leaf: Any, slices: int) -> Any:
  if trees.is_traced((costs, leaf)):
    raise ValueError(
      f'{name}: found an objective of outputs in a trace, expected one number, or concrete '
      'parameters and costs: scales of outputs are chosen from their values'
    )
  return scales_for(np.asarray(costs), leaf, slices)


def _read_units(read: Callable[[], Weights], scales: Any) -> Weights:
  return in_units(read(), scales)


def _identity(leaf: Array) -> Array:
  return leaf


def _given_statistics(name: str, stats: LeafStatistics, corrected: bool) -> LeafStatistics:
  if not corrected:
    return dataclasses.replace(stats, histogram=None)
  if stats.histogram is None:
    raise ValueError(
      f'{name}: found statistics without a histogram, expected one (or corrected=False)'
    )
  return stats


def numbers_of_parts(
  leaves: Sequence[MeasuredLeaf], parts: Sequence[Part]
) -> list[np.ndarray | None]:
  """Returns the magnitudes of the parts that have few (`opq_jax.allocation.lattices`)."""
  numbers: list[np.ndarray | None] = [None] * len(parts)
  for number, places in by_leaf(parts).items():
    leaf = leaves[number]
    # over scales, magnitudes of few bits are others, and many
    every = range(*places.indices(len(parts))) if leaf.statistics.output_scales is None else ()
    few = [p for p in every if has_few_magnitudes(parts[p].statistics)]
    weights = leaf.read() if few and leaf.read is not None else None
    found = numbers_of(leaf.statistics, [parts[p].place for p in few], weights)
    for place, own in zip(few, found, strict=True):
      numbers[place] = own
  return numbers


def candidates(
  leaves: Sequence[MeasuredLeaf], parts: Sequence[Part], named: dict[str, Any], is_traced: bool
) -> Iterator[Candidate]:
  """Yields the leaves that have a part, with what those that are one array have in common.

  In a trace only the same tracer is known to be the same array.
  """
  for number in by_leaf(parts):
    leaf, stats = leaves[number], leaves[number].statistics
    # a leaf with slices is no transpose
    shape = stats.shape if stats.slices else sorted(stats.shape)
    facts: tuple[Any, ...] = (*shape, np.dtype(stats.dtype), stats.slices)
    if not is_traced:
      histogram = () if stats.histogram is None else np.asarray(stats.histogram).tobytes()
      scales = b'' if stats.output_scales is None else np.asarray(stats.output_scales).tobytes()
      facts += (np.asarray(stats.largest).tobytes(), histogram, scales)
    array = named[leaf.name]
    is_array = not isinstance(array, LeafStatistics)
    read = None if is_traced else leaf.read
    yield Candidate(leaf.name, facts, array if is_array else None, read)


def tied_record(record: LeafAllocation, tie: Tie) -> LeafAllocation:
  """Returns the allocation of a leaf that is another one again, or its transpose."""
  own = dataclasses.replace(record, tied_to=tie.first, is_transposed=tie.is_transposed)
  if not tie.is_transposed:
    return own
  scales = record.output_scales
  return dataclasses.replace(
    own,
    shape=record.shape[::-1],
    channel_axis=1 - axes.numbers_of(record.channel_axis, 2)[0],
    output_scales=None if scales is None else np.asarray(scales).T,
  )
