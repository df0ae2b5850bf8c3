"""Thresholds and steps at an entropy, for Laplace weights: the joint target in closed form.

    minimise sum_i F_i(D_i)   subject to   sum_ij n_ij R(beta_i, Delta_i; tau_ij) = bits * n

in the units of `opq_jax.allocation.channels`.  With mu_i = 2 lambda n_i / F_i'(d_i),
s_ij = exp(-beta_i / tau_ij), x_ij = Delta_i / tau_ij and kappa(x) = x / (4 sinh(x/2)^2), a
stationary leaf meets

    beta_i^2 sum_j w_j = sum_j w_j [V_ij + mu_i (log2(exp(beta_i / tau_ij) - 1) + C_ij)],
                                                                     w_j = n_ij s_ij / tau_ij
    sum_j n_ij s_ij tau_ij kappa_ij (x_ij coth(x_ij / 2) - 2) = mu_i / ln 2
                                                       * sum_j n_ij s_ij kappa_ij / tau_ij

With a single scale the second line is mu = tau^2 ln 2 (x coth(x/2) - 2): the step in closed form.
That solution, tabulated once, starts a Newton iteration on all leaves and lambda together, which is
exact for leaves of any scales.  (Our derivation.)
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opq_jax.allocation import laplace
from opq_jax.allocation.channels import Channels
from opq_jax.allocation.newton import solve_stationarity

_LOG2 = math.log(2.0)
_ALL_PRUNED = 12.0  # mu / tau^2 at which fewer than 1e-6 of a leaf's weights survive
_FAR = 80.0  # scales: exp(-80) is nothing beside 1, and still a normal float32
_SMALL = 1e-2  # scales below which float64 series replace formulas that cancel
_BISECTIONS = 30  # of log lambda: to the precision of float32


def minimise_at_rate(
  channels: Channels, bits: Float[Array, '']
) -> tuple[Float[Array, 'leaves'], Float[Array, 'leaves']]:
  """Returns thresholds and steps, in units of t_i, whose codes have an entropy of `bits`.

  No step is below `channels.min_step`; where all steps are that fine, fewer bits are taken.

  Args:
    channels: the problem.
    bits: entropy of the codes, bits per weight over all leaves.
  """
  sums = functools.partial(_rate_sums, channels)
  conditions = functools.partial(_rate_conditions, channels)
  z, multiplier = _single_scale_start(channels, bits)

  # the entropy of the finest grids bounds the bits that can be met; 1 % below it Newton converges
  finest = channels.of(channels.min_step)
  most = jnp.sum(channels.share * laplace.entropy(finest / 2, finest, channels.scale))
  z, _ = solve_stationarity(sums, conditions, z, multiplier, jnp.minimum(bits, 0.99 * most))
  return jnp.exp(z[:, 0]), jnp.exp(z[:, 1])


def _rate_sums(channels: Channels, z: Array) -> list[Array]:
  """Returns the sums that `_rate_conditions` needs, at thresholds and steps exp(z[:, :2])."""
  threshold, step = (channels.of(jnp.exp(z[:, k])) for k in range(2))
  tau = jnp.where(channels.scale > 0, channels.scale, 1)
  # a channel of zeros is pruned entirely, as a threshold far beyond its scale would do
  b = jnp.where(channels.scale > 0, jnp.minimum(threshold / tau, _FAR), _FAR)
  d = jnp.minimum(step / tau, _FAR)
  s = jnp.where(channels.scale > 0, channels.share * jnp.exp(-b), 0)
  variance = laplace.survivor_error(d, jnp.ones_like(d))
  code_bits = laplace.survivor_entropy(d, jnp.ones_like(d))
  log_pruned = jnp.log(-jnp.expm1(-b))
  kappa, gamma = _step_terms(d)
  # without the barrier XLA fuses the exponentials into each of the seven sums below
  s, variance, code_bits, log_pruned, kappa, gamma = jax.lax.optimization_barrier(
    (s, variance, code_bits, log_pruned, kappa, gamma)
  )
  return channels.sums(
    s * tau * b * b,
    s * tau * variance,
    s / tau * ((b + log_pruned) / _LOG2 + code_bits),
    s * tau * kappa * gamma,
    s / tau * kappa,
    s * tau * tau * (b * b + 2 * b + 2 - variance),
    (channels.share * jnp.expm1(-b) * log_pruned + s * b) / _LOG2 + s * code_bits,
  )


def _rate_conditions(
  channels: Channels, z: Array, multiplier: Array, sums: list[Array]
) -> tuple[Array, Array]:
  """Returns the residuals at z = log (beta_i, Delta_i, mu_i), and the bits of each leaf."""
  squares, errors, odds, finer, coarser, retained, bits = sums
  share = channels.leaf_share()
  prune = 1 - (errors + jnp.exp(z[:, 2]) * odds) / squares
  quantize = jnp.log(finer / coarser) - z[:, 2] + math.log(_LOG2)
  # a step at its lower bound meets the bound instead of the condition
  quantize = jnp.minimum(quantize, z[:, 1] - jnp.log(channels.min_step))
  log_mu = jnp.log(2 * share) + multiplier - channels.log_price(retained / (2 * share))
  balance = z[:, 2] - jnp.minimum(
    log_mu, math.log(_ALL_PRUNED) + 2 * jnp.log(channels.max(channels.scale))
  )
  return jnp.stack([prune, quantize, balance], axis=1), bits


def _step_terms(d: Array) -> tuple[Array, Array]:
  """Returns kappa(d) = d / (4 sinh(d/2)^2) and d coth(d/2) - 2, without cancellation."""
  kappa = d * jnp.exp(-d) / jnp.square(jnp.expm1(-d))
  x = d / 2
  near, far = jnp.minimum(x, 1.0), jnp.maximum(x, 1.0)
  # Lambert's continued fraction: x coth x - 1 = x^2 / (3 + x^2 / (5 + …)); seven terms are off by
  # 3e-14 at x = 1
  fraction = jnp.full_like(near, 15.0)
  for odd in range(13, 1, -2):
    fraction = odd + near * near / fraction
  return kappa, 2 * jnp.where(x < 1, near * near / fraction, far / jnp.tanh(far) - 1)


class _Bracket(NamedTuple):
  """Multipliers, log lambda, with too many bits and with too few."""

  low: Float[Array, '']
  high: Float[Array, '']


def _single_scale_start(
  channels: Channels, bits: Float[Array, '']
) -> tuple[Float[Array, 'leaves 3'], Float[Array, '']]:
  """Returns z and log lambda as if every leaf had one scale: the exact solution where it has."""
  table = {k: jnp.asarray(v, channels.scale.dtype) for k, v in single_scale_table().items()}
  share = channels.leaf_share()
  offset = jnp.log(2 * share)
  if channels.price is None:
    # mu F'(d) = 2 lambda n with F'(d) = 1 / (1 - d): the table's key is log(mu / (1 - d))
    keys = table['log_mu'] - table['log_retained']
    if channels.weight is not None:
      offset -= jnp.log(channels.weight)
  else:
    keys = table['log_mu']
    offset -= jnp.log(channels.price)

  def look_up(multiplier: Array, *columns: str) -> list[Array]:
    """Interpolates columns of the table at the leaves' keys."""
    key = offset + multiplier
    # as many comparisons as there are rows: XLA compiles them faster than a searchsorted
    above = jnp.sum(keys[None] <= key[:, None], axis=1, dtype=jnp.int32)
    above = jnp.clip(above, 1, len(keys) - 1)
    low, high = keys[above - 1], keys[above]
    part = jnp.clip((key - low) / (high - low), 0, 1)
    ends = [(table[column][above - 1], table[column][above]) for column in columns]
    return [low + part * (high - low) for low, high in ends]

  def bisect(_: Array, bracket: _Bracket) -> _Bracket:
    middle = (bracket.low + bracket.high) / 2
    [log_bits] = look_up(middle, 'log_bits')
    too_many = jnp.sum(share * jnp.exp(log_bits)) > bits
    return _Bracket(
      jnp.where(too_many, middle, bracket.low), jnp.where(too_many, bracket.high, middle)
    )

  bracket = _Bracket(keys[0] - jnp.max(offset), keys[-1] - jnp.min(offset))
  bracket = jax.lax.fori_loop(0, _BISECTIONS, bisect, bracket)
  multiplier = (bracket.low + bracket.high) / 2
  found = look_up(multiplier, 'log_threshold', 'log_step', 'log_mu')
  return jnp.stack(found, axis=1), multiplier


