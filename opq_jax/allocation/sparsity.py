"""Thresholds at a sparsity: the first step of the paper (Hu et al., AAAI 2021).

    minimise sum_i F_i(E_i(beta_i))   subject to   sum_ij n_ij p(beta_i; tau_ij) = sparsity * n

in the units of `opq_jax.allocation.channels`.  E' / p' = beta^2 whatever the scale, so a stationary
leaf meets  F_i'(E_i) beta_i^2 / (2 n_i) = lambda.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation import laplace
from opq_jax.allocation.channels import Channels
from opq_jax.allocation.newton import solve_stationarity


def minimise_at_sparsity(channels: Channels, sparsity: Float[Array, '']) -> Float[Array, 'leaves']:
  """Returns the thresholds beta_i, in units of t_i, that prune `sparsity` at the least cost."""
  share = channels.leaf_share()

  def sums(z: Array) -> list[Array]:
    threshold = channels.of(jnp.exp(z[:, 0]))
    left = channels.share * (1 - laplace.pruned_fraction(threshold, channels.scale))
    energy = jnp.square(threshold + channels.scale) + jnp.square(channels.scale)
    return channels.sums(left, left * energy)

  def conditions(z: Array, multiplier: Array, sums: list[Array]) -> tuple[Array, Array]:
    left, retained = sums
    log_price = channels.log_price(retained / (2 * share))
    return (2 * z[:, 0] + log_price - jnp.log(2 * share) - multiplier)[:, None], left

  # start: the threshold of one scale, beta = -log(1 - sparsity), for every leaf
  density = jnp.maximum(1 - sparsity, 1e-6)
  start = jnp.full((channels.leaves, 1), jnp.log(jnp.maximum(-jnp.log(density), 1e-6)))
  multiplier = jnp.mean(conditions(start, jnp.zeros_like(sparsity), sums(start))[0])
  z, _ = solve_stationarity(sums, conditions, start, multiplier, density)
  return jnp.where(sparsity > 0, jnp.exp(z[:, 0]), 0)


def predict_survivors(
  channels: Channels, sparsity: Float[Array, '']
) -> tuple[Float[Array, 'leaves'], Float[Array, 'channels']]:
  """Returns thresholds in units of t_i and the survivors of every channel, by the closed form.

  Survivors are a share of all weights.
  """
  threshold = minimise_at_sparsity(channels, sparsity)
  left = 1 - laplace.pruned_fraction(channels.of(threshold), channels.scale)
  return threshold, channels.share * left


def pruned_ranks(
  channels: Channels,
  survivors: Float[Array, 'channels'],
  sizes: Float[Array | np.ndarray, 'leaves'],
) -> Int32[Array, 'leaves']:
  """Returns the number of weights that every leaf prunes, given its predicted survivors."""
  pruned = 1 - channels.sum(survivors) / channels.leaf_share()
  return jnp.round(pruned * sizes).astype(jnp.int32)
