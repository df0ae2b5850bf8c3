"""Joined statistics in the units of the problems: dimensionless, so that no square overflows."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.allocation.channels import Channels
from opq_jax.allocation.histogram_sums import sums_of
from opq_jax.allocation.joined_statistics import JoinedStatistics
from opq_jax.allocation.rate_problem import RateProblem
from opq_jax.core.limits import MAX_LEVELS

_SHARE_OF_ZEROS = 1e-7  # of all weights, for a leaf of zeros: far below any tolerance
_BFLOAT16_MANTISSA = 7  # bits: dtypes of no more have a bin for every number


def channels_of(tree: JoinedStatistics, block: int) -> tuple[Channels, Float[Array, 'leaves']]:
  """Returns the problem in dimensionless form, and the unit of length t_i of every leaf.

  A leaf of zeros has no scale and takes no bits.  It is solved with scales of 1, a negligible share
  and an average price, so that it neither moves the answer nor slows the search;
  `opq_jax.allocation.description` overrules its result.

  Args:
    tree: the joined statistics.
    block: of their layout.
  """
  largest = tree.largest()
  is_alive = largest > 0
  safe = jnp.where(is_alive, largest, 1)
  total = functools.partial(
    jax.ops.segment_sum,
    segment_ids=tree.leaf,
    num_segments=tree.leaves,
    indices_are_sorted=True,
  )
  # tau / max lies in [0, 1]: no square of it overflows or, where it counts, underflows
  scale = tree.scale / safe[tree.leaf]
  share = total(tree.share)
  spread = jnp.where(is_alive, jnp.sqrt(total(tree.share * scale * scale) / share), 1)
  unit = safe * spread
  price = None
  if tree.power is not None:
    # the energy S_i is share * unit^2 up to a constant.  Its logarithm is taken of units relative
    # to the largest one: that of a unit of 1e-30 would cost digits
    tiny = jnp.finfo(unit.dtype).tiny
    ratio = unit / jnp.maximum(jnp.max(jnp.where(is_alive, unit, 0)), tiny)
    energy = jnp.log(share) + 2 * jnp.log(jnp.maximum(ratio, tiny))
    log_price = tree.power * energy + jnp.log(tree.omegas)
    highest = jnp.max(jnp.where(is_alive, log_price, -jnp.inf))
    # a leaf of zeros is priced so that its condition has the same scale as the other leaves'
    usual = _SHARE_OF_ZEROS * jnp.sum(is_alive, dtype=unit.dtype)
    price = jnp.where(is_alive, jnp.exp(log_price - highest), usual)
  channels = Channels(
    scale=jnp.where(is_alive[tree.leaf], scale / spread[tree.leaf], 1),
    share=jnp.where(
      is_alive[tree.leaf], tree.share, _SHARE_OF_ZEROS * tree.share / share[tree.leaf]
    ),
    leaf=tree.leaf,
    leaves=tree.leaves,
    price=price,
    min_step=jnp.where(is_alive, safe / MAX_LEVELS / unit, 1e-3),
    block=block,
    weight=tree.omegas if tree.power is None else None,
  )
  return channels, unit


def binary_unit(unit: Float[Array, 'leaves']) -> Float[Array, 'leaves']:
  """Returns the power of two above each unit: dividing by it changes no bin of a histogram."""
  return jnp.ldexp(jnp.ones_like(unit), jnp.frexp(unit)[1])


def rate_problem_of(
  tree: JoinedStatistics,
  channels: Channels,
  unit: Float[Array, 'leaves'],
  palette_levels: int | None = None,
) -> RateProblem:
  """Returns the problem of `opq_jax.allocation.rate_search`, in binary units.

  Args:
    tree: the joined statistics, with histograms.
    channels, unit: from `channels_of`.
    palette_levels: as in `RateProblem`.
  """
  own = binary_unit(unit)
  assert tree.histogram is not None
  has_own_bins = tree.mantissa <= _BFLOAT16_MANTISSA
  sums = sums_of(tree.histogram, tree.ends / own, tree.numbers / own[:, None], has_own_bins)
  if tree.power is None:
    tiny = jnp.finfo(unit.dtype).tiny
    log_mu = jnp.log(jnp.asarray(tree.sizes)) + jnp.log(jnp.maximum(sums.energy(), tiny))
    log_mu = log_mu - jnp.log(tree.omegas)
  else:
    # mu = lambda / F', F = omega S^(power - 1) D, and S = 2 n t^2
    energy = jnp.log(2 * jnp.asarray(tree.sizes)) + 2 * jnp.log(unit)
    log_mu = (1 - jnp.asarray(tree.power)) * energy - jnp.log(tree.omegas) - 2 * jnp.log(own)
  most = MAX_LEVELS if palette_levels is None else palette_levels
  has_lattice = (tree.lattices.levels > 0) & (tree.lattices.levels <= most)
  return RateProblem(
    sums=sums,
    sizes=jnp.asarray(tree.sizes),
    share=channels.leaf_share(),
    mantissa=tree.mantissa,
    log_mu=log_mu,
    is_linear=tree.power is not None,
    lattice_bits=jnp.where(has_lattice, tree.lattices.bits, jnp.inf),
    lattice_error=tree.lattices.error * jnp.square(sums.largest),
    palette_levels=palette_levels,
  )
