"""The moments of one batch at every BatchNorm, read from the running statistics that it updates.

Nothing of the network is intercepted: BatchNorm itself tells the batch's mean and variance, through
the update of its running statistics in training mode.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

STATISTICS = 'batch_stats'
"""Flax's collection of running statistics."""


class BatchMoments(NamedTuple):
  """Moments of one batch at every BatchNorm, by the path of the running statistic.

  Attributes:
    scaled: (1 - momentum) times the mean or variance of the batch, per channel.
    momentum: of the update, per channel.
    output: of the network.
  """

  scaled: dict[str, Float32[Array, '...']]
  momentum: dict[str, Float32[Array, '...']]
  output: Any


def mean_var_pairs(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the paths of mean and variance of every BatchNorm among named leaves.

  >>> mean_var_pairs({'norm/mean': 0, 'norm/var': 1, 'other': 2})
  [('norm/mean', 'norm/var')]
  """
  candidates = [
    (name, f'{name.removesuffix("mean")}var')
    for name in statistics
    if name.split('/')[-1] == 'mean'
  ]
  return [(mean, var) for mean, var in candidates if var in statistics]


def updated_statistics(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  inputs: Float[Array, 'batch ...'],
  old: Mapping[str, Float32[Array, '...']],
) -> tuple[dict[str, Float32[Array, '...']], Any]:
  """Returns the running statistics after one batch, starting from `old`, and the output."""
  collections = {**variables, STATISTICS: trees.replaced(variables[STATISTICS], old)}
  output, updates = apply_fn(collections, inputs, train=True, mutable=[STATISTICS])
  new = trees.named_leaves(updates[STATISTICS])
  return {name: new[name].astype(jnp.float32) for name in old}, output


def batch_moments(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> BatchMoments:
  """Runs a network once in training mode and returns the moments of the batch.

  An update is momentum * old + (1 - momentum) * batch.  With old = 0 it equals the second term,
  free of the rounding that a large old value would cause, and its derivative by old is the
  momentum.  Both come from one `jax.jvp`.
  """
  old = zero_statistics(variables)
  scaled, momentum, output = jax.jvp(
    lambda old: updated_statistics(apply_fn, variables, inputs, old),
    (old,),
    (jax.tree.map(jnp.ones_like, old),),
    has_aux=True,
  )
  return BatchMoments(scaled, momentum, output)


def zero_statistics(variables: Mapping[str, PyTree]) -> dict[str, Float32[Array, '...']]:
  """Returns zeros in place of every BatchNorm's running statistics, by path."""
  statistics = trees.named_leaves(variables[STATISTICS])
  names = [name for pair in mean_var_pairs(statistics) for name in pair]
  return {name: jnp.zeros(jnp.shape(statistics[name]), jnp.float32) for name in names}
