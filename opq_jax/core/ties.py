"""Leaves of a tree that are one array, such as an embedding and the last layer, its transpose."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped


class Tie(NamedTuple):
  """A leaf that is an earlier one again.

  Attributes:
    first: the name of the earlier leaf.
    is_transposed: whether it is the transpose of the other, not the same array.
  """

  first: str
  is_transposed: bool


class Candidate(NamedTuple):
  """A leaf that may be one with another.

  Attributes:
    name: of the leaf.
    facts: equal for leaves that are one array, and unequal for nearly all others: arrays are
      compared only where they agree.
    leaf: the leaf itself, for `is`; None where it is not in memory.
    read: returns the array; None where it cannot be read.
  """

  name: str
  facts: Hashable
  leaf: Any
  read: Callable[[], Any] | None


def tied(candidates: Iterable[Candidate]) -> dict[str, Tie]:
  """Returns the leaves that are an earlier one again: the same object, or one of equal values.

  Args:
    candidates: the leaves in the order of their tree.

  >>> table = np.arange(6.0).reshape(3, 2)
  >>> leaves = {'embed': table, 'other': table + 1, 'head': table.T.copy()}
  >>> tied(Candidate(name, 6, leaf, lambda leaf=leaf: leaf) for name, leaf in leaves.items())
  {'head': Tie(first='embed', is_transposed=True)}
  """
  firsts: dict[Hashable, list[Candidate]] = {}
  found = {}
  for candidate in candidates:
    group = firsts.setdefault(candidate.facts, [])
    for first in group:
      is_transposed = _is_transposed(first, candidate)
      if is_transposed is not None:
        found[candidate.name] = Tie(first.name, is_transposed)
        break
    else:
      group.append(candidate)
  return found


def _is_transposed(first: Candidate, second: Candidate) -> bool | None:
  """Returns how the second leaf is the first; None where it is another."""
  if first.leaf is not None and first.leaf is second.leaf:
    return False
  if first.read is None or second.read is None:
    return None
  one, other = first.read(), second.read()
  if not _is_readable(one) or not _is_readable(other) or one.dtype != other.dtype:
    return None
  one, other = np.asarray(one), np.asarray(other)
  if one.shape == other.shape and _are_equal(one, other):
    return False
  if one.ndim == 2 and one.shape == other.shape[::-1] and _are_equal(one, other.T):
    return True
  return None


def _is_readable(array: Any) -> bool:
  """Returns whether this process has the whole array."""
  return bool(getattr(array, 'is_fully_addressable', True))


def _are_equal(one: Shaped[np.ndarray, '...'], other: Shaped[np.ndarray, '...']) -> bool:
  # by bits: NaN equals itself, and ml_dtypes compares some dtypes slowly
  kind = f'u{one.dtype.itemsize}'
  as_bits = lambda array: array.view(kind) if one.dtype.itemsize in (1, 2, 4, 8) else array
  return bool(np.array_equal(as_bits(one), as_bits(other)))
