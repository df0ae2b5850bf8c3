"""Calls of a network in which BatchNorm runs on the statistics of the batch."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

# flags of a module's call, and their values while BatchNorm runs on the batch
_FLAGS = {
  'train': True,
  'training': True,
  'is_training': True,
  'use_running_average': False,
  'deterministic': False,
}


def on_batch_statistics(fn: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
  """Returns a function that runs a network's BatchNorm on the statistics of the batch.

  Args:
    fn: `model.apply` of a Flax Linen module whose variables hold `batch_stats`; then the call gets
      `mutable=['batch_stats']` and the module's own flag: `train`, `training`, `is_training`,
      `use_running_average` or `deterministic`.  Every other function is returned as it is: it
      decides by itself what its BatchNorm reads.
    params: the variables of the network.

  Raises:
    ValueError: the module has `batch_stats`, and its call has none of these flags.
  """
  import flax.linen as nn

  module = getattr(fn, '__self__', None)
  if not isinstance(module, nn.Module) or getattr(fn, '__name__', '') != 'apply':
    return fn
  if not isinstance(params, Mapping) or not trees.named_leaves(params.get('batch_stats', {})):
    return fn
  known = inspect.signature(type(module).__call__).parameters
  flags = {name: value for name, value in _FLAGS.items() if name in known}
  if not flags:
    raise ValueError(
      f'{type(module).__name__}: found batch_stats and a call without any of {list(_FLAGS)}, '
      'expected one of them, or a function of your own that runs BatchNorm on the batch'
    )

  def on_batch(variables: PyTree, *inputs: Any) -> Any:
    return fn(variables, *inputs, **flags, mutable=['batch_stats'])

  return on_batch
