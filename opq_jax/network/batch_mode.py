"""Calls of a network in which BatchNorm runs on the statistics of the batch."""

import functools
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
    fn: `model.apply` of a Flax Linen module, or a function with the parameters `mutable` and a
      flag, for variables that hold `batch_stats`.  It is called with `mutable=['batch_stats']` and
      its flag: `train`, `training`, `is_training`, `use_running_average` or `deterministic`.  Every
      other function is returned as it is: it decides by itself what its BatchNorm reads.
    params: the variables of the network.

  Raises:
    ValueError: a module has `batch_stats`, and its call has none of these flags.
  """
  if not isinstance(params, Mapping) or not trees.named_leaves(params.get('batch_stats', {})):
    return fn
  inner = fn
  while isinstance(inner, functools.partial):
    inner = inner.func
  flags = _flags_of(inner)
  if flags is None:
    return fn

  def on_batch(variables: PyTree, *inputs: Any) -> Any:
    return fn(variables, *inputs, **flags, mutable=['batch_stats'])

  return on_batch


def _flags_of(fn: Callable[..., Any]) -> dict[str, bool] | None:
  """Returns the flags that a function is called with, or None where it takes none."""
  import flax.linen as nn

  module = getattr(fn, '__self__', None)
  is_apply = isinstance(module, nn.Module) and getattr(fn, '__name__', '') == 'apply'
  called = type(module).__call__ if is_apply else fn
  known = inspect.signature(called).parameters
  if not is_apply and 'mutable' not in known:
    return None
  flags = {name: value for name, value in _FLAGS.items() if name in known}
  if not flags:
    name = type(module).__name__ if is_apply else getattr(fn, '__name__', type(fn).__name__)
    raise ValueError(
      f'{name}: found batch_stats and a call without any of {list(_FLAGS)}, expected one of them, '
      'or a function of your own that runs BatchNorm on the batch'
    )
  return flags
