"""Closed forms for Laplace weights: pruning, quantization and entropy of one channel.

A channel's weights have the density f(w) = exp(-|w| / tau) / (2 tau).  Weights with |w| <= beta are
pruned.  The excess |w| - beta of a survivor is again exponential with scale tau (the density has no
memory), so all cells of one width Delta have the same error and the same centroid, and the best
codebook is the affine grid +-(beta + (k - 1) Delta + delta), k = 1, 2, …, and 0 for the pruned.

In every function `threshold` is beta, `step` is Delta and `scale` is tau = E|w|, its maximum
likelihood estimate.  All are >= 0 and broadcast against each other; `threshold` and `step` may be
inf.  With b = beta / tau, d = Delta / tau and q = exp(-d) the functions return, per weight:

    pruned_fraction     p     = 1 - exp(-b)
    pruning_error       E     = 2 tau^2 - (beta^2 + 2 beta tau + 2 tau^2) exp(-b)
    survivor_error      V     = tau^2 - Delta^2 q / (1 - q)^2
    survivor_offset     delta = tau - Delta q / (1 - q)
    survivor_entropy    C     = 1 + h_b(q) / (1 - q)                       bits, the sign included
    distortion          D     = E + exp(-b) V
    retained_energy     2 tau^2 - D
    entropy             R     = h_b(p) + exp(-b) C                         bits

where h_b is the binary entropy.  No formula is evaluated as written: each is arranged so that
nothing cancels for small b or d and nothing overflows for large ones.  Value and gradient are free
of NaN on the whole closed domain.  A channel of zeros (tau = 0) is pruned entirely at no error and
no rate.  C grows without bound as Delta -> 0, and so does R where anything survives.

The formulas are our derivation from the density; the paper (Hu et al., AAAI 2021) uses E.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Value = Float[Array, '...']

_LOG2 = math.log(2.0)
_FAR = 800.0  # scales beyond which every exponential underflows to 0, in float64 too
_MANY_BITS = 1e4  # stands for infinite entropy as the factor of a derivative: inf * 0 is NaN


def pruned_fraction(threshold: Value, scale: Value) -> Value:
  """Returns the share of the weights with |w| <= threshold: 1 - exp(-threshold / scale).

  >>> float(pruned_fraction(jnp.float32(0.0), jnp.float32(1.0)))
  0.0
  """
  return -jnp.expm1(-_ratio(threshold, scale))


def pruning_error(threshold: Value, scale: Value) -> Value:
  """Returns the squared error per weight of setting |w| <= threshold to 0.

  E = E[w^2; |w| <= beta] = 2 tau^2 - (beta^2 + 2 beta tau + 2 tau^2) exp(-beta / tau).  For b < 1
  the equal series exp(-b) b^3 / 3 (1 + b/4 + b^2/(4 5) + …) is summed instead.

  >>> round(float(pruning_error(jnp.float32(jnp.inf), jnp.float32(2.0))), 6)
  8.0
  """
  b = _ratio(threshold, scale)
  # clamped on either side of 1: a derivative goes through the branch that is not taken as well, and
  # what overflows there times 0 is NaN.  By selection, for `minimum` halves the derivative at 1
  near, far = jnp.where(b < 1, b, 1.0), jnp.where(b < 1, 1.0, b)
  series = jnp.ones_like(near)
  # 15 terms: at b = 1 the next one, 3! / 19!, is below the rounding of float64
  for k in range(18, 3, -1):
    series = 1 + near / k * series
  small = jnp.exp(-near) * near**3 / 3 * series
  large = 2 - (far * far + 2 * far + 2) * jnp.exp(-far)
  return scale * scale * jnp.where(b < 1, small, large)


def survivor_error(step: Value, scale: Value) -> Value:
  """Returns the squared error of a survivor: the variance in a cell, tau^2 - Delta^2 q / (1 - q)^2.

  V -> Delta^2 / 12 as Delta -> 0 and V -> tau^2 as Delta -> inf.

  >>> round(float(survivor_error(jnp.float32(0.01), jnp.float32(1.0)) / 0.01**2 * 12), 4)
  1.0
  """
  # Delta^2 q / (1 - q)^2 = tau^2 (x / sinh x)^2 with x = d / 2, and 1 - (1 - s)^2 = s (2 - s)
  shortfall = _sinh_shortfall(_ratio(step, scale) / 2)
  return scale * scale * shortfall * (2 - shortfall)


def survivor_offset(step: Value, scale: Value) -> Value:
  """Returns the distance of a centroid from its cell's inner edge: tau - Delta q / (1 - q).

  delta -> Delta / 2 as Delta -> 0 and delta -> tau as Delta -> inf.

  >>> round(float(survivor_offset(jnp.float32(0.01), jnp.float32(1.0))), 5)
  0.00499
  """
  # d q / (1 - q) = exp(-x) x / sinh x with x = d / 2: a sum of two positive terms is left
  x = _ratio(step, scale) / 2
  return scale * (-jnp.expm1(-x) + jnp.exp(-x) * _sinh_shortfall(x))


def survivor_entropy(step: Value, scale: Value) -> Value:
  """Returns the bits of a survivor's code, its sign and its cell: C = 1 + h_b(q) / (1 - q).

  C is +inf at step 0, and 1 (the sign alone) as step -> inf.

  >>> float(survivor_entropy(jnp.float32(jnp.inf), jnp.float32(1.0)))
  1.0
  """
  # h_b(q) / (1 - q) is d / expm1(d) - log(1 - q) in nats, and for small d 1 - q is d times a factor
  # near 1.  With log(d) split into two logarithms the derivative in the scale is finite at step 0
  is_near = step < scale
  near_step, near_scale = jnp.where(is_near, step, 1), jnp.where(is_near, scale, 1)
  x = _ratio(near_step, near_scale) / 2
  ratio = 1 - _sinh_shortfall(x)
  near = jnp.log(near_scale) - jnp.log(near_step) + x + jnp.log(ratio) + jnp.exp(-x) * ratio
  d = jnp.where(is_near, 1, _ratio(step, scale))
  far = -_log1mexp(d) + d * jnp.exp(-d) / -jnp.expm1(-d)
  return 1 + jnp.where(is_near, near, far) / _LOG2


def distortion(threshold: Value, step: Value, scale: Value) -> Value:
  """Returns the squared error per weight of pruning and quantization: E + exp(-beta / tau) V.

  >>> round(float(distortion(jnp.float32(1.372), jnp.float32(2.157), jnp.float32(1.0)) / 2), 4)
  0.1993
  """
  survivors = jnp.exp(-_ratio(threshold, scale))
  return pruning_error(threshold, scale) + survivors * survivor_error(step, scale)


def retained_energy(threshold: Value, step: Value, scale: Value) -> Value:
  """Returns the energy per weight of the compressed weights: 2 tau^2 - D, without cancellation.

  Values are centroids, so E[w^2] = E[value^2] + E[(w - value)^2].

  >>> round(float(retained_energy(jnp.float32(0.0), jnp.float32(0.0), jnp.float32(3.0))), 5)
  18.0
  """
  b = _ratio(threshold, scale)
  shortfall = _sinh_shortfall(_ratio(step, scale) / 2)
  return scale * scale * jnp.exp(-b) * (b * b + 2 * b + 1 + (1 - shortfall) ** 2)


def entropy(threshold: Value, step: Value, scale: Value) -> Value:
  """Returns the bits per weight of the codes: the mask, and the codes of the survivors.

  R = h_b(1 - exp(-b)) + exp(-b) C, 0 where everything is pruned.  At threshold 0 the one-sided
  derivative in the threshold is +inf; the gradient there is the largest finite logarithm.

  >>> round(float(entropy(jnp.float32(1.372), jnp.float32(2.157), jnp.float32(1.0))), 3)
  1.219
  """
  b = _ratio(threshold, scale)
  survivors, pruned = jnp.exp(-b), -jnp.expm1(-b)
  # the logarithm of the survivors' share is -b itself: no logarithm of an underflow
  which = (b * survivors - pruned * _log1mexp(b)) / _LOG2
  any_left = survivors > 0
  codes = survivor_entropy(jnp.where(any_left, step, 1), jnp.where(any_left, scale, 1))
  return which + jnp.where(any_left, _product(survivors, codes), 0)


@jax.custom_jvp
def _ratio(x: Value, scale: Value) -> Value:
  """Returns x / scale, at most _FAR; _FAR where the scale is 0."""
  inside = x < _FAR * scale
  return jnp.where(inside, jnp.where(inside, x, 0) / jnp.where(inside, scale, 1), _FAR)


@_ratio.defjvp
def _ratio_jvp(primals: tuple, tangents: tuple) -> tuple[Value, Value]:
  # the textbook derivative divides by scale**2, which underflows long before scale does
  (x, scale), (dx, dscale) = primals, tangents
  ratio = _ratio(x, scale)
  inside = x < _FAR * scale
  tangent = (dx - ratio * dscale) / jnp.where(inside, scale, 1)
  return ratio, jnp.where(inside, tangent, 0)


@jax.custom_jvp
def _product(share: Value, bits: Value) -> Value:
  """Returns share * bits; bits may be inf, the derivative in `share` is at most _MANY_BITS."""
  return share * bits


@_product.defjvp
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[Value, Value]:
  (share, bits), (dshare, dbits) = primals, tangents
  return share * bits, share * dbits + jnp.minimum(bits, _MANY_BITS) * dshare


def _log1mexp(x: Value) -> Value:
  """Returns log(1 - exp(-x)), accurate for small and large x; at 0, the log of the least float."""
  # at log 2, where exp(-x) is 1/2, neither form has lost more than a bit
  near, far = jnp.where(x < _LOG2, x, _LOG2), jnp.where(x < _LOG2, _LOG2, x)
  tiny = jnp.finfo(near.dtype).tiny
  small = jnp.log(jnp.maximum(-jnp.expm1(-near), tiny))
  return jnp.where(x < _LOG2, small, jnp.log1p(-jnp.exp(-far)))


def _sinh_shortfall(x: Value) -> Value:
  """Returns 1 - x / sinh(x), in [0, 1], without cancellation: x^2 / 6 for small x."""
  near, far = jnp.where(x < 1, x, 1.0), jnp.where(x < 1, 1.0, x)
  square = near * near
  series = jnp.ones_like(near)
  # seven terms: at x = 1 the next one is again 3! / 19!
  for k in range(8, 1, -1):
    series = 1 + square / ((2 * k) * (2 * k + 1)) * series
  excess = square / 6 * series  # sinh(x) / x - 1
  small = excess / (1 + excess)
  # sinh itself would overflow
  large = 1 - 2 * far * jnp.exp(-far) / -jnp.expm1(-2 * far)
  return jnp.where(x < 1, small, large)
