"""What an error in a leaf costs the answer of a language model, block by block.

The gradients of `opq_jax.network.divergence_costs`, whose docstring derives the costs, with one
block in memory at a time: hidden states go forward through all blocks, then their gradients back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.language.network import StoredNetwork
from opq_jax.language.parts import Block, Head, Start


def block_costs(
  network: StoredNetwork,
  tokens: Int[np.ndarray, 'sequences length'],
  key: Array,
  told: Callable[[float], Any] = lambda share: None,
) -> dict[str, Any]:
  """Returns omega = E|g|^2 / (2 n), in nats a token per unit of squared error, of every tensor.

  Of a kernel of a layer one for each of its outputs, with g and n those of the output; they
  broadcast over the tensor.

  Args:
    network: the language model.
    tokens: sequences that it reads, of any text or drawn at random.
    key: for the draws of the next tokens, from the model's own answers.
    told: called with the share that is done.

  Returns:
    The costs by the names of the tensors in the file.
  """
  start, block, head = Start(network.model), Block(network.model), Head(network.model)
  outer = network.outer()
  first, context = start(outer, jnp.asarray(tokens))
  states = [first]
  for number in range(network.depth):
    states.append(_run(block, network.layer(number), states[-1], context))
    told((number + 1) / (3 * network.depth))
  keys = jax.random.split(key, len(tokens))
  of_outer, gradients = _head_energies(head, outer, states.pop(), keys)
  energies: dict[str, Any] = {}
  for number in reversed(range(network.depth)):
    of_layer, gradients = _block_energies(
      block, network.layer(number), states.pop(), gradients, context
    )
    named = trees.named_leaves(of_layer)
    for path, energy in named.items():
      site = network.site(path, number)
      # of outputs, along their axis of the tensor
      shape = (-1, 1) if site.is_transposed else (1, -1)
      energies[site.name] = np.reshape(energy, shape) if np.ndim(energy) else energy
    told(1 - 2 * number / (3 * network.depth))
  of_start = _start_energies(start, outer, jnp.asarray(tokens), gradients)
  for path, energy in trees.named_leaves(jax.tree.map(jnp.add, of_outer, of_start)).items():
    energies[network.site(path, None).name] = energy
  least = float(jnp.finfo(jnp.float32).tiny)
  rows = 2 * tokens.size
  costs = {}
  for name, energy in energies.items():
    each = math.prod(np.shape(network.tensors[name])) / np.size(energy)
    cost = np.maximum(np.asarray(energy, np.float64) / (rows * each), least)
    costs[name] = cost if cost.ndim else float(cost)
  return costs


@functools.partial(jax.jit, static_argnums=0)
def _run(block: Block, params: PyTree, x: Array, context: Any) -> Array:
  return jax.lax.map(lambda one: block(params, one[None], context)[0], x)


@functools.partial(jax.jit, static_argnums=0)
def _block_energies(
  block: Block, params: PyTree, x: Array, gradients: Array, context: Any
) -> tuple[PyTree, Float[Array, 'sequences length features']]:
  """Returns the sum over sequences of |g|^2 of all leaves, and the gradients before the block.

  Of kernels, [inputs, outputs], the sum of each output.
  """

  def of_sequence(total: PyTree, sequence: tuple[Array, Array]) -> tuple[PyTree, Array]:
    state, gradient = sequence
    _, back = jax.vjp(lambda params, one: block(params, one[None], context)[0], params, state)
    of_params, before = back(gradient)
    return jax.tree.map(jnp.add, total, jax.tree.map(_of_outputs, of_params)), before

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), params)
  return jax.lax.scan(of_sequence, zeros, (x, gradients))


@functools.partial(jax.jit, static_argnums=0)
def _head_energies(
  head: Head, params: PyTree, x: Array, keys: Array
) -> tuple[PyTree, Float[Array, 'sequences length features']]:
  """Returns the same of what follows the last block, of its score."""

  def of_sequence(total: PyTree, sequence: tuple[Array, Array]) -> tuple[PyTree, Array]:
    state, key = sequence

    of_params, before = jax.grad(head.score, argnums=(0, 1))(params, state, key)
    return jax.tree.map(jnp.add, total, _energy(of_params)), before

  return jax.lax.scan(of_sequence, _zeros(params), (x, keys))


@functools.partial(jax.jit, static_argnums=0)
def _start_energies(start: Start, params: PyTree, tokens: Array, gradients: Array) -> PyTree:
  """Returns the sum over sequences of |g|^2 of what precedes the first block.

  A tied table has gradients as the head too.  Both energies are added, and the product of the two
  gradients is left out.
  """

  def of_sequence(total: PyTree, sequence: tuple[Array, Array]) -> tuple[PyTree, None]:
    own, gradient = sequence
    _, back = jax.vjp(lambda params: start(params, own[None])[0][0], params)
    return jax.tree.map(jnp.add, total, _energy(back(gradient)[0])), None

  return jax.lax.scan(of_sequence, _zeros(params), (tokens, gradients))[0]


def _of_outputs(leaf: Array) -> Array:
  return jnp.sum(jnp.square(leaf), axis=0)


def _energy(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf)), tree)


def _zeros(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: jnp.float32(0), tree)
