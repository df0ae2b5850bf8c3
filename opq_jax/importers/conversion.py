"""Conversion between the variables of `opq_jax.models` and a framework's named tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax import models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.importers.layouts import Shape, Source, Tensors

if TYPE_CHECKING:
  import flax.linen as nn

HEAD_BIAS = 'params/head/bias'
"""Path of the last layer's bias, whose length is the number of classes."""


def to_variables(
  model: 'nn.Module', source: Source, tensors: Tensors, description: str
) -> dict[str, Any]:
  """Returns the variables of a model that has the framework's tensors as weights.

  Args:
    model: the network, with as many logits as the tensors have.
    source: the framework's names and layouts.
    tensors: all tensors of the network by name, and none besides but ignored ones.
    description: what the tensors should be, for error messages.

  Returns:
    `{'params': …}`, and `'batch_stats'` if there is a BatchNorm; float32.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; the message lists all of them.
  """
  shapes = models.variable_shapes(model)
  places = source.places(shapes)
  tensors = source.prepare(tensors)
  found = {
    name: np.shape(tensor) for name, tensor in tensors.items() if not name.endswith(source.ignored)
  }
  expected = {name: layout.source_shape for name, layout in places.values()}
  if found != expected:
    lines = differences(found, expected)
    raise ValueError('\n'.join([f'the tensors are not those of {description}:', *lines]))
  # copied: jnp.asarray may share the memory of the caller's array
  arrays = [
    jnp.array(layout.to_flax(np.asarray(tensors[name])), jnp.float32)
    for name, layout in places.values()
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def to_tensors(
  model: 'nn.Module', source: Source, variables: PyTree, description: str
) -> dict[str, np.ndarray]:
  """Returns the framework's tensors of variables: the inverse of `to_variables`, bit for bit.

  The exception is information that `Source.prepare` has dropped: Keras' biases before a BatchNorm.

  Args:
    model: the network of the variables.
    source: the framework's names and layouts.
    variables: the variables, or a flat dict of them by path.
    description: what the variables should be, for error messages.

  Raises:
    ValueError: leaves are missing, unexpected or of another shape; the message lists all of them.
  """
  shapes = models.variable_shapes(model)
  leaves = trees.named_leaves(checked(model, variables, description))
  tensors = source.restore(
    {
      name: layout.to_source(np.asarray(leaves[path]))
      for path, (name, layout) in source.places(shapes).items()
    }
  )
  # copied: JAX's memory is read-only, and an array of permuted axes is not contiguous
  return {name: np.array(tensor, order='C') for name, tensor in tensors.items()}


def checked(model: 'nn.Module', variables: PyTree, description: str) -> dict[str, Any]:
  """Returns the variables, or a flat dict of them by path, as the tree that the model has.

  Raises:
    ValueError: leaves are missing, unexpected or of another shape; the message lists all of them.
  """
  shapes = models.variable_shapes(model)
  leaves = trees.named_leaves(variables)
  found = {path: np.shape(leaf) for path, leaf in leaves.items()}
  expected = {path: tuple(leaf.shape) for path, leaf in trees.named_leaves(shapes).items()}
  if found != expected:
    lines = differences(found, expected)
    raise ValueError('\n'.join([f'the variables are not those of {description}:', *lines]))
  return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[path] for path in expected])


def without_background(variables: dict[str, Any]) -> dict[str, Any]:
  """Returns the variables without logit 0, the background class of TensorFlow's networks."""
  head = {name: leaf[..., 1:] for name, leaf in variables['params']['head'].items()}
  return variables | {'params': variables['params'] | {'head': head}}


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
  """Returns a line for every name that is missing, unexpected or of another shape."""
  lines = []
  for name in sorted(found.keys() | expected.keys()):
    if name not in found:
      lines.append(f'  {name}: not found, expected shape {expected[name]}')
    elif name not in expected:
      lines.append(f'  {name}: found shape {found[name]}, expected no such tensor')
    elif found[name] != expected[name]:
      lines.append(f'  {name}: found shape {found[name]}, expected {expected[name]}')
  return lines
