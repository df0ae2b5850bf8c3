"""The three constrained problems of an allocation, over the channels of all leaves at once.

Units.  Leaf i has n_i weights in channels of scales tau_ij.  Its lengths are measured in
t_i = sqrt(sum_j n_ij tau_ij^2 / n_i), so that its Laplace energy is 2 per weight, and

    d_i = D_i / (2 n_i)                                  its relative squared error, in [0, 1]

is what the objective sum_i F_i(d_i) is made of: F_i = a_i d_i for the objectives that are linear in
the errors, F_i = -log(1 - d_i) for `retained_signal`.  Counts are shares of all weights, so a
constraint reads "per weight".

    sparsity   minimise sum F_i(E_i)   subject to  sum n_ij p(beta_i; tau_ij)   = sparsity
    bits       minimise sum F_i(D_i)   subject to  sum m_ij b_ij(Delta_i)       = bits * sum m_ij
    rate       minimise sum F_i(D_i)   subject to  sum n_ij R(beta_i, Delta_i)  = bits per weight

`sparsity` and `bits` are the paper's two steps (Hu et al., AAAI 2021); `rate`, the stationarity
conditions as written here and all algorithms are our own derivation.  Here are the two that
Newton's method solves; `opq_jax.allocation.fixed_width` has the third.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opq_jax.allocation import laplace

_LOG2 = math.log(2.0)
# mu / tau^2 at which a leaf counts as pruned entirely: fewer than 1e-6 of its weights survive
_ALL_PRUNED = 12.0


class Channels(NamedTuple):
  """The channels of all leaves, one after the other.

  Attributes:
    scale: tau_ij in units of t_i, or 0 for a channel of zeros.
    share: n_ij / n, the channel's share of all weights.
    leaf: which leaf each channel belongs to, ascending.
    leaves: how many leaves.
    price: a_i of a linear objective, or None for `retained_signal`.
    min_step: least Delta_i, in units of t_i: with 127 levels it reaches the largest weight.
    block: how many channels in a row are of one leaf, from the first on: sums are dense that far.
  """

  scale: Float[Array, 'channels']
  share: Float[Array, 'channels']
  leaf: Int[Array | np.ndarray, 'channels']
  leaves: int
  price: Float[Array, 'leaves'] | None
  min_step: Float[Array, 'leaves']
  block: int = 1

  def sum(self, x: Float[Array, 'channels *more']) -> Float[Array, 'leaves *more']:
    """Sums over the channels of each leaf."""
    return self._of_leaves(self._of_blocks(x))

  def sums(self, *columns: Float[Array, 'channels']) -> list[Float[Array, 'leaves']]:
    """`sum` of each."""
    blocks = [self._of_blocks(column) for column in columns]
    return list(self._of_leaves(jnp.stack(blocks, axis=1)).T)

  def _of_blocks(self, x: Float[Array, 'channels *more']) -> Float[Array, 'blocks *more']:
    return jnp.sum(x.reshape(-1, self.block, *x.shape[1:]), axis=1)

  def _of_leaves(self, x: Float[Array, 'blocks *more']) -> Float[Array, 'leaves *more']:
    leaf = self.leaf[:: self.block]
    return jax.ops.segment_sum(x, leaf, self.leaves, indices_are_sorted=True)

  def of(self, x: Float[Array, 'leaves *more']) -> Float[Array, 'channels *more']:
    """What the leaf of each channel has."""
    # looked up once a block, and repeated
    blocks = x[self.leaf[:: self.block]][:, None]
    shape = (blocks.shape[0], self.block, *x.shape[1:])
    return jnp.broadcast_to(blocks, shape).reshape(-1, *x.shape[1:])

  def max(self, x: Float[Array, 'channels']) -> Float[Array, 'leaves']:
    """The largest of the channels of each leaf."""
    blocks = jnp.max(x.reshape(-1, self.block), axis=1)
    leaf = self.leaf[:: self.block]
    return jax.ops.segment_max(blocks, leaf, self.leaves, indices_are_sorted=True)

  def leaf_share(self) -> Float[Array, 'leaves']:
    return self.sum(self.share)

  def log_price(self, retained: Float[Array, 'leaves']) -> Float[Array, 'leaves']:
    """log F_i'(d_i), given 1 - d_i."""
    if self.price is not None:
      return jnp.log(self.price)
    return -jnp.log(jnp.maximum(retained, jnp.finfo(retained.dtype).tiny))

  def cost(self, retained: Float[Array, '...']) -> Float[Array, '...']:
    """F_i(d_i), given 1 - d_i with the leaves on the first axis."""
    if self.price is not None:
      return (1 - retained) * self.price.reshape(-1, *[1] * (retained.ndim - 1))
    return -jnp.log(jnp.maximum(retained, jnp.finfo(retained.dtype).tiny))


