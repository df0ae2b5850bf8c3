"""One choice of codes for leaves that are one array.

An encoder codes each leaf by itself, and a leaf with moments differently from one without.  An
embedding that is the last layer too would come apart: its look-ups have no moments, its product
has.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from opq_jax.allocation import LeafAllocation
from opq_jax.compression import CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.core.ties import Candidate, tied
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import Encoded


def with_ties(
  coded: Encoded,
  params: PyTree,
  grids: Sequence[LeafState | LeafAllocation | None],
  preferred: Callable[[], Collection[str]],
) -> Encoded:
  """Gives tied leaves the codes of one of them.

  Leaves are tied where they are one array, or one the transpose of the other, on one plain grid.
  In a trace only the same tracer is known to be the same array.

  Args:
    coded: the answer of an encoder.
    params: the original weights.
    grids: of every leaf, the plain grid that it was coded from, or its allocation.
    preferred: returns the paths of leaves whose codes are rather taken than those of the first of
      a group; called where there are ties.

  Returns:
    `coded`, with the codes of one leaf, or their transposes, at all leaves of the same array.
  """
  ties = tied(_candidates(params, grids))
  slices = {
    name: grid.slices if grid else 0
    for name, grid in zip(trees.named_leaves(params), grids, strict=True)
  }
  # whether each leaf is the transpose of the first of its group
  groups: dict[str, dict[str, bool]] = {}
  for name, tie in ties.items():
    if not (tie.is_transposed and slices[name]):
      groups.setdefault(tie.first, {tie.first: False})[name] = tie.is_transposed
  if not groups:
    return coded
  values = trees.named_leaves(coded.params)
  states = dict(zip(values, trees.records(coded.params, coded.state.tree, LeafState), strict=True))
  preferred_names = preferred()
  for group in groups.values():
    source = next((name for name in group if name in preferred_names), next(iter(group)))
    value, state = values[source], states[source]
    assert state is not None
    for name, is_transposed in group.items():
      is_turned = is_transposed != group[source]
      values[name] = value.T if is_turned else value
      states[name] = _transposed(state) if is_turned else state
  structure = jax.tree.structure(coded.params)
  unflatten = lambda leaves: jax.tree.unflatten(structure, leaves)
  return Encoded(unflatten(values.values()), CompressionState(unflatten(states.values())))


def _candidates(
  params: PyTree, grids: Sequence[LeafState | LeafAllocation | None]
) -> Iterator[Candidate]:
  """Yields the leaves that have a grid, with what those that are one array have in common."""
  for (name, leaf), grid in zip(trees.named_leaves(params).items(), grids, strict=True):
    if grid is None:
      continue
    # a leaf with slices is no transpose
    shape = leaf.shape if grid.slices else sorted(leaf.shape)
    facts: tuple[Any, ...] = (*shape, leaf.dtype, grid.slices)
    numbers, is_traced = (grid.threshold, grid.step), trees.is_traced((leaf, grid))
    if not is_traced:
      facts += tuple(np.asarray(number).tobytes() for number in numbers)
    yield Candidate(name, facts, leaf, None if is_traced else functools.partial(_identity, leaf))


def _identity(leaf: Any) -> Any:
  return leaf


def _transposed(state: LeafState) -> LeafState:
  scales = state.output_scales
  return dataclasses.replace(
    state, kinds=state.kinds.T, output_scales=None if scales is None else scales.T
  )
