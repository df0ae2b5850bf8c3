"""Inputs made of nothing but a network: such that its BatchNorms see what they saw in training."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction import batch_statistics, noise

_FLOOR = 1e-3  # of a BatchNorm's mean variance: a channel that never varied does not rule the sum
_OPTIMIZER = optax.scale_by_adam()


def synthetic_inputs(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  key: Array,
  input_shape: Sequence[int],
  *,
  steps: int = 5,
  learning_rate: float = 0.3,
) -> Float32[Array, 'batch ...']:
  r"""Inputs on which a network's BatchNorms see the statistics that they have stored.

  Every BatchNorm of a trained network knows the mean m and the variance v of each of its channels
  over the training set.  Starting from noise, x is changed such that its own, mu(x) and s(x) of
  the batch, become the same: minimised is

      sum over BatchNorms of mean over channels of ((m - mu)^2 + v) / s - 1 - log(v / s)

  twice the Kullback-Leibler divergence of normal distributions of these moments, by `steps` steps
  of Adam whose rate falls to 0 as a cosine.  All BatchNorms run on batch statistics, as in
  `opq_jax.correction.correct_batch_norm`, so that each stands for itself.  To v and s is added a
  thousandth of the BatchNorm's mean v.

  Noise alone has the variance that each channel had (that is what batch statistics see to); what
  it does not know is how channels go together.  The variance of a channel before BatchNorm is a
  quadratic form of just that, and there are as many as channels.  To the eye the inputs are noise
  still; as inputs of `opq_jax.network.mean_moments`, `opq_jax.encoders.LayerByLayer` and, after
  them, `opq_jax.correction.correct_on_images` they are better than noise, and not as good as images
  of the training set (`experiments/benchmarks/accuracy/error_feedback.py`).  Make several batches,
  with other keys: a layer of 1,000 inputs needs as many examples or places at least, or its moments
  have no full rank.

  Such inputs are those of Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020,
  and Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.
  That they start from the spectrum of photographs, that each BatchNorm runs on the batch's
  statistics and that five steps do is ours.

  Args:
    apply_fn: of a network with BatchNorm, as for `opq_jax.correction.correct_batch_norm`.  Compiled
      once for each such function.
    variables: of the network, before compression.
    key: of the noise at the start.
    input_shape: with the batch, as for `opq_jax.correction.correct_batch_norm`: (16, 224, 224, 3)
      or (128, 32, 32, 3) say.
    steps: of Adam, each a forward and a backward pass; 0 returns the noise.
    learning_rate: of the first step, in units of the input's standard deviation.

  Returns:
    Inputs of this shape in float32, in the units that the network expects.  The function is pure
    and may be traced.

  Raises:
    ValueError: a collection is missing, the shape is no batch of inputs, there is no BatchNorm, or
      (outside of a trace) one does not update its statistics; `steps` is negative.

  >>> import flax.linen as nn
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x, train: bool = False):
  ...     return nn.BatchNorm(use_running_average=not train, name='norm')(nn.Dense(8)(x))
  >>> model = Network()
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
  >>> seen = lambda x: nn.Dense(8).apply({'params': variables['params']['Dense_0']}, x).var(0)
  >>> x = synthetic_inputs(model.apply, variables, jax.random.key(1), (64, 4), steps=50)
  >>> off = lambda x: float(jnp.abs(jnp.log(seen(x))).mean())  # the variances stored are 1
  >>> off(x) < 0.5 * off(jax.random.normal(jax.random.key(1), (64, 4)))
  True
  """
  batch_statistics.check_collections(variables)
  if steps < 0:
    raise ValueError(f'steps: found {steps}, expected none or more')
  batch_statistics.check(variables)
  inputs = noise.of_shape(key, input_shape)
  momentum = _momentum(apply_fn, variables, inputs)
  batch_statistics.check_updates(momentum)
  state = _OPTIMIZER.init(inputs)
  # a loop of Python's: one step is compiled, for any number of them
  for number in range(steps):
    rate = learning_rate * (1 + math.cos(math.pi * number / steps)) / 2
    inputs, state = _step(apply_fn, variables, momentum, inputs, state, rate)
  return inputs


@functools.partial(jax.jit, static_argnums=0)
def _momentum(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> dict[str, Float32[Array, '...']]:
  return batch_statistics.of_batch(apply_fn, variables, inputs)[1]


@functools.partial(jax.jit, static_argnums=0)
def _step(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  momentum: dict[str, Float32[Array, '...']],
  inputs: Float32[Array, 'batch ...'],
  state: optax.OptState,
  rate: Float[Array, ''],
) -> tuple[Float32[Array, 'batch ...'], optax.OptState]:
  gradient = jax.grad(_divergence, argnums=3)(apply_fn, variables, momentum, inputs)
  # optax's bias correction mixes int and float
  with jax.numpy_dtype_promotion('standard'):
    update, state = _OPTIMIZER.update(gradient, state)
  return (inputs - rate * update).astype(jnp.float32), state


def _divergence(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  momentum: Mapping[str, Float32[Array, '...']],
  inputs: Float32[Array, 'batch ...'],
) -> Float32[Array, '']:
  """How far the moments of the batch are from the stored ones, as `synthetic_inputs` says."""
  stored = trees.named_leaves(variables[batch_statistics.STATISTICS])
  zeros = batch_statistics.zeros(variables)
  scaled, _ = batch_statistics.updated(apply_fn, variables, inputs, zeros)
  batch = {name: leaf / (1 - momentum[name]) for name, leaf in scaled.items()}
  total = jnp.float32(0)
  for mean, var in batch_statistics.pairs(stored):
    floor = _FLOOR * jnp.mean(stored[var])
    ratio = (stored[var] + floor) / (batch[var] + floor)
    shift = jnp.square(stored[mean] - batch[mean]) / (batch[var] + floor)
    total += jnp.mean(shift + ratio - 1 - jnp.log(ratio))
  return total
