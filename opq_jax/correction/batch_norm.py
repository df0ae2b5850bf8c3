"""Correcting a network after compression: BatchNorm's statistics from noise, biases from images.

Pruning and quantization shift and shrink every layer's pre-activations, and the running
statistics that BatchNorm has stored are then wrong; most of the accuracy that compression costs
before any finetuning is lost here, and not with the weights.  Noise alone mends it: no images, no
labels, no bytes (`correct_batch_norm`).  A network without BatchNorm has no stored moments, and a
few unlabelled images serve (`correct_on_images`).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction import batch_statistics, noise
from opq_jax.correction.batch_statistics import STATISTICS

_RATIO_BOUNDS = (0.05, 4.0)


def correct_batch_norm(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  key: Array,
  input_shape: Sequence[int],
) -> PyTree:
  """The compressed network with running statistics that fit its weights.

  Both networks see one batch of noise, with every BatchNorm on batch statistics: m0 and v0 are the
  mean and variance of each BatchNorm's input in the original and y0 is its mean output; m1, v1 and
  y1 are those of the compressed network.  Then

      running mean      <-  running mean + m1 - m0
      running variance  <-  running variance * clip(v1 / v0, 0.05, 4)      (unchanged where v0 = 0)
      last bias         <-  last bias - (y1 - y0)

  Noise serves because on batch statistics every BatchNorm's output has the mean and variance that
  its own bias and scale say, whatever the images are: per channel, a later layer sees the first
  two moments that it had in training.  Only differences are taken over, since the moments
  themselves are those of noise.

  The last bias is the parameter vector that the output depends on as a bias, y = b + f(everything
  else) with the same b for every example, and it is found by that: its derivative is the
  identity.  Where several are (a sum of two biases), the first in the tree's order is corrected;
  where none is (an output after a softmax, a last layer without bias) or the output is not one
  array, biases stay as they are.

  The statistics corrected are those of `variables`, so that a second correction changes nothing.
  Correct once, before finetuning: statistics that training has updated need no correction.

  The method is ours.  Nearest prior work: Nagel et al., "Data-Free Quantization Through Weight
  Equalization and Bias Correction", ICCV 2019, whose bias correction follows from BatchNorm's
  parameters layer by layer and needs to know which BatchNorm feeds which layer; Cai et al.,
  "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, which optimises synthetic inputs
  until they match the statistics stored in BatchNorm, as `opq_jax.correction.synthetic_inputs`
  does; for this correction they are no better than noise
  (`experiments/benchmarks/accuracy/error_feedback.py`).

  Args:
    apply_fn: `model.apply` of a Flax Linen module, or any function called as
      `apply_fn(variables, x, train=True, mutable=['batch_stats'])` that returns the output and a
      dict with the updated `batch_stats`.  A BatchNorm is every node of these that holds `mean`
      and `var` and updates them as momentum * old + (1 - momentum) * batch; its momentum need not
      be known.  A network with dropout needs `functools.partial(model.apply, rngs=…)`.  Compiled
      once for each such function, which is recognised by its module: `model.apply` again, and not
      `Model().apply`, saves the compilation.
    variables: of the original network, with `params` and `batch_stats`.
    compressed: the same tree with compressed weights, as `opq_jax.apply_compression` returns it.
    key: of the noise.
    input_shape: of the noise, with its batch: (16, 224, 224, 3) or (128, 32, 32, 3) say, which is
      `opq_jax.correction.natural_noise`.  Inputs that are no images, of other than four axes, are x
      ~ N(0, 1). Channels are standardised inputs, such as `opq_jax.data.TORCHVISION` makes them of
      images.

  Returns:
    `compressed` with corrected `batch_stats` and last bias, and all else as it was.  The function
    is pure and may be traced.  Noise and statistics are float32.

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
  _check_trees(variables, compressed, {'params', STATISTICS})
  batch_statistics.check(variables)
  noise_key, tangent_key = jax.random.split(key)
  inputs = noise.of_shape(noise_key, input_shape)
  return _follow(apply_fn, variables, compressed, [inputs], tangent_key)


