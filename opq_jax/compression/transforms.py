"""Compression in a training loop of your own: transforms of functions and of optimizers.

`compressed` makes any apply function read compressed parameters, and `keep_compressed` makes any
optimizer keep pruned weights at zero.  `compressed` alone keeps the forward pass compressed; with
both, the latent weights are pruned too.  `clip_to_grid` is an option for the gradient.

Flax Linen:

>>> import flax.linen as nn, jax, jax.numpy as jnp, optax, opq_jax
>>> x, y = jax.random.normal(jax.random.key(0), (64, 16)), jnp.zeros((64, 4))
>>> model = nn.Dense(4)
>>> variables = model.init(jax.random.key(1), x)
>>> state = opq_jax.init_state(variables, opq_jax.allocate(variables, sparsity=0.5, bits=3.0))
>>> apply_fn = opq_jax.compressed(model.apply, state)
>>> optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), opq_jax.keep_compressed(state))
>>> memory = optimizer.init(variables)
>>> @jax.jit
... def step(variables, memory):
...   loss = lambda variables: jnp.mean((apply_fn(variables, x) - y) ** 2)
...   gradient = jax.grad(loss)(variables)
...   updates, memory = optimizer.update(gradient, memory, variables)
...   return optax.apply_updates(variables, updates), memory
>>> for _ in range(3):
...   variables, memory = step(variables, memory)
>>> float(jnp.mean(variables['params']['kernel'] == 0))
0.5

Flax NNX, whose parameters are a tree once the module is split:

>>> from flax import nnx
>>> graph, params = nnx.split(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), nnx.Param)[:2]
>>> params = nnx.to_pure_dict(params)
>>> state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=3.0))
>>> apply_fn = opq_jax.compressed(lambda params, x: nnx.merge(graph, nnx.State(params))(x), state)
>>> optimizer = optax.chain(optax.adam(0.01), opq_jax.keep_compressed(state))
>>> memory = optimizer.init(params)
>>> @jax.jit
... def step(params, memory):
...   loss = lambda params: jnp.mean((apply_fn(params, x) - y) ** 2)
...   gradient = jax.grad(loss)(params)
...   updates, memory = optimizer.update(gradient, memory, params)
...   return optax.apply_updates(params, updates), memory
>>> for _ in range(3):
...   params, memory = step(params, memory)
>>> float(jnp.mean(params['kernel'] == 0))
0.5

Plain JAX:

>>> params = {'w': jax.random.laplace(jax.random.key(2), (16, 4)), 'b': jnp.zeros(4)}
>>> state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=3.0))
>>> apply_fn = opq_jax.compressed(lambda params, x: x @ params['w'] + params['b'][None], state)
>>> optimizer = optax.chain(optax.adamw(0.01), opq_jax.keep_compressed(state))
>>> memory = optimizer.init(params)
>>> @jax.jit
... def step(params, memory):
...   loss = lambda params: jnp.mean((apply_fn(params, x) - y) ** 2)
...   gradient = jax.grad(loss)(params)
...   updates, memory = optimizer.update(gradient, memory, params)
...   return optax.apply_updates(params, updates), memory
>>> for _ in range(3):
...   params, memory = step(params, memory)
>>> float(jnp.mean(params['w'] == 0))
0.5
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from opq_jax.compression.codes import apply_compression
from opq_jax.compression.records import CompressionState, LeafState, over_weights
from opq_jax.core import trees
from opq_jax.core.trees import PyTree


def compressed(apply_fn: Callable[..., Any], state: CompressionState) -> Callable[..., Any]:
  """Returns `apply_fn` of compressed parameters: `apply_fn(apply_compression(tree, state), ...)`.

  Args:
    apply_fn: any function whose first argument is the tree that `state` was made for: `params`,
      or whole Flax variables with `model.apply`.
    state: its kinds and codebooks.  Inside a `jit` they are constants of the compiled program;
      `opq_jax.finetuning.train_step` passes them as an argument instead.

  Returns:
    A function of the same arguments.  Its derivative with respect to the tree is straight-through:
    the identity on survivors and exactly 0 on pruned weights.

  Raises:
    ValueError: when called, the tree has other structure, shapes or dtypes than the state.
  """

  @functools.wraps(apply_fn)
  def of_compressed(tree: PyTree, *args: Any, **kwargs: Any) -> Any:
    return apply_fn(apply_compression(tree, state), *args, **kwargs)

  return of_compressed


def keep_compressed(state: CompressionState) -> optax.GradientTransformation:
  """Keeps pruned weights at exactly zero, under any optimizer before it in the chain.

  The update u of a pruned weight w becomes -w, in the wider dtype of the two, so that
  `optax.apply_updates` gives w + u = 0, also where momentum, weight decay or a restored optimizer
  would move it.  All other updates keep their values.  The transformation has no state of its own.

      optimizer = optax.chain(optax.adamw(1e-3), opq_jax.keep_compressed(state))

  Survivors keep their latent values: the forward pass (`compressed` or `apply_compression`) puts
  them on the codebook.

  Args:
    state: kinds and codebooks of the tree that the optimizer works on.

  Returns:
    An `optax.GradientTransformation`, to be the last of a chain.

  Raises:
    ValueError: when it updates, the parameters are not given, or are another tree than the state's.
  """

  def keep(change: Array, weight: Array, leaf: LeafState) -> Array:
    # in the wider dtype of the two: a weight that is rounded to a narrower one leaves a rest
    dtype = max(weight.dtype, change.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.where(leaf.mask, change.astype(dtype), -weight.astype(dtype))

  return _of_leaves(keep, state)


def clip_to_grid(state: CompressionState) -> optax.GradientTransformation:
  """Drops the gradient that would move a weight beyond the last cell further out.

  The last cell of a leaf ends at e = threshold + levels * step.  A weight beyond it has the value
  of that cell, however large it becomes, unless it is escaped; the straight-through gradient
  ignores this.  Here the gradient g of a weight w is

      0    where |w| >= e and w g < 0: descent would make |w| larger
      g    elsewhere, so that a weight may always come back

  Learned quantizers clip like this (Choi et al., "PACT", arXiv 1805.06085; Esser et al., "Learned
  Step Size Quantization", ICLR 2020), but on both sides.  The transformation has no state of its
  own.

      optimizer = optax.chain(
        clip_to_grid(state), optax.sgd(0.01, momentum=0.9), opq_jax.keep_compressed(state)
      )

  Args:
    state: kinds and codebooks of the tree that the optimizer works on.

  Returns:
    An `optax.GradientTransformation`, to be the first of a chain: it takes gradients, not updates.

  Raises:
    ValueError: when it updates, the parameters are not given, or are another tree than the state's.

  >>> import jax, opq_jax
  >>> params = {'w': jax.random.laplace(jax.random.key(0), (64, 32))}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> clip = clip_to_grid(state)
  >>> far = {'w': jnp.full((64, 32), 100.0)}
  >>> outwards, inwards = {'w': -jnp.ones((64, 32))}, {'w': jnp.ones((64, 32))}
  >>> [float(clip.update(g, clip.init(far), far)[0]['w'].sum()) for g in (outwards, inwards)]
  [0.0, 2048.0]
  """

  def clip(gradient: Array, weight: Array, leaf: LeafState) -> Array:
    end = over_weights(leaf.threshold + leaf.step * leaf.levels.astype(jnp.float32), weight.ndim)
    if leaf.output_scales is not None:
      end = end * leaf.output_scales
    is_beyond = jnp.abs(weight.astype(jnp.float32)) >= end
    # by signs: w g would underflow to 0 for tiny gradients
    is_outwards = jnp.sign(weight).astype(gradient.dtype) * gradient < 0
    is_beyond &= ~leaf.escaped  # an escaped weight is its own value
    return jnp.where(is_beyond & is_outwards, jnp.zeros_like(gradient), gradient)

  return _of_leaves(clip, state)


def _of_leaves(
  function: Callable[[Array, Array, LeafState], Array], state: CompressionState
) -> optax.GradientTransformation:
  """Returns the stateless transformation of every compressed leaf's update by `function`."""

  def update(
    updates: PyTree, memory: optax.EmptyState, params: PyTree | None = None
  ) -> tuple[PyTree, optax.EmptyState]:
    if params is None:
      raise ValueError('params: found None, expected optimizer.update(updates, memory, params)')
    weights = dict(zip(trees.named_leaves(updates), trees.beside(updates, params), strict=True))

    def of_leaf(name: str, change: Array, leaf: LeafState) -> Array:
      if change.shape != leaf.kinds.shape:
        raise ValueError(f'{name}: found shape {change.shape}, expected {leaf.kinds.shape}')
      return function(change, weights[name], leaf)

    return trees.map_records(of_leaf, updates, state.tree, LeafState), memory

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
