"""Optimizers' states in training checkpoints: left out of a file, with zeros in their places.

A fresh optimizer of optax has zeros for moments and counters.  With zeros in the places of these
leaves a file has the tree that came, so that a `TrainState` is restored from it, and training goes
on as with a new optimizer.  Hyperparameters (floating scalars) and keys stay.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from opq_jax.allocation.optimizer_states import optimizer_leaves
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import StoredLeaf

if TYPE_CHECKING:
  from opq_jax.report import SizeReport


class WithoutOptimizer(NamedTuple):
  """A tree with zeros in the places of an optimizer's state.

  Attributes:
    tree: the tree.
    size: bytes of the leaves that are zeros now.
    note: a line that says so; '' where the tree has no such leaf.
  """

  tree: PyTree
  size: int
  note: str


def without_optimizer(tree: PyTree) -> WithoutOptimizer:
  """Returns a tree of arrays, or of `StoredLeaf`s, with a fresh optimizer in it.

  >>> kernel = np.ones((2, 2), np.float32)
  >>> tree = {'params': {'w': kernel}, 'opt_state': {'mu': {'w': kernel}, 'count': np.array(3)}}
  >>> without_optimizer(tree).tree['opt_state']['count'].item()
  0
  """
  named = trees.named_leaves(tree)
  cleared = {path: named[path] for path in optimizer_leaves(named) if _is_cleared(named[path])}
  if not cleared:
    return WithoutOptimizer(tree, 0, '')
  leaves = {path: _zeros(leaf) for path, leaf in cleared.items()}
  size = sum(leaf.nbytes for leaf in cleared.values())
  what = (
    f"an optimizer's state ({next(iter(cleared))}, ...): {len(cleared)} leaves of {size:,} bytes"
  )
  note = (
    f'{what} are left out, with zeros in their places, as of a fresh optimizer; --keep-optimizer '
    'keeps them'
  )
  return WithoutOptimizer(trees.replaced(tree, leaves), size, note)


def report_without_optimizer(report: 'SizeReport') -> 'SizeReport':
  """Returns sizes and rates of a file without the zeros of an optimizer's state."""
  rows: list[Any] = [*report.compressed, *report.uncompressed]
  leaves = {row.path: row for row in rows}
  left = {path for path in optimizer_leaves(leaves) if _is_cleared(leaves[path])}
  uncompressed = [row for row in report.uncompressed if row.path not in left]
  return dataclasses.replace(report, uncompressed=tuple(uncompressed))


def _is_cleared(leaf: Any) -> bool:
  """Returns whether a leaf of an optimizer's state is one of moments, or a counter."""
  dtype = np.dtype(leaf.dtype)
  return _is_floating(dtype) if len(leaf.shape) else dtype.kind in 'iu'


def _is_floating(dtype: np.dtype) -> bool:
  # NumPy takes the floats of ml_dtypes for raw bytes
  try:
    ml_dtypes.finfo(dtype)
  except ValueError:
    return False
  return dtype.kind != 'c'


def _zeros(leaf: Any) -> Any:
  if isinstance(leaf, StoredLeaf):
    return dataclasses.replace(
      leaf, fetch=lambda _: np.zeros(leaf.shape, leaf.dtype), fetch_first=None
    )
  return np.zeros(leaf.shape, leaf.dtype)