def correct_on_images(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
) -> PyTree:
  """The compressed network, corrected by the difference that unlabelled inputs show.

  With BatchNorm this is `correct_batch_norm` with the inputs in the place of the noise, all
  moments averaged over the batches.  Without, the biases carry the difference, from the first
  layer to the last: on every batch, a layer with a kernel and a bias has the mean output z0 in
  the original; in the compressed network, whose layers before it are corrected already, it has
  z1; and

      bias  <-  bias + z0 - z1                                  averaged over the batches

  so that the mean of every pre-activation is the original's again.  Bias correction as such is
  Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
  2019; here only differences on the same inputs are taken over.

  Args:
    apply_fn: with BatchNorm, as for `correct_batch_norm`.  Without, `model.apply` of a Flax
      Linen module, called as `apply_fn(variables, x)`; layers are recognised by their parameters
      `kernel` and `bias`.
    variables: of the original network; `params`, and `batch_stats` if it has BatchNorm.
    compressed: the same tree with compressed weights, as `opq_jax.apply_compression` returns it.
    batches: of inputs prepared as the network expects them; of one shape, or each is compiled for.

  Returns:
    `compressed` with other statistics and another last bias, or with other biases.

  Raises:
    ValueError: a collection is missing, the two trees differ, there is no batch, or nothing that
      could be corrected.

  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(3, name='head')(nn.relu(nn.Dense(8, name='hidden')(x)))
  >>> model = Network()
  >>> images = jax.random.normal(jax.random.key(2), (64, 4))
  >>> variables = model.init(jax.random.key(0), images)
  >>> rough = jax.tree.map(lambda leaf: jnp.round(leaf * 2) / 2, variables)
  >>> corrected = correct_on_images(model.apply, variables, rough, [images])
  >>> means = lambda network: model.apply(network, images).mean(0)
  >>> bool(jnp.allclose(means(corrected), means(variables), atol=1e-5))
  True
  """
  _check_trees(variables, compressed, {'params'})
  if trees.named_leaves(variables.get(STATISTICS, {})):
    batch_statistics.check(variables)
    return _follow(apply_fn, variables, compressed, batches, jax.random.key(0))
  biases = [
    name
    for name, leaf in trees.named_leaves(compressed['params']).items()
    if name.endswith('bias') and jnp.ndim(leaf) == 1
  ]
  shifts, count = None, 0
  for batch in batches:
    means = _layer_means(apply_fn, variables, batch, None)
    corrected = _layer_means(apply_fn, compressed, batch, means)
    shift = {name: means[name] - corrected[name] for name in means if name in biases}
    shifts = shift if shifts is None else jax.tree.map(jnp.add, shifts, shift)
    count += 1
  if not shifts:
    raise ValueError(
      f'found {count} batches and biases {biases}, expected a batch at least, and a layer with a '
      'kernel and a bias'
    )
  leaves = trees.named_leaves(compressed['params'])
  new = {
    f'params/{name}': leaves[name] + (shift / count).astype(leaves[name].dtype)
    for name, shift in shifts.items()
  }
  return trees.replaced(compressed, new)


@functools.partial(jax.jit, static_argnums=0)
def _layer_means(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  inputs: Float[Array, 'batch ...'],
  targets: dict[str, Float32[Array, ' features']] | None,
) -> dict[str, Float32[Array, ' features']]:
  """Mean output of every layer by the path of its bias, moved to `targets` for what follows it."""
  params = trees.named_leaves(variables['params'])
  means: dict[str, Array] = {}

  def measure(layer: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    output = layer(*args, **kwargs)
    name = '/'.join((*context.module.path, 'bias'))
    is_layer = name in params and f'{name.removesuffix("bias")}kernel' in params
    if context.method_name != '__call__' or not is_layer:
      return output
    if name in means:
      raise ValueError(f'{name}: found a layer that is called twice, expected once')
    means[name] = _feature_means(output)
    if targets is None:
      return output
    shift = (targets[name] - means[name]).astype(output.dtype)
    return output + jnp.broadcast_to(shift, output.shape)

  with nn.intercept_methods(measure):
    apply_fn(variables, inputs)
  return means


def _follow(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
  key: Array,
) -> PyTree:
  """`compressed` with statistics and last bias that follow what both networks make of batches."""
  runs, inputs = [], None
  for inputs in batches:
    # not inside one jit: so both networks share a compilation
    runs.append([_run(apply_fn, tree, inputs) for tree in (variables, compressed)])
  if inputs is None:
    raise ValueError('batches: found none, expected one at least')
  before, after = (
    jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *same)
    for same in zip(*runs, strict=True)
  )
  batch_statistics.check_updates(before.momentum)
  return _correct(apply_fn, variables, compressed, before, after, inputs, key)


class _Run(NamedTuple):
  """What one network made of the inputs.

  Attributes:
    scaled, momentum: of `batch_statistics.of_batch`.
    output: the mean of the network's output, or None where that is not one array of features.
  """

  scaled: dict[str, Float32[Array, '...']]
  momentum: dict[str, Float32[Array, '...']]
  output: Float32[Array, ' outputs'] | None