@functools.cache
def single_scale_table() -> dict[str, np.ndarray]:
  """Tabulates the minimiser of D + mu R for tau = 1, over mu, in logarithms.

  A leaf of a single scale depends on mu / tau^2 alone, so one small table serves every leaf.  The
  step gives mu = ln 2 (d coth(d/2) - 2) in closed form, and the threshold b is the larger root of
  the convex b^2 - mu log2(exp(b) - 1) - V - mu C, to which Newton's method descends from the right.

  >>> table = single_scale_table()
  >>> row = abs(table['log_mu'] - np.log(0.5)).argmin()
  >>> [round(float(np.exp(table[name][row])), 1) for name in ('log_threshold', 'log_step')]
  [1.4, 2.1]
  """
  d = np.geomspace(1e-4, 20.0, 400)
  mu = _LOG2 * (d / np.tanh(d / 2) - 2)
  mu = np.where(d < _SMALL, _LOG2 * d * d / 6, mu)
  variance = np.where(d < _SMALL, d * d / 12, 1 - (d / 2 / np.sinh(d / 2)) ** 2)
  code_bits = 1 + (-np.log(-np.expm1(-d)) + d / np.expm1(d)) / _LOG2
  b = mu / _LOG2 + np.sqrt(variance + mu * code_bits) + 1
  for _ in range(60):
    value = b * b - mu * (b + np.log(-np.expm1(-b))) / _LOG2 - variance - mu * code_bits
    b = b - value / (2 * b - mu / _LOG2 / -np.expm1(-b))
  s = np.exp(-b)
  retained = s * (b * b + 2 * b + 2 - variance) / 2
  entropy = (b * s + np.expm1(-b) * np.log(-np.expm1(-b))) / _LOG2 + s * code_bits
  inside = mu < _ALL_PRUNED
  columns = {
    'log_mu': mu, 'log_threshold': b, 'log_step': d, 'log_retained': retained, 'log_bits': entropy,
  }  # fmt: skip
  return {name: np.log(column[inside]) for name, column in columns.items()}