def minimise_at_sparsity(channels: Channels, sparsity: Float[Array, '']) -> Float[Array, 'leaves']:
  """Thresholds beta_i, in units of t_i, that prune `sparsity` of all weights at the least cost.

  E' / p' = beta^2 whatever the scale, so stationarity is  F_i'(E_i) beta_i^2 / (2 n_i) = lambda
  for every leaf.
  """
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

  density = jnp.maximum(1 - sparsity, 1e-6)
  start = jnp.full((channels.leaves, 1), jnp.log(jnp.maximum(-jnp.log(density), 1e-6)))
  multiplier = jnp.mean(conditions(start, jnp.zeros_like(sparsity), sums(start))[0])
  z, _ = _newton(sums, conditions, start, multiplier, density)
  return jnp.where(sparsity > 0, jnp.exp(z[:, 0]), 0)


def minimise_at_rate(
  channels: Channels, bits: Float[Array, '']
) -> tuple[Float[Array, 'leaves'], Float[Array, 'leaves']]:
  """Thresholds and steps, in units of t_i, whose codes have an entropy of `bits` per weight.

  With mu_i = 2 lambda n_i / F_i'(d_i), s_ij = exp(-beta_i / tau_ij) and
  kappa(d) = d / (4 sinh(d/2)^2), a stationary leaf meets

    beta_i^2 sum_j w_j = sum_j w_j [V_ij + mu_i (log2(exp(beta_i / tau_ij) - 1) + C_ij)],
                                                                     w_j = n_ij s_ij / tau_ij
    sum_j n_ij s_ij tau_ij kappa_ij (d_ij coth(d_ij / 2) - 2) = mu_i / ln 2
                                                       * sum_j n_ij s_ij kappa_ij / tau_ij

  With a single scale the second line is mu = tau^2 ln 2 (d coth(d/2) - 2): the step in closed
  form.  That solution starts a Newton iteration on all leaves and lambda together, which is exact
  for leaves of any scales.  Where the second line would ask for a step below `min_step`, the step
  is `min_step`; where all steps are, no more bits are asked.

  Args:
    channels: the problem.
    bits: allowed entropy, bits per weight over all leaves.
  """
  sums = functools.partial(_rate_sums, channels)
  conditions = functools.partial(_rate_conditions, channels)
  z, multiplier = _single_scale_start(channels, bits)

  finest = channels.of(channels.min_step)
  most = jnp.sum(channels.share * laplace.entropy(finest / 2, finest, channels.scale))
  z, _ = _newton(sums, conditions, z, multiplier, jnp.minimum(bits, 0.99 * most))
  return jnp.exp(z[:, 0]), jnp.exp(z[:, 1])