@functools.partial(jax.jit, static_argnums=0)
def _run(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> _Run:
  """One forward pass on batch statistics."""
  scaled, momentum, output = batch_statistics.of_batch(apply_fn, variables, inputs)
  is_array = isinstance(output, jax.Array) and jnp.issubdtype(output.dtype, jnp.floating)
  has_features = is_array and output.ndim > 1
  return _Run(scaled, momentum, _feature_means(output) if has_features else None)


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
  """`compressed` with its statistics and its last bias moved from what `after` saw to `before`."""
  statistics = _corrected_statistics(variables[STATISTICS], before, after)
  new = {f'{STATISTICS}/{name}': leaf for name, leaf in statistics.items()}
  if before.output is not None and after.output is not None:
    candidates = _output_biases(apply_fn, variables, inputs, before.output.shape, key)
    biases = _corrected_biases(compressed['params'], candidates, after.output - before.output)
    new |= {f'params/{name}': leaf for name, leaf in biases.items()}
  return trees.replaced(compressed, new)


def _corrected_statistics(
  statistics: PyTree, before: _Run, after: _Run
) -> dict[str, Float[Array, '...']]:
  """Running means and variances that follow the batch's."""
  running = trees.named_leaves(statistics)
  new = {}
  for mean, var in batch_statistics.pairs(running):
    # from float32's momentum: exact enough (1 part in 10,000 at 0.9997) to divide a difference
    # by; in the ratio it cancels
    share = 1 - before.momentum[mean]
    shift = (after.scaled[mean] - before.scaled[mean]) / jnp.where(share > 0, share, jnp.inf)
    new[mean] = running[mean] + shift.astype(running[mean].dtype)
    old = before.scaled[var]
    ratio = jnp.where(old > 0, after.scaled[var] / jnp.where(old > 0, old, 1), 1)
    new[var] = running[var] * jnp.clip(ratio, *_RATIO_BOUNDS).astype(running[var].dtype)
  return new


def _corrected_biases(
  params: PyTree, candidates: Mapping[str, Bool[Array, '']], shift: Float32[Array, ' outputs']
) -> dict[str, Float[Array, ' outputs']]:
  """The candidates, of which the first that is an output bias carries the shift."""
  leaves = trees.named_leaves(params)
  pending = jnp.ones((), bool)
  new = {}
  for name, is_bias in candidates.items():
    leaf = leaves[name]
    new[name] = jnp.where(pending & is_bias, leaf - shift.astype(leaf.dtype), leaf)
    # every further bias would subtract the same shift again
    pending &= ~is_bias
  return new


def _output_biases(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  inputs: Float[Array, 'batch ...'],
  shape: tuple[int, ...],
  key: Array,
) -> dict[str, Bool[Array, '']]:
  """For every parameter vector of the output's `shape`: whether the output's derivative is 1 by it.

  Where it is, XLA finds that the derivative needs no forward pass and drops it.
  """
  # whole numbers: exact in bfloat16 too, so that the identity returns them bit for bit
  tangent = jax.random.randint(key, shape, 1, 128).astype(jnp.float32)

  def is_bias(name: str, leaf: Array) -> Array:
    def output(value: Array) -> Array:
      collections = {**variables, 'params': trees.replaced(variables['params'], {name: value})}
      return apply_fn(collections, inputs, train=True, mutable=[STATISTICS])[0]

    _, found = jax.jvp(output, (leaf,), (tangent.astype(leaf.dtype),))
    return jnp.all(found.astype(jnp.float32) == jnp.broadcast_to(tangent, found.shape))

  return {
    name: is_bias(name, leaf)
    for name, leaf in trees.named_leaves(variables['params']).items()
    if jnp.shape(leaf) == shape and jnp.issubdtype(leaf.dtype, jnp.floating)
  }


def _feature_means(output: Float[Array, '... outputs']) -> Float32[Array, ' outputs']:
  return jnp.mean(output.astype(jnp.float32), axis=range(output.ndim - 1))


def _check_trees(
  variables: Mapping[str, PyTree], compressed: Mapping[str, PyTree], collections: set[str]
) -> None:
  for label, tree in (('variables', variables), ('compressed', compressed)):
    if not isinstance(tree, Mapping) or not collections <= tree.keys():
      names = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
      wanted = ' and '.join(sorted(collections, reverse=True))
      raise ValueError(f'{label}: found {names}, expected the collections {wanted}')
  found, expected = (
    {name: _describe(leaf) for name, leaf in trees.named_leaves(tree).items()}
    for tree in (compressed, variables)
  )
  lines = [
    f'  {name}: found {found.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
    for name in sorted(found.keys() | expected.keys())
    if found.get(name) != expected.get(name)
  ]
  if lines:
    raise ValueError('\n'.join(['compressed is not the tree of variables:', *lines]))


def _describe(leaf: Any) -> str:
  return f'{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}'
