"""Optimizers' states in training checkpoints: left out of a file, but for one number a leaf.

A fresh Adam makes its first steps of the full learning rate in every weight, which throws a trained
network far back.  A file therefore keeps the tree that came with one number in all places of a
leaf: of second moments their mean, with which steps have about the length that they had, and of
first moments 0.  Counters, hyperparameters (floating scalars) and keys stay.  So a `TrainState` is
restored from the file, and training goes on.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.allocation.optimizer_states import optimizer_leaves
from opq_jax.cli.encoding import LEFT_OUT, MEANS
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import StoredLeaf

if TYPE_CHECKING:
  from opq_jax.report import SizeReport


class WithoutOptimizer(NamedTuple):
  """A tree with one number in the places of each leaf of an optimizer's state.

  Attributes:
    tree: the tree.
    size: bytes of the leaves that are one number now.
    note: a line that says so; '' where the tree has no such leaf.
  """

  tree: PyTree
  size: int
  note: str


def without_optimizer(tree: PyTree, kept: str = MEANS) -> WithoutOptimizer:
  """Returns a tree of arrays, or of `StoredLeaf`s, with one number a leaf of an optimizer's state.

  Args:
    tree: the tree.
    kept: `MEANS`; or `LEFT_OUT`, zeros everywhere, counters too, as files had at first.

  >>> kernel = np.array([[1.0, 3.0]], np.float32)
  >>> state = {'mu': {'w': -kernel}, 'nu': {'w': kernel}, 'count': np.array(3)}
  >>> found = without_optimizer({'params': {'w': kernel}, 'opt_state': state}).tree['opt_state']
  >>> found['mu']['w'], found['nu']['w'], found['count']
  (array([[0., 0.]], dtype=float32), array([[2., 2.]], dtype=float32), array(3))
  """
  named = trees.named_leaves(tree)
  paths = (path for path in optimizer_leaves(named) if _is_cleared(named[path]))
  cleared = {path: named[path] for path in paths if kept == LEFT_OUT or len(named[path].shape)}
  if not cleared:
    return WithoutOptimizer(tree, 0, '')
  leaves = {path: _of_one_number(leaf, kept) for path, leaf in cleared.items()}
  size = sum(leaf.nbytes for leaf in cleared.values())
  note = (
    f"an optimizer's state ({next(iter(cleared))}, ...): {len(cleared)} leaves of {size:,} bytes "
    'are left out, with the mean of second moments and 0 for first moments in their places; '
    '--keep-optimizer keeps them'
  )
  return WithoutOptimizer(trees.replaced(tree, leaves), size, note)


def report_without_optimizer(report: 'SizeReport') -> 'SizeReport':
  """Returns sizes and rates of a file without the leaves of an optimizer's state."""
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


def _of_one_number(leaf: Any, kept: str) -> Any:
  """Returns a leaf of this shape and dtype with one number in all places."""
  if isinstance(leaf, StoredLeaf):
    return dataclasses.replace(leaf, fetch=lambda _: _filled(leaf.read(), kept), fetch_first=None)
  return _filled(np.asarray(leaf), kept)


def _filled(values: Shaped[np.ndarray, '...'], kept: str) -> Shaped[np.ndarray, '...']:
  """Returns the mean of numbers of which none is negative, and 0 for others, in all places."""
  # first moments have both signs; comparisons with NaN are false
  is_mean = kept == MEANS and values.size and bool((values >= 0).all())
  number = np.mean(values.astype(np.float64)) if is_mean else 0
  return np.full(values.shape, number, values.dtype)
