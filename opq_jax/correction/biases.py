"""Corrects a compressed network from unlabelled inputs: BatchNorm's statistics, or the biases.

A network without BatchNorm stores no moments that noise could be compared with; there a few real
inputs correct the bias of every layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_norm import follow_original
from opq_jax.correction.batch_statistics import STATISTICS
from opq_jax.correction.checks import check_has_batch_norm, check_same_tree
from opq_jax.network import LeafUsage, uses
from opq_jax.network.interpreter import Product
from opq_jax.network.side_by_side import SideBySide
from opq_jax.network.views import REPEATED, View


def correct_on_images(
  apply_fn: Callable[..., Any],
  variables: PyTree,
  compressed: PyTree,
  batches: Iterable[Any],
) -> PyTree:
  """Corrects a compressed network by its difference from the original on unlabelled inputs.

  With BatchNorm this is `correct_batch_norm` with the inputs in place of the noise, and moments
  averaged over the batches.  Without BatchNorm, the biases are corrected from the first layer to
  the last, in any function that JAX can trace: a bias is a leaf that is added, once, to the product
  of another leaf with activations.  On every batch the sum has the mean z0 in the original network,
  and z1 in the compressed network, whose earlier layers are corrected already; then

      bias  <-  bias + z0 - z1                                  averaged over the batches

  so that every pre-activation has its original mean again.  Bias correction as such is Nagel et
  al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; here
  only differences on the same inputs are used.

  Args:
    apply_fn: with BatchNorm, as for `correct_batch_norm`.  Without, any function, called as
      `apply_fn(variables, batch)`; it is not compiled.
    variables: of the original network: with BatchNorm, `params` and `batch_stats`.
    compressed: the same tree with compressed weights, as `opq_jax.apply_compression` returns it.
    batches: inputs, prepared as the network expects them; a tuple is several arguments.

  Returns:
    `compressed` with corrected statistics and last bias, or with corrected biases.

  Raises:
    ValueError: a collection is missing, the two trees differ, there is no batch, or nothing can be
      corrected.

  >>> import flax.linen as nn
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
  check_same_tree(variables, compressed, set())
  has_statistics = isinstance(variables, Mapping) and STATISTICS in variables
  if has_statistics and trees.named_leaves(variables[STATISTICS]):
    check_has_batch_norm(variables)
    return follow_original(apply_fn, variables, compressed, batches, jax.random.key(0))
  first, second = jax.tree.leaves(variables), jax.tree.leaves(compressed)
  total: dict[int, Array] = {}
  count = 0
  for batch in batches:
    inputs = batch if type(batch) is tuple else (batch,)
    jaxpr = uses.traced(apply_fn, variables, *inputs)
    walk = _Biases(first, second, uses.usage_in(jaxpr, variables))
    walk.run(jaxpr, inputs)
    total = {bias: total.get(bias, 0) + shift for bias, shift in walk.shifts.items()}
    count += 1
  if not total:
    raise ValueError(
      f'found {count} batches and no bias of a layer, expected a batch at least, and a leaf that '
      'is added once to the product of another leaf'
    )
  new = [
    leaf + (total[number] / count).astype(leaf.dtype) if number in total else leaf
    for number, leaf in enumerate(second)
  ]
  return jax.tree.unflatten(jax.tree.structure(compressed), new)


class _Biases(SideBySide):
  """Corrects each bias just before the compressed network adds it.

  Attributes:
    shifts: what was added to each bias, by its number.
  """

  def __init__(self, first: Sequence[Any], second: Sequence[Any], used: Sequence[LeafUsage]):
    super().__init__(first, second, [True] * len(first))
    # added once, or in each step of the scan that runs over its slices
    self._is_bias = [
      len(leaf.uses) == 1
      and leaf.uses[0].operation == 'add'
      and set(leaf.uses[0].where) <= {'scan'}
      for leaf in used
    ]
    self.shifts: dict[int, Array] = {}

  def product(self, product: Product) -> None:
    number, view = product.view.leaf, product.view
    other = product.values[1 - product.operand] if len(product.values) == 2 else None
    if other is None or other.layer is None or not self._is_bias[number]:
      return
    axes = _repeated_axes(view, np.shape(self.first[number]))
    if axes is None:
      return
    before, after = (
      jnp.mean(x.astype(jnp.float32), axis=axes)
      for x in (other.content.first, other.content.of_second())
    )
    place, leaf = view.indices, jnp.asarray(self.second[number])
    shift = (before - after).reshape(leaf.shape[len(place) :])
    self.second[number] = leaf.at[place].add(shift.astype(leaf.dtype))
    zeros = jnp.zeros(leaf.shape, jnp.float32)
    self.shifts[number] = self.shifts.get(number, zeros).at[place].set(shift)


def _repeated_axes(view: View, shape: tuple[int, ...]) -> tuple[int, ...] | None:
  """Returns the axes along which a sum repeats a bias; None where its own are not in order."""
  own = [
    [factor for factor in axis if factor.axis != REPEATED and factor.size > 1] for axis in view.axes
  ]
  seen = [(factor.axis, factor.size) for axis in own for factor in axis]
  expected = [
    (axis, size) for axis, size in enumerate(shape) if size > 1 and axis >= len(view.indices)
  ]
  return tuple(place for place, axis in enumerate(own) if not axis) if seen == expected else None
