"""Corrects a compressed network from unlabelled inputs: BatchNorm's statistics, or the biases.

A network without BatchNorm stores no moments that noise could be compared with; there a few real
inputs correct the bias of every layer.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_norm import feature_means, follow_original
from opq_jax.correction.batch_statistics import STATISTICS
from opq_jax.correction.checks import check_has_batch_norm, check_same_tree


def correct_on_images(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  compressed: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
) -> PyTree:
  """Corrects a compressed network by its difference from the original on unlabelled inputs.

  With BatchNorm this is `correct_batch_norm` with the inputs in place of the noise, and moments
  averaged over the batches.  Without BatchNorm, the biases are corrected from the first layer to
  the last.  On every batch, a layer with a kernel and a bias has the mean output z0 in the original
  network, and z1 in the compressed network, whose earlier layers are corrected already; then

      bias  <-  bias + z0 - z1                                  averaged over the batches

  so that every pre-activation has its original mean again.  Bias correction as such is Nagel et
  al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; here
  only differences on the same inputs are used.

  Args:
    apply_fn: with BatchNorm, as for `correct_batch_norm`.  Without, `model.apply` of a Flax Linen
      module, called as `apply_fn(variables, x)`; a layer is recognised by its parameters `kernel`
      and `bias`.
    variables: of the original network: `params`, and `batch_stats` if it has BatchNorm.
    compressed: the same tree with compressed weights, as `opq_jax.apply_compression` returns it.
    batches: inputs, prepared as the network expects them, of one shape: every other shape is
      compiled for anew.

  Returns:
    `compressed` with corrected statistics and last bias, or with corrected biases.

  Raises:
    ValueError: a collection is missing, the two trees differ, there is no batch, nothing can be
      corrected, or a layer without BatchNorm is called twice.

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
  check_same_tree(variables, compressed, {'params'})
  if trees.named_leaves(variables.get(STATISTICS, {})):
    check_has_batch_norm(variables)
    return follow_original(apply_fn, variables, compressed, batches, jax.random.key(0))
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
  """Returns the mean output of every layer by the path of its bias.

  With `targets`, each layer's output is shifted to its target mean before the next layer reads it:
  one forward pass then measures every layer behind corrected layers.
  """
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
    # before the shift: the layer's own error, behind layers whose means are right
    means[name] = feature_means(output)
    if targets is None:
      return output
    shift = (targets[name] - means[name]).astype(output.dtype)
    return output + jnp.broadcast_to(shift, output.shape)

  with nn.intercept_methods(measure):
    apply_fn(variables, inputs)
  return means
