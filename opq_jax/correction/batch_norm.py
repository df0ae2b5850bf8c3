"""Corrects BatchNorm's running statistics after compression, from noise alone.

Pruning and quantization shift and shrink every layer's pre-activations, so BatchNorm's stored
statistics no longer fit.  Most of the accuracy that compression costs before finetuning is lost
there, not in the weights themselves.  `correct_batch_norm` recovers it without images, labels or
bytes in the file.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_statistics import STATISTICS, batch_moments, mean_var_pairs
from opq_jax.correction.checks import check_has_batch_norm, check_same_tree, check_updates
from opq_jax.correction.noise import noise_inputs
from opq_jax.correction.output_bias import output_biases, shifted_biases

# bounds of v1 / v0: a channel that compression pruned almost whole (v1 near 0), or that hardly
# varied before (v0 near 0), must not scale its running variance without limit
RATIO_BOUNDS = (0.05, 4.0)


def correct_batch_norm(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  key: Array,
  input_shape: Sequence[int],
) -> PyTree:
  """Moves a compressed network's running statistics to fit its weights.

  Both networks run on one batch of noise, with every BatchNorm on batch statistics.  For each
  BatchNorm, m0 and v0 are the mean and variance of its input in the original network, m1 and v1
  in the compressed one; y0 and y1 are the mean outputs of the networks.  Then

      running mean      <-  running mean + m1 - m0
      running variance  <-  running variance * clip(v1 / v0, 0.05, 4)      (unchanged where v0 = 0)
      last bias         <-  last bias - (y1 - y0)

  Noise is enough because on batch statistics the output of every BatchNorm has the mean and
  variance given by its own bias and scale, for any input: per channel, later layers see the first
  two moments that they saw in training.  Only differences between the networks are used, since
  the moments themselves are those of noise.

  The last bias is a parameter vector b with y = b + f(all other parameters), the same b for every
  example, and is found by its derivative, the identity.  Of several (a sum of two biases), the
  first in the tree's order is corrected.  Biases stay as they are where there is none (an output
  after a softmax, a last layer without bias), or where the output is not one array.

  The statistics corrected are those of `variables`, so a second correction changes nothing.
  Correct once, before finetuning: statistics that training has updated need no correction.

  The method is ours.  Nearest prior work: Nagel et al., "Data-Free Quantization Through Weight
  Equalization and Bias Correction", ICCV 2019, whose bias correction follows from BatchNorm's
  parameters layer by layer and needs the network's topology; Cai et al., "ZeroQ: A Novel Zero Shot
  Quantization Framework", CVPR 2020, which optimises synthetic inputs until they match the
  statistics stored in BatchNorm, as `synthetic_inputs` does.  For this correction such inputs are
  no better than noise (`experiments/benchmarks/accuracy/error_feedback.py`).

  Args:
    apply_fn: `model.apply` of a Flax Linen module, or any function called as
      `apply_fn(variables, x, train=True, mutable=['batch_stats'])` that returns the output and a
      dict with the updated `batch_stats`.  A BatchNorm is every node of `batch_stats` that holds
      `mean` and `var` and updates them as momentum * old + (1 - momentum) * batch; its momentum
      need not be known.  A network with dropout needs `functools.partial(model.apply, rngs=…)`.
      Compiled once for each function; pass `model.apply` of one model, not `Model().apply` anew,
      to reuse the compiled program.
    variables: of the original network, with `params` and `batch_stats`.
    compressed: the same tree with compressed weights, as `opq_jax.apply_compression` returns it.
    key: of the noise.
    input_shape: of the noise, including its batch, such as (16, 224, 224, 3) or (128, 32, 32, 3).
      With four axes the noise is `natural_noise`, otherwise x ~ N(0, 1).  Inputs are standardised,
      as `opq_jax.data.TORCHVISION` standardises images.

  Returns:
    `compressed` with corrected `batch_stats` and last bias; all other leaves are the same.  The
    function is pure and may be traced.  Noise and moments are float32.

  Raises:
    ValueError: a collection is missing, the two trees differ, the input shape is no batch of
      inputs, there is no BatchNorm, or (outside of a trace) one does not update its statistics.

  >>> import flax.linen as nn
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x, train: bool = False):
  ...     x = nn.Dense(8, name='hidden')(x)
  ...     x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
  ...     return nn.Dense(3, name='head')(nn.relu(x))
  >>> model = Network()
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
  >>> halved = jax.tree.map(lambda leaf: leaf / 2 if leaf.ndim == 2 else leaf, variables['params'])
  >>> corrected = correct_batch_norm(
  ...   model.apply, variables, {**variables, 'params': halved}, jax.random.key(1), (64, 4)
  ... )
  >>> corrected['batch_stats']['norm']['var'].round(3).tolist()  # of halved inputs
  [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
  """
  check_same_tree(variables, compressed, {'params', STATISTICS})
  check_has_batch_norm(variables)
  noise_key, tangent_key = jax.random.split(key)
  inputs = noise_inputs(noise_key, input_shape)
  return follow_original(apply_fn, variables, compressed, [inputs], tangent_key)


def follow_original(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
  key: Array,
) -> PyTree:
  """Does what `correct_batch_norm` says, with moments averaged over batches of any inputs.

  Args:
    apply_fn, variables, compressed: as for `correct_batch_norm`.
    batches: inputs of one shape.
    key: of the random tangent that finds the last bias.

  Raises:
    ValueError: there is no batch, or (outside of a trace) a BatchNorm does not update.
  """
  runs, inputs = [], None
  for inputs in batches:
    # two calls, not one jit over both networks: both share one compiled program
    runs.append([_run(apply_fn, tree, inputs) for tree in (variables, compressed)])
  if inputs is None:
    raise ValueError('batches: found none, expected one at least')
  before, after = (
    jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *same)
    for same in zip(*runs, strict=True)
  )
  check_updates(before.momentum)
  return _correct(apply_fn, variables, compressed, before, after, inputs, key)


def feature_means(output: Float[Array, '... features']) -> Float32[Array, ' features']:
  """Returns the mean over all axes but the last, in float32."""
  return jnp.mean(output.astype(jnp.float32), axis=range(output.ndim - 1))


class _Run(NamedTuple):
  """Moments of one network on the inputs.

  Attributes:
    scaled, momentum: see `opq_jax.correction.batch_statistics.BatchMoments`.
    output: mean of the network's output, or None where that is not one array of features.
  """

  scaled: dict[str, Float32[Array, '...']]
  momentum: dict[str, Float32[Array, '...']]
  output: Float32[Array, ' outputs'] | None


@functools.partial(jax.jit, static_argnums=0)
def _run(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> _Run:
  """Runs a network forward once, on batch statistics."""
  scaled, momentum, output = batch_moments(apply_fn, variables, inputs)
  is_array = isinstance(output, jax.Array) and jnp.issubdtype(output.dtype, jnp.floating)
  has_features = is_array and output.ndim > 1
  return _Run(scaled, momentum, feature_means(output) if has_features else None)


@functools.partial(jax.jit, static_argnums=0)
def _correct(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  before: _Run,
  after: _Run,
  inputs: Float[Array, 'batch ...'],
  key: Array,
) -> PyTree:
  """Corrects statistics and last bias by the difference between the networks' moments.

  Args:
    apply_fn, variables, compressed: as for `correct_batch_norm`.
    before: of the original network.
    after: of the compressed network.
    inputs: any batch that both have run on.
    key: of the random tangent that finds the last bias.
  """
  statistics = _corrected_statistics(variables[STATISTICS], before, after)
  new = {f'{STATISTICS}/{name}': leaf for name, leaf in statistics.items()}
  if before.output is not None and after.output is not None:
    is_bias = output_biases(apply_fn, variables, inputs, before.output.shape, key)
    biases = shifted_biases(compressed['params'], is_bias, after.output - before.output)
    new |= {f'params/{name}': leaf for name, leaf in biases.items()}
  return trees.replaced(compressed, new)


def _corrected_statistics(
  statistics: PyTree, before: _Run, after: _Run
) -> dict[str, Float[Array, '...']]:
  """Returns the new running means and variances by path, in their own dtypes."""
  running = trees.named_leaves(statistics)
  new = {}
  for mean, var in mean_var_pairs(running):
    # scaled / (1 - momentum) is the moment itself.  A momentum in float32 is exact enough to divide
    # a difference by (1 part in 10,000 at .9997); in the ratio of variances it cancels.  Over
    # infinity, statistics that never update are not shifted
    share = 1 - before.momentum[mean]
    shift = (after.scaled[mean] - before.scaled[mean]) / jnp.where(share > 0, share, jnp.inf)
    new[mean] = running[mean] + shift.astype(running[mean].dtype)
    old = before.scaled[var]
    ratio = jnp.where(old > 0, after.scaled[var] / jnp.where(old > 0, old, 1), 1)
    new[var] = running[var] * jnp.clip(ratio, *RATIO_BOUNDS).astype(running[var].dtype)
  return new
