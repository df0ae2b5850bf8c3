"""Checks of variables before a correction, with every mismatch in one message."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_statistics import STATISTICS, mean_var_pairs


def check_collections(variables: Mapping[str, PyTree]) -> None:
  """Raises ValueError where `params` or the running statistics are missing."""
  missing = {'params', STATISTICS} - set(variables)
  if missing:
    names = ' and '.join(sorted(missing, reverse=True))
    raise ValueError(f'variables: found {sorted(variables)}, expected {names} too')


def check_same_tree(variables: PyTree, compressed: PyTree, collections: set[str]) -> None:
  """Raises ValueError unless both trees have these collections, and equal paths, shapes, dtypes."""
  for label, tree in (('variables', variables), ('compressed', compressed)):
    if collections and not (isinstance(tree, Mapping) and collections <= tree.keys()):
      names = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
      wanted = ' and '.join(sorted(collections, reverse=True))
      raise ValueError(f'{label}: found {names}, expected the collections {wanted}')
  found, expected = (
    {name: _describe(leaf) for name, leaf in trees.named_leaves(tree).items()}
    for tree in (compressed, variables)
  )
  if lines := messages.differences(found, expected):
    raise ValueError('\n'.join(['compressed is not the tree of variables:', *lines]))


def check_has_batch_norm(variables: Mapping[str, PyTree]) -> None:
  """Raises ValueError where no node of the statistics has a mean and a variance."""
  statistics = trees.named_leaves(variables[STATISTICS])
  if not mean_var_pairs(statistics):
    raise ValueError(
      f'{STATISTICS}: found {sorted(statistics)}, expected a mean and a var of some BatchNorm'
    )


def check_updates(momentum: Mapping[str, Float32[Array, '...']]) -> None:
  """Raises ValueError where a BatchNorm has not updated its statistics, unless in a trace.

  A momentum of 1 is a statistic that stays as it is: the network ran with `train=False`.
  """
  if trees.is_traced(momentum):
    return
  idle = [name for name, leaf in jax.device_get(momentum).items() if (leaf >= 1).any()]
  if idle:
    raise ValueError(
      f'{STATISTICS}: found no update of {idle} with train=True, expected momentum * old + '
      '(1 - momentum) * batch with a momentum below 1'
    )


def _describe(leaf: Any) -> str:
  return f'{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}'
