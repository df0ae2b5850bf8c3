"""The channels of all leaves in one array: the variables of every allocation problem.

Units.  Leaf i has n_i weights in channels of scales tau_ij.  Its lengths are measured in
t_i = sqrt(sum_j n_ij tau_ij^2 / n_i), so that its Laplace energy is 2 per weight, and

    d_i = D_i / (2 n_i)                                  its relative squared error, in [0, 1]

is the argument of the objective sum_i F_i(d_i): F_i = a_i d_i for the objectives that are linear in
the errors, F_i = -w_i log(1 - d_i) for `retained_signal`.  Counts are shares of all weights, so
that a constraint reads "per weight".  The problems, each in a module of its own:

    sparsity      minimise sum F_i(E_i)  subject to  sum n_ij p(beta_i; tau_ij)   = sparsity
    fixed_width   minimise sum F_i(D_i)  subject to  sum m_ij b_ij(Delta_i)       = bits * sum m_ij
    laplace_rate  minimise sum F_i(D_i)  subject to  sum n_ij R(beta_i, Delta_i)  = bits per weight

`sparsity` and `fixed_width` are the paper's two steps (Hu et al., AAAI 2021); `laplace_rate`, the
stationarity conditions as written there and all algorithms are our own derivation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Channels(NamedTuple):
  """The channels of all leaves, one after the other.

  Attributes:
    scale: tau_ij in units of t_i, or 0 for a channel of zeros.
    share: n_ij / n, the channel's share of all weights.
    leaf: index of each channel's leaf, ascending.
    leaves: number of leaves.
    price: a_i of a linear objective, or None for `retained_signal`.
    min_step: least Delta_i, in units of t_i: with 127 levels it reaches the largest weight.
    weight: w_i of `retained_signal`; None for 1.
    block: length of the runs of channels that belong to one leaf, from the first channel on.  Sums
      over a run are dense, and XLA scatters one number per run instead of one per channel.
  """

  scale: Float[Array, 'channels']
  share: Float[Array, 'channels']
  leaf: Int[Array | np.ndarray, 'channels']
  leaves: int
  price: Float[Array, 'leaves'] | None
  min_step: Float[Array, 'leaves']
  block: int = 1
  weight: Float[Array, 'leaves'] | None = None

  def sum(self, x: Float[Array, 'channels *more']) -> Float[Array, 'leaves *more']:
    """Sums over the channels of each leaf."""
    return self._sum_blocks(self._sum_in_blocks(x))

  def sums(self, *columns: Float[Array, 'channels']) -> list[Float[Array, 'leaves']]:
    """Sums several columns at once: one scatter serves them all."""
    blocks = [self._sum_in_blocks(column) for column in columns]
    return list(self._sum_blocks(jnp.stack(blocks, axis=1)).T)

  def _sum_in_blocks(self, x: Float[Array, 'channels *more']) -> Float[Array, 'blocks *more']:
    return jnp.sum(x.reshape(-1, self.block, *x.shape[1:]), axis=1)

  def _sum_blocks(self, x: Float[Array, 'blocks *more']) -> Float[Array, 'leaves *more']:
    leaf = self.leaf[:: self.block]
    return jax.ops.segment_sum(x, leaf, self.leaves, indices_are_sorted=True)

  def of(self, x: Float[Array, 'leaves *more']) -> Float[Array, 'channels *more']:
    """Repeats a number of each leaf for all of its channels."""
    # one look-up a block, then a broadcast
    blocks = x[self.leaf[:: self.block]][:, None]
    shape = (blocks.shape[0], self.block, *x.shape[1:])
    return jnp.broadcast_to(blocks, shape).reshape(-1, *x.shape[1:])

  def max(self, x: Float[Array, 'channels']) -> Float[Array, 'leaves']:
    """Returns the maximum over the channels of each leaf."""
    blocks = jnp.max(x.reshape(-1, self.block), axis=1)
    leaf = self.leaf[:: self.block]
    return jax.ops.segment_max(blocks, leaf, self.leaves, indices_are_sorted=True)

  def leaf_share(self) -> Float[Array, 'leaves']:
    """Returns n_i / n, the share of all weights that each leaf has."""
    return self.sum(self.share)

  def log_price(self, retained: Float[Array, 'leaves']) -> Float[Array, 'leaves']:
    """Returns log F_i'(d_i).

    Args:
      retained: 1 - d_i, which keeps its precision where d_i is near 1.
    """
    if self.price is not None:
      return jnp.log(self.price)
    log_price = -jnp.log(jnp.maximum(retained, jnp.finfo(retained.dtype).tiny))
    return log_price if self.weight is None else log_price + jnp.log(self.weight)

  def cost(self, retained: Float[Array, '...']) -> Float[Array, '...']:
    """Returns F_i(d_i).

    Args:
      retained: 1 - d_i, with the leaves on the first axis.
    """
    if self.price is not None:
      return (1 - retained) * self.price.reshape(-1, *[1] * (retained.ndim - 1))
    cost = -jnp.log(jnp.maximum(retained, jnp.finfo(retained.dtype).tiny))
    if self.weight is None:
      return cost
    return cost * self.weight.reshape(-1, *[1] * (retained.ndim - 1))
