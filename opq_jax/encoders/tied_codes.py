"""One choice of codes for leaves that are one array.

An encoder codes each leaf by itself, and a leaf with moments differently from one without.  An
embedding that is the last layer too would come apart: its look-ups have no moments, its product
has.
"""

import dataclasses
from collections.abc import Callable, Collection

import jax

from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.compression import CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.encoders.encoder import Encoded


def with_ties(
  coded: Encoded, allocation: Allocation, preferred: Callable[[], Collection[str]]
) -> Encoded:
  """Gives tied leaves the codes of one of them.

  Args:
    coded: the answer of an encoder.
    allocation: of its plain grids; it names the ties (`LeafAllocation.tied_to`).
    preferred: returns the paths of leaves whose codes are rather taken than those of the first of
      a group; called where there are ties.

  Returns:
    `coded`, with the codes of one leaf, or their transposes, at all leaves of the same array.
  """
  records: list[LeafAllocation | None] = trees.records(
    coded.params, allocation.tree, LeafAllocation
  )
  if not any(record and record.tied_to for record in records):
    return coded
  values = trees.named_leaves(coded.params)
  names = list(values)
  states = dict(zip(names, trees.records(coded.params, coded.state.tree, LeafState), strict=True))
  preferred_names = preferred()
  # whether each leaf is the transpose of the first of its group
  groups: dict[str, dict[str, bool]] = {}
  for name, record in zip(names, records, strict=True):
    if record and record.tied_to:
      group = groups.setdefault(record.tied_to, {record.tied_to: False})
      group[name] = record.is_transposed
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


def _transposed(state: LeafState) -> LeafState:
  return dataclasses.replace(state, kinds=state.kinds.T)