def _rate_sums(channels: Channels, z: Array) -> list[Array]:
  """What `_rate_conditions` needs of the channels, at thresholds and steps exp(z[:, :2])."""
  threshold, step = (channels.of(jnp.exp(z[:, k])) for k in range(2))
  tau = jnp.where(channels.scale > 0, channels.scale, 1)
  # a channel of zeros is pruned entirely, as far beyond its scale as anything counts
  b = jnp.where(channels.scale > 0, jnp.minimum(threshold / tau, 80.0), 80.0)
  d = jnp.minimum(step / tau, 80.0)
  s = jnp.where(channels.scale > 0, channels.share * jnp.exp(-b), 0)
  variance = laplace.survivor_error(d, jnp.ones_like(d))
  code_bits = laplace.survivor_entropy(d, jnp.ones_like(d))
  log_pruned = jnp.log(-jnp.expm1(-b))
  kappa, gamma = _step_terms(d)
  # computed once, not once for each of the sums below
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
  """Residuals of `minimise_at_rate` at z = log (beta_i, Delta_i, mu_i), and bits of each leaf."""
  squares, errors, odds, finer, coarser, retained, bits = sums
  share = channels.leaf_share()
  prune = 1 - (errors + jnp.exp(z[:, 2]) * odds) / squares
  quantize = jnp.log(finer / coarser) - z[:, 2] + math.log(_LOG2)
  quantize = jnp.minimum(quantize, z[:, 1] - jnp.log(channels.min_step))
  log_mu = jnp.log(2 * share) + multiplier - channels.log_price(retained / (2 * share))
  balance = z[:, 2] - jnp.minimum(
    log_mu, math.log(_ALL_PRUNED) + 2 * jnp.log(channels.max(channels.scale))
  )
  return jnp.stack([prune, quantize, balance], axis=1), bits


def _step_terms(d: Array) -> tuple[Array, Array]:
  """kappa(d) = d / (4 sinh(d/2)^2) and d coth(d/2) - 2, without cancellation for small d."""
  kappa = d * jnp.exp(-d) / jnp.square(jnp.expm1(-d))
  x = d / 2
  near, far = jnp.minimum(x, 1.0), jnp.maximum(x, 1.0)
  # Lambert's continued fraction: x coth x - 1 = x^2 / (3 + x^2 / (5 + …))
  fraction = jnp.full_like(near, 15.0)
  for odd in range(13, 1, -2):
    fraction = odd + near * near / fraction
  return kappa, 2 * jnp.where(x < 1, near * near / fraction, far / jnp.tanh(far) - 1)


def _newton(
  sums: Callable[[Array], list[Array]],
  conditions: Callable[[Array, Array, list[Array]], tuple[Array, Array]],
  start: Float[Array, 'leaves k'],
  multiplier: Float[Array, ''],
  target: Float[Array, ''],
) -> tuple[Float[Array, 'leaves k'], Float[Array, '']]:
  """Newton's method on the stationarity conditions of all leaves and one constraint.

  A leaf's conditions depend on its own unknowns and the multiplier alone, so a few differences
  give the Jacobians of all leaves.  Differences, since XLA takes several times as long to compile
  exact derivatives of the sums, and they cost one iteration at most.

  Args:
    sums: z -> sums over the channels of each leaf; may depend on the first two unknowns only.
    conditions: (z, log lambda, sums) -> residuals [leaves, k], and the leaf's part [leaves] of
      what the constraint sums.
    start: z to begin with; logarithms, so a step of 1 is a factor of e.
    multiplier: log lambda to begin with.
    target: what the parts of all leaves sum to.

  Returns:
    z and log lambda after convergence (to the float's precision, or 60 steps).
  """
  k = start.shape[1]
  h = math.sqrt(float(jnp.finfo(start.dtype).eps))
  # row 0 is the point itself, the others move one unknown each, the last one the multiplier
  moves = np.eye(k + 2, k + 1, -1, dtype=start.dtype)
  moves_sums = moves[: 1 + min(k, 2)]
  which_sums = np.where(np.arange(k + 2) < len(moves_sums), np.arange(k + 2), 0)

  def is_moving(carry: tuple) -> Array:
    i, _, _, moved = carry
    # the step after a small one is its square
    return (i < 60) & (moved > 4 * h)

  def step(carry: tuple) -> tuple:
    i, z, multiplier, _ = carry
    summed = jax.vmap(lambda move: sums(z + h * move[None, :k]))(moves_sums)
    residuals, parts = jax.vmap(
      lambda move, total: conditions(z + h * move[None, :k], multiplier + h * move[k], total)
    )(moves, [total[which_sums] for total in summed])
    slopes = (residuals[1:] - residuals[:1]) / h  # [unknown, leaves, residual]
    gradient = (parts[1 : k + 1] - parts[:1]).T / h
    right = jnp.stack([residuals[0], slopes[k]], axis=-1)
    solved = _solved(slopes[:k], right)
    # a leaf that has run out of room (all pruned) has a singular system: it stays where it is
    solved = jnp.where(jnp.isfinite(solved), solved, 0)
    towards, along = -solved[..., 0], -solved[..., 1]
    slope = jnp.sum(gradient * along)
    missing = target - jnp.sum(parts[0]) - jnp.sum(gradient * towards)
    dm = jnp.clip(missing / jnp.where(jnp.abs(slope) > 0, slope, 1), -2, 2)
    dz = jnp.clip(towards + dm * along, -1, 1)
    return i + 1, z + dz, multiplier + dm, jnp.max(jnp.abs(dz))

  infinity = jnp.asarray(jnp.inf, start.dtype)
  _, z, multiplier, _ = jax.lax.while_loop(is_moving, step, (0, start, multiplier, infinity))
  return z, multiplier


