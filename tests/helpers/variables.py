"""Random variables of the named networks."""

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax import models


def random_variables(model):
  """Variables that keep an image felt to the last layer, without compiling an initialisation."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if leaf.ndim > 1:
      return jnp.asarray(
        rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape), 'float32'
      )
    is_scale = path[-1].key in ('scale', 'var')
    low, high = (0.5, 1.5) if is_scale else (-0.3, 0.3)
    return jnp.asarray(rng.uniform(low, high, leaf.shape), 'float32')

  return jax.tree.map_with_path(draw, models.variable_shapes(model))
