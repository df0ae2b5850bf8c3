"""Which leaves are compressed, and in which dtype."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import numpy as np

from opq_jax.allocation import is_compressible
from opq_jax.core import trees
from opq_jax.core.trees import PyTree


def chosen_paths(params: PyTree, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
  """Returns the paths of the leaves to compress.

  Args:
    params: the weights; `is_compressible` says which leaves can be compressed.
    include: globs; if there are any, a leaf must match one of them.
    exclude: globs; a leaf must match none of them.

  Raises:
    ValueError: a glob matches no leaf that can be compressed.
  """
  paths = [path for path, leaf in trees.named_leaves(params).items() if is_compressible(path, leaf)]
  matches = lambda path, globs: any(fnmatchcase(path, glob) for glob in globs)
  for option, globs in (('--include', include), ('--exclude', exclude)):
    for glob in globs:
      if not any(fnmatchcase(path, glob) for path in paths):
        raise ValueError(
          f'{option}: found no leaf that {glob!r} matches, expected one of {paths[:5]}'
        )
  chosen = {path for path in paths if not include or matches(path, include)}
  return {path for path in chosen if not matches(path, exclude)}


def narrowed(params: PyTree, chosen: set[str]) -> PyTree:
  """Returns the tree with its chosen float64 leaves in float32, JAX's widest by default."""
  is_wide = lambda path, leaf: path in chosen and leaf.dtype == np.float64
  leaves = [
    leaf.astype(np.float32) if is_wide(path, leaf) else leaf
    for path, leaf in trees.named_leaves(params).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)
