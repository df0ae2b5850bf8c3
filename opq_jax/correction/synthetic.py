"""Synthetic inputs on which a network's BatchNorms see the statistics of its training set."""

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
from opq_jax.correction.batch_statistics import (
  STATISTICS,
  batch_moments,
  mean_var_pairs,
  updated_statistics,
  zero_statistics,
)
from opq_jax.correction.checks import check_collections, check_has_batch_norm, check_updates
from opq_jax.correction.noise import noise_inputs

# share of a BatchNorm's mean variance added to both variances of the divergence, so that a channel
# that never varied does not dominate the sum
_FLOOR = 1e-3
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
  r"""Optimises inputs until the network's BatchNorms see the statistics that they have stored.

  A BatchNorm of a trained network has stored the mean m and the variance v of each channel over the
  training set; mu(x) and s(x) are those of a batch x.  Starting from noise, `steps` steps of Adam,
  with a learning rate that falls to 0 as a cosine, minimise

      sum over BatchNorms of mean over channels of ((m - mu)^2 + v) / s - 1 - log(v / s)

  twice the Kullback-Leibler divergence between normal distributions of these moments.  All
  BatchNorms run on batch statistics, as in `correct_batch_norm`, so that the terms do not depend on
  errors of earlier layers.  A thousandth of the BatchNorm's mean v is added to v and s.

  Noise alone gives each channel its variance, since BatchNorm normalises by the batch, but not the
  correlations between channels.  The variance of a channel before BatchNorm is a quadratic form of
  these correlations, so the stored variances constrain them.  To the eye the inputs remain noise.
  As calibration inputs of `opq_jax.network.mean_moments`, `opq_jax.encoders.LayerByLayer` and
  `correct_on_images` they are better than noise and worse than images of the training set
  (`experiments/benchmarks/accuracy/error_feedback.py`).  Make several batches, each with its own
  key: a layer of 1,000 inputs needs at least as many examples or positions, or its matrix of
  moments is singular.

  Such inputs are due to Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020,
  and Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.
  Ours are the start from the spectrum of photographs, the batch statistics at every BatchNorm, and
  the small number of steps.

  Args:
    apply_fn: of a network with BatchNorm, as for `correct_batch_norm`.  Compiled once for each
      function.
    variables: of the network, before compression.
    key: of the initial noise.
    input_shape: including the batch, as for `correct_batch_norm`, such as (16, 224, 224, 3) or
      (128, 32, 32, 3).
    steps: of Adam, each a forward and a backward pass; 0 returns the noise.
    learning_rate: of the first step, in units of the input's standard deviation.

  Returns:
    Inputs of this shape, float32, standardised as the network expects them.  The function is pure
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
  >>> before_norm = lambda x: nn.Dense(8).apply({'params': variables['params']['Dense_0']}, x)
  >>> x = synthetic_inputs(model.apply, variables, jax.random.key(1), (64, 4), steps=50)
  >>> # the stored variances are 1
  >>> error = lambda x: float(jnp.abs(jnp.log(before_norm(x).var(0))).mean())
  >>> error(x) < 0.5 * error(jax.random.normal(jax.random.key(1), (64, 4)))
  True
  """
  check_collections(variables)
  if steps < 0:
    raise ValueError(f'steps: found {steps}, expected none or more')
  check_has_batch_norm(variables)
  inputs = noise_inputs(key, input_shape)
  momentum = _momentum(apply_fn, variables, inputs)
  check_updates(momentum)
  state = _OPTIMIZER.init(inputs)
  # a loop in Python, so that one compiled step serves any number of steps
  for number in range(steps):
    rate = learning_rate * (1 + math.cos(math.pi * number / steps)) / 2
    inputs, state = _step(apply_fn, variables, momentum, inputs, state, rate)
  return inputs


@functools.partial(jax.jit, static_argnums=0)
def _momentum(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> dict[str, Float32[Array, '...']]:
  """Returns the momentum of every running statistic, by path and per channel."""
  return batch_moments(apply_fn, variables, inputs).momentum


@functools.partial(jax.jit, static_argnums=0)
def _step(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  momentum: dict[str, Float32[Array, '...']],
  inputs: Float32[Array, 'batch ...'],
  state: optax.OptState,
  rate: Float[Array, ''],
) -> tuple[Float32[Array, 'batch ...'], optax.OptState]:
  """Takes one step of Adam at the given rate."""
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
  """Returns the divergence that `synthetic_inputs` minimises."""
  stored = trees.named_leaves(variables[STATISTICS])
  # from statistics of 0 an update is (1 - momentum) times the batch's own: no digits cancel
  zeros = zero_statistics(variables)
  scaled, _ = updated_statistics(apply_fn, variables, inputs, zeros)
  batch = {name: leaf / (1 - momentum[name]) for name, leaf in scaled.items()}
  total = jnp.float32(0)
  for mean, var in mean_var_pairs(stored):
    floor = _FLOOR * jnp.mean(stored[var])
    ratio = (stored[var] + floor) / (batch[var] + floor)
    shift = jnp.square(stored[mean] - batch[mean]) / (batch[var] + floor)
    total += jnp.mean(shift + ratio - 1 - jnp.log(ratio))
  return total
