"""The bias of a network's output: found by its derivative, and shifted by a mean error.

A parameter vector b is a bias of the output where y = b + f(all other parameters), with the same b
for every example.  Its derivative d y / d b is then the identity, whatever the network's topology,
names or framework.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_statistics import STATISTICS


def shifted_biases(
  params: PyTree, is_bias: Mapping[str, Bool[Array, '']], shift: Float32[Array, ' outputs']
) -> dict[str, Float[Array, ' outputs']]:
  """Returns the candidates of `output_biases` by path, the first output bias less `shift`.

  Only one is shifted: the output is the sum of all its biases, and each further one would subtract
  the same shift again.
  """
  leaves = trees.named_leaves(params)
  is_pending = jnp.ones((), bool)
  new = {}
  for name, is_output_bias in is_bias.items():
    leaf = leaves[name]
    new[name] = jnp.where(is_pending & is_output_bias, leaf - shift.astype(leaf.dtype), leaf)
    is_pending &= ~is_output_bias
  return new


def output_biases(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  inputs: Float[Array, 'batch ...'],
  shape: tuple[int, ...],
  key: Array,
) -> dict[str, Bool[Array, '']]:
  """Returns, for every parameter of the output's `shape`, whether d output / d it is the identity.

  One derivative along a random tangent tells: only the identity, in all likelihood, returns the
  tangent itself for every example.  Where the derivative is the identity, it does not depend on
  the forward pass, and XLA removes that from the program.
  """
  # whole numbers below 128 are exact in bfloat16 too: the identity returns them bit for bit
  tangent = jax.random.randint(key, shape, 1, 128).astype(jnp.float32)

  def is_bias(name: str, leaf: Array) -> Array:
    def output(value: Array) -> Array:
      collections = {**variables, 'params': trees.replaced(variables['params'], {name: value})}
      return apply_fn(collections, inputs, train=True, mutable=[STATISTICS])[0]

    _, derivative = jax.jvp(output, (leaf,), (tangent.astype(leaf.dtype),))
    derivative = derivative.astype(jnp.float32)
    return jnp.all(derivative == jnp.broadcast_to(tangent, derivative.shape))

  return {
    name: is_bias(name, leaf)
    for name, leaf in trees.named_leaves(variables['params']).items()
    if jnp.shape(leaf) == shape and jnp.issubdtype(leaf.dtype, jnp.floating)
  }
