"""Networks of NNX and Haiku as functions of variables: what the corrections call.

The corrections know BatchNorm by its running statistics, in a collection `batch_stats` that a call
with `train=True, mutable=['batch_stats']` returns updated, as Flax Linen has it.  The functions
here bring networks of other libraries into this form and back.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax.core.trees import PyTree
from opq_jax.correction.batch_statistics import STATISTICS

# Haiku divides a mean by 1 - decay^counter, which is 1 after so many updates
_MANY_UPDATES = 1_000_000


class Functional(NamedTuple):
  """A network as a function of its variables.

  Attributes:
    apply_fn: called as `apply_fn(variables, x)`, or with `train=True, mutable=['batch_stats']`.
      It returns the output, in training mode with the updated `batch_stats` beside it.
    variables: `params` and `batch_stats`: compress and correct these.
    restore: variables -> the network in the form of its own library.
  """

  apply_fn: Callable[..., Any]
  variables: dict[str, PyTree]
  restore: Callable[[Mapping[str, PyTree]], Any]


def from_nnx(module: Any) -> Functional:
  """Returns a Flax NNX module as a function.

  Args:
    module: any `nnx.Module`.  Its `nnx.Param`s become `params` and its `nnx.BatchStat`s
      `batch_stats`; all else (dropout's keys, ...) stays as it is.

  Returns:
    A `Functional`, whose `restore` returns a module.

  >>> from flax import nnx
  >>> import opq_jax
  >>> class Network(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.dense, self.norm = nnx.Linear(8, 64, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)
  ...     self.head = nnx.Linear(64, 4, rngs=rngs)
  ...   def __call__(self, x):
  ...     return self.head(nnx.relu(self.norm(self.dense(x))))
  >>> apply_fn, variables, restore = from_nnx(Network(nnx.Rngs(0)))
  >>> network = opq_jax.compress(variables, compression_rate=8.0)
  >>> corrected = opq_jax.correction.correct_batch_norm(
  ...   apply_fn, variables, network.params, jax.random.key(0), (64, 8)
  ... )
  >>> module = restore(corrected)
  >>> module.eval()
  >>> module(jnp.ones((2, 8))).shape
  (2, 4)
  """
  from flax import nnx

  graph, *split = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
  params, statistics, rest = split

  def restore(variables: Mapping[str, PyTree]) -> Any:
    # copies, since a module shares its variables with the states that it is merged from
    states = [jax.tree.map(lambda leaf: leaf, state) for state in (params, statistics)]
    nnx.replace_by_pure_dict(states[0], variables['params'])
    nnx.replace_by_pure_dict(states[1], variables[STATISTICS])
    return nnx.merge(graph, *states, rest)

  def apply_fn(
    variables: Mapping[str, PyTree],
    *inputs: Any,
    train: bool = False,
    mutable: Sequence[str] | bool = False,
  ) -> Any:
    network = restore(variables)
    network.train() if train else network.eval()
    output = network(*inputs)
    if not mutable:
      return output
    updated = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))
    for path, layer in nnx.iter_graph(network):
      if isinstance(layer, nnx.BatchNorm):
        _restore_derivative(_at(updated, path), _at(variables[STATISTICS], path), layer.momentum)
    return output, {STATISTICS: updated}

  variables = {
    'params': nnx.to_pure_dict(params),
    STATISTICS: nnx.to_pure_dict(statistics),
  }
  return Functional(apply_fn, variables, restore)


def _at(tree: Any, path: Sequence[Any]) -> Any:
  return functools.reduce(lambda node, key: node[key], path, tree)


def _restore_derivative(updated: dict[str, Any], old: Mapping[str, Any], momentum: float) -> None:
  """Gives updated statistics their derivative by the old ones, which NNX stops.

  An update is momentum * old + (1 - momentum) * batch, and the momentum is read from it.
  """
  for name in ('mean', 'var'):
    of_old = momentum * old[name]
    updated[name] = jax.lax.stop_gradient(updated[name] - of_old) + of_old


def from_haiku(
  apply: Callable[..., Any], params: PyTree, state: Mapping[str, Any], rng: Any = None
) -> Functional:
  """Returns a Haiku network with state as a function.

  Args:
    apply: of `hk.transform_with_state(f)`, where f is called as `f(x, is_training)`.
    params, state: of the network.  A `hk.BatchNorm` keeps its running mean and variance in
      `.../~/mean_ema` and `.../~/var_ema`; all other state stays as it is.
    rng: a key, where the network needs one.

  Returns:
    A `Functional`, whose `restore` returns params and state.
  """
  pairs = {
    f'{module}/{ema}': f'{module.removesuffix("/~")}/{name}'
    for module in sorted({name.rpartition('/')[0] for name in state})
    for ema, name in (('mean_ema', 'mean'), ('var_ema', 'var'))
    if f'{module}/{ema}' in state
  }

  def restore(variables: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, Any]]:
    statistics = variables[STATISTICS]
    new = {
      ema: {
        'average': statistics[name],
        'hidden': statistics[name],
        'counter': jnp.asarray(_MANY_UPDATES, np.asarray(state[ema]['counter']).dtype),
      }
      for ema, name in pairs.items()
    }
    return variables['params'], {**state, **new}

  def apply_fn(
    variables: Mapping[str, PyTree],
    *inputs: Any,
    train: bool = False,
    mutable: Sequence[str] | bool = False,
  ) -> Any:
    output, updated = apply(*restore(variables), rng, *inputs, train)
    if not mutable:
      return output
    return output, {STATISTICS: {name: updated[ema]['average'] for ema, name in pairs.items()}}

  statistics = {name: state[ema]['average'] for ema, name in pairs.items()}
  return Functional(apply_fn, {'params': params, STATISTICS: statistics}, restore)
