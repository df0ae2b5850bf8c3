"""Weights that fit a layer to the inputs that compressed layers before it give."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


@jax.jit
def fitted_rows(
  rows: Float[Array, 'K outputs'],
  moments: Float32[Array, 'groups K K'],
  cross_moments: Float32[Array, 'groups K K'],
  share: Float[Array, ''],
  damping: Float[Array, ''],
  residual: Float32[Array, 'K outputs'] | None = None,
) -> Float32[Array, 'K outputs']:
  """Returns W + share (H^-1 (C W + R) - W), with H damped: weights that make good earlier errors.

  Args:
    rows: W, one row an input.
    moments: H = E[x'^T x'] of the rows that the compressed layers before give.
    cross_moments: C = E[x'^T x], with the rows x of the float network.
    share, damping: as in `LayerByLayer`.
    residual: R = E[x'^T (r - r')], or a part of it, where the outputs are added to r in the float
      network and to r' in the other; None for 0.
  """
  groups, width, _ = moments.shape
  of_groups = lambda rows: rows.astype(jnp.float32).reshape(width, groups, -1).swapaxes(0, 1)
  weights = of_groups(rows)
  mean = jnp.mean(jnp.diagonal(moments, axis1=1, axis2=2), axis=1)[:, None, None]
  damped = moments + damping * jnp.where(mean > 0, mean, 1) * jnp.eye(width)[None]
  # H^-1 C - 1 = H^-1 (C - H), which is 0 where the inputs are those of the float network
  moved = jnp.matmul(cross_moments - moments, weights, precision=lax.Precision.HIGHEST)
  if residual is not None:
    moved += of_groups(residual)
  fitted = weights + share * jnp.linalg.solve(damped, moved)
  return fitted.swapaxes(0, 1).reshape(rows.shape)
