"""What every BatchNorm makes of one batch, by the running statistics that it updates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

STATISTICS = 'batch_stats'


def pairs(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The paths of mean and variance of every BatchNorm among the leaves of `batch_stats`.

  >>> pairs({'norm/mean': 0, 'norm/var': 1, 'other': 2})
  [('norm/mean', 'norm/var')]
  """
  found = [
    (name, f'{name.removesuffix("mean")}var')
    for name in statistics
    if name.split('/')[-1] == 'mean'
  ]
  return [(mean, var) for mean, var in found if var in statistics]


def updated(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  inputs: Float[Array, 'batch ...'],
  old: Mapping[str, Float32[Array, '...']],
) -> tuple[dict[str, Float32[Array, '...']], Any]:
  """The running statistics by path, moved from `old` by one batch, and the network's output."""
  collections = {**variables, STATISTICS: trees.replaced(variables[STATISTICS], old)}
  output, updates = apply_fn(collections, inputs, train=True, mutable=[STATISTICS])
  new = trees.named_leaves(updates[STATISTICS])
  return {name: new[name].astype(jnp.float32) for name in old}, output


def of_batch(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> tuple[dict[str, Float32[Array, '...']], dict[str, Float32[Array, '...']], Any]:
  """One forward pass on batch statistics.

  An update is momentum * old + (1 - momentum) * batch.  From old = 0 it is the second term alone,
  which nothing larger rounds, and its derivative by old is the momentum itself.

  Returns:
    (1 - momentum) times the moment of the batch, by the path of the running statistic; momentum,
    by the same paths and per channel; and the network's output.
  """
  old = zeros(variables)
  return jax.jvp(
    lambda old: updated(apply_fn, variables, inputs, old),
    (old,),
    (jax.tree.map(jnp.ones_like, old),),
    has_aux=True,
  )


def zeros(variables: Mapping[str, PyTree]) -> dict[str, Float32[Array, '...']]:
  """Running statistics of nothing, by path."""
  statistics = trees.named_leaves(variables[STATISTICS])
  names = [name for pair in pairs(statistics) for name in pair]
  return {name: jnp.zeros(jnp.shape(statistics[name]), jnp.float32) for name in names}


def check_collections(variables: Mapping[str, PyTree]) -> None:
  """Raises ValueError where params or statistics are missing."""
  missing = {'params', STATISTICS} - set(variables)
  if missing:
    names = ' and '.join(sorted(missing, reverse=True))
    raise ValueError(f'variables: found {sorted(variables)}, expected {names} too')


def check(variables: Mapping[str, PyTree]) -> None:
  """Raises ValueError where there is no BatchNorm."""
  statistics = trees.named_leaves(variables[STATISTICS])
  if not pairs(statistics):
    raise ValueError(
      f'{STATISTICS}: found {sorted(statistics)}, expected a mean and a var of some BatchNorm'
    )


def check_updates(momentum: Mapping[str, Float32[Array, '...']]) -> None:
  """Raises ValueError where a BatchNorm took no part; in a trace nobody knows."""
  if trees.is_traced(momentum):
    return
  idle = [name for name, leaf in jax.device_get(momentum).items() if (leaf >= 1).any()]
  if idle:
    raise ValueError(
      f'{STATISTICS}: found no update of {idle} with train=True, expected momentum * old + '
      '(1 - momentum) * batch with a momentum below 1'
    )
