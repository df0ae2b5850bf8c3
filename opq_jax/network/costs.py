"""What an error in a leaf costs the answer of a network: the price of each leaf, from gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.network.uses import usage


def divergence_costs(
  fn: Callable[..., Array],
  params: PyTree,
  *inputs: Any,
  key: Array,
) -> PyTree:
  r"""Returns the divergence of a network's answer per squared error of each leaf.

  With E the error of the weights, the answer p(y | x) of a network moves by

      KL(p || p_E)  =  1/2 vec(E)^T G vec(E)  +  O(|E|^3)        G = E_y[g g^T],  g = d log p(y | x)

  with G Fisher's matrix: y is drawn from the network's own answer, so no labels are needed.  An
  error that is spread evenly over the n_i weights of leaf i, with |E_i|^2 = D_i, costs

      omega_i D_i                                                omega_i = E|g_i|^2 / (2 n_i)

  and sum_i omega_i D_i is the objective for `opq_jax.allocate(params, objective=costs, ...)`.
  One backward pass an example gives all omega_i at once: the gradients of log p(y_t | y_<t) of an
  example's rows t are uncorrelated, because each has the mean 0 given the rows before it, so the
  energy of their sum is the sum of their energies.  (Our derivation.  Fisher's diagonal as the
  price of weights goes back to LeCun, Denker and Solla, "Optimal Brain Damage", 1989.)

  Args:
    fn: `fn(params, *inputs)` returns logits, [examples, ..., classes].  Examples must not see each
      other.
    params: the parameters; gradients are taken of all floating leaves.
    inputs: pytrees of arrays with examples in front.  Each example is run by itself, as a batch of
      one, so memory is that of one example and one gradient.
    key: for the draws of y.

  Returns:
    A tree like `params` with omega_i in nats a row per unit of squared error, float32.  Of a leaf
    with slices (`opq_jax.usage`) an array of them, one for each slice.  Leaves that the answer does
    not depend on, and those that are not floating, get the least positive normal number.

  Raises:
    ValueError: inputs have no or different numbers of examples; the answer is no logits of one
      example.

  >>> import opq_jax
  >>> params = {'kernel': jnp.zeros((3, 2))}
  >>> x = jnp.ones((64, 3))
  >>> fn = lambda params, x: x @ params['kernel']
  >>> costs = divergence_costs(fn, params, x, key=jax.random.key(0))
  >>> float(costs['kernel'])   # E|g|^2 = 3 inputs x 2 classes x 1/4, over 2 x 6 weights
  0.125
  """
  counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
  if len(counts) != 1 or counts in ({()}, {(0,)}):
    raise ValueError(
      f'inputs: found leading axes {sorted(counts)}, expected one number of examples, 1 or more'
    )
  leaves = trees.named_leaves(params)
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), inputs)
  leading = [used.slices for used in jax.tree.leaves(usage(fn, params, *one))]
  energies, rows = _energies(fn, tuple(leading), params, inputs, key)
  costs = [
    jnp.maximum(energy / (2 * rows * math.prod(leaf.shape[count:])), jnp.finfo(jnp.float32).tiny)
    for (leaf, count), energy in zip(
      zip(leaves.values(), leading, strict=True), energies, strict=True
    )
  ]
  return jax.tree.unflatten(jax.tree.structure(params), costs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _energies(
  fn: Callable[..., Array], leading: tuple[int, ...], params: PyTree, inputs: Any, key: Array
) -> tuple[list[Array], Array]:
  """Returns E|g_i|^2 of all leaves, a mean over examples, and the rows of an example."""

  def of_example(total: list[Array], example: tuple[Any, Array]) -> tuple[list[Array], Array]:
    values, own_key = example
    values = jax.tree.map(lambda leaf: leaf[None], values)

    def log_probability(params: PyTree) -> tuple[Array, Array]:
      logits = fn(params, *values)
      if jnp.ndim(logits) < 2 or logits.shape[0] != 1:
        raise ValueError(
          f'fn: found an answer of shape {jnp.shape(logits)} for one example, expected logits '
          '[1, ..., classes]'
        )
      log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
      drawn = jax.random.categorical(own_key, jax.lax.stop_gradient(log_probs))
      chosen = jnp.take_along_axis(log_probs, drawn[..., None], -1)
      return jnp.sum(chosen), jnp.float32(chosen.size)

    gradients, rows = jax.grad(log_probability, has_aux=True, allow_int=True)(params)
    energies = [
      jnp.zeros(leaf.shape[:count])
      if leaf.dtype == jax.dtypes.float0
      else jnp.sum(jnp.square(leaf.astype(jnp.float32)), tuple(range(count, leaf.ndim)))
      for leaf, count in zip(jax.tree.leaves(gradients), leading, strict=True)
    ]
    return [x + y for x, y in zip(total, energies, strict=True)], rows

  leaves = jax.tree.leaves(params)
  zeros = [jnp.zeros(leaf.shape[:n]) for leaf, n in zip(leaves, leading, strict=True)]
  examples = jax.tree.leaves(inputs)[0].shape[0]
  totals, rows = jax.lax.scan(of_example, zeros, (inputs, jax.random.split(key, examples)))
  return [total / examples for total in totals], rows[0]