def _solved(columns: Float[Array, 'k leaves k'], right: Float[Array, 'leaves k n']) -> Array:
  """Solutions of small systems of one or three unknowns, given the columns of their matrices.

  By Cramer's rule, which is quicker to compile than an elimination; what rounding does to it,
  Newton's method mends.
  """
  if len(columns) == 1:
    return right / columns[0][..., None]
  first, second, third = columns
  rows = jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)
  determinant = jnp.sum(first * rows[0], axis=-1)
  found = [jnp.sum(row[..., None] * right, axis=-2) for row in rows]
  return jnp.stack(found, axis=-2) / determinant[:, None, None]


def _single_scale_start(
  channels: Channels, bits: Float[Array, '']
) -> tuple[Float[Array, 'leaves 3'], Float[Array, '']]:
  """z and log lambda as if every leaf had one scale: the exact solution where it has."""
  table = {k: jnp.asarray(v, channels.scale.dtype) for k, v in single_scale_table().items()}
  offset = jnp.log(2 * channels.leaf_share())
  if channels.price is None:
    seen = table['log_mu'] - table['log_retained']  # log of mu F'(d)
  else:
    seen = table['log_mu']
    offset -= jnp.log(channels.price)
  share = channels.leaf_share()

  def look_up(multiplier: Array, *columns: str) -> list[Array]:
    at = offset + multiplier
    after = jnp.clip(jnp.sum(seen[None] <= at[:, None], axis=1, dtype=jnp.int32), 1, len(seen) - 1)
    low, high = seen[after - 1], seen[after]
    part = jnp.clip((at - low) / (high - low), 0, 1)
    ends = [(table[column][after - 1], table[column][after]) for column in columns]
    return [low + part * (high - low) for low, high in ends]

  def bisect(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bracket
    middle = (low + high) / 2
    [log_bits] = look_up(middle, 'log_bits')
    too_many = jnp.sum(share * jnp.exp(log_bits)) > bits
    return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

  bracket = seen[0] - jnp.max(offset), seen[-1] - jnp.min(offset)
  low, high = jax.lax.fori_loop(0, 30, bisect, bracket)
  multiplier = (low + high) / 2
  found = look_up(multiplier, 'log_threshold', 'log_step', 'log_mu')
  return jnp.stack(found, axis=1), multiplier


@functools.cache
def single_scale_table() -> dict[str, np.ndarray]:
  """The minimiser of D + mu R for tau = 1, over mu; METHOD: one small table serves every layer.

  The step gives mu = ln 2 (d coth(d/2) - 2) in closed form, and b is the larger root of the
  convex b^2 - mu log2(exp(b) - 1) - V - mu C, to which Newton descends from the right.
  """
  d = np.geomspace(1e-4, 20.0, 400)
  mu = _LOG2 * (d / np.tanh(d / 2) - 2)
  mu = np.where(d < 1e-2, _LOG2 * d * d / 6, mu)
  variance = np.where(d < 1e-2, d * d / 12, 1 - (d / 2 / np.sinh(d / 2)) ** 2)
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
