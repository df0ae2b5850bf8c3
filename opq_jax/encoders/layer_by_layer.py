r"""Codes chosen layer after layer, each for what the compressed layers before it give.

`opq_jax.encode_with_feedback` takes every layer for itself: it reads what the float network's
layer reads.  In the compressed network it reads x' instead of x, and can make good a part of what
the layers before it have done.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from opq_jax.compression.codes import CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders import feedback
from opq_jax.encoders import trellis_codes as trellis_encoding
from opq_jax.encoders.feedback import DAMPING
from opq_jax.network.moments import layer_moments

SHARE = 0.5


def encode_layer_by_layer(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  state: CompressionState,
  inputs: Float[Array, 'batch ...'],
  *,
  share: float = SHARE,
  damping: float = DAMPING,
  trellis: bool = False,
) -> tuple[PyTree, CompressionState]:
  r"""Other codes of the same codebooks, with which the whole network errs less.

  A layer gives x W in the float network and x' Q in the compressed one.  With the moments
  H = E[x'^T x'] and C = E[x'^T x],

      E |x W - x' Q|^2 = tr((V - Q)^T H (V - Q)) + what Q does not change       V = H^-1 C W

  so that the best weights for the inputs that there are, before rounding, are V and not W.  The
  codes are those of `encode_with_feedback` with H for

      W + share (V - W)

  since from few inputs V is fitted to their noise too, and more so the more weights it has.

  Both networks run side by side on the same inputs, once: as soon as a layer's inputs are known
  its codes are chosen, and the next layer reads what they give.  BatchNorm runs on the statistics
  of the batch, each network's on its own, as in `opq_jax.second_moments`.

  Args:
    apply_fn: `model.apply` of a Flax Linen module, as for `opq_jax.second_moments`.
    variables: of the float network.
    state: its grids; those of `opq_jax.allocate_with_feedback` give a file of the size that was
      asked, or a little less.
    inputs: unlabelled, prepared as the network expects them, all in one batch, of which two copies
      are in memory; or `opq_jax.synthetic_inputs`.  Noise will not do: what the compressed layers
      make of it is not what they make of images (`experiments/benchmarks/error_feedback.py`).
    share: of the way from the weights to those that fit the compressed inputs; 0 ignores that
      other inputs are what the float layer saw.
    damping: as for `encode_with_feedback`.
    trellis: whether the codes are those of `opq_jax.encode_with_trellis`.  Then `state` are plain
      grids: of `opq_jax.init_state(variables, allocation)` with the allocation of
      `opq_jax.allocate_with_trellis`.

  Returns:
    `(variables, state)` as of `encode_with_feedback`; BatchNorm is not corrected.

  Raises:
    ValueError: a tree is made for another one; a compressed leaf is no kernel of an `nn.Dense` or
      `nn.Conv` that is called; or a layer is called twice.

  >>> import numpy as np, opq_jax
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     for width in (64, 64, 8):
  ...       x = nn.Dense(width)(nn.relu(x))
  ...     return x
  >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 32)), jnp.float32)
  >>> variables = Network().init(jax.random.key(0), x)
  >>> moments = opq_jax.second_moments(Network().apply, variables, x)
  >>> _, one_by_one, state = opq_jax.allocate_with_feedback(
  ...   variables, moments, compression_rate=20.0
  ... )
  >>> coded, _ = encode_layer_by_layer(Network().apply, variables, state, x)
  >>> error = lambda tree: float(jnp.square(
  ...   Network().apply(tree, x) - Network().apply(variables, x)).sum())
  >>> error(coded) < 0.9 * error(one_by_one)
  True
  """
  leaves = trees.named_leaves(variables)
  records = dict(zip(leaves, trees.records(variables, state.tree, LeafState), strict=True))
  values, masks = dict(leaves), dict(records)
  seen: set[str] = set()
  is_nested = False

  def compressed(module: nn.Module, replaced: dict[str, Any], *args: Any, **kwargs: Any) -> Array:
    """The layer on its own, with other parameters; what it would update is dropped."""
    nonlocal is_nested
    is_nested = True
    bound = {**module.variables, 'params': {**module.variables.get('params', {}), **replaced}}
    alone = module.clone(parent=None, name=None)
    output, _ = alone.apply(bound, *args, **kwargs, mutable=['batch_stats'])
    is_nested = False
    return output

  def side_by_side(layer: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    name = '/'.join(('params', *module.path, 'kernel'))
    is_layer = isinstance(module, nn.Conv | nn.Dense) and records.get(name) is not None
    is_norm = isinstance(module, nn.BatchNorm)
    if is_nested or context.method_name != '__call__' or not (is_layer or is_norm):
      return layer(*args, **kwargs)
    both, *others = args or (kwargs.pop('inputs' if is_layer else 'x'),)
    first, second = jnp.split(both, 2)
    replaced = {}
    if is_layer:
      if name in seen:
        raise ValueError(f'{name}: found a layer that is called twice, expected once')
      seen.add(name)
      values[name], masks[name] = _chosen(
        module, leaves[name], records[name], first, second, share, damping, trellis
      )
      replaced = {'kernel': values[name]}
    outputs = (
      layer(first, *others, **kwargs),
      compressed(module, replaced, second, *others, **kwargs),
    )
    return jnp.concatenate(outputs)

  doubled = jnp.concatenate([inputs, inputs])
  with nn.intercept_methods(side_by_side):
    if trees.named_leaves(variables.get('batch_stats', {})):
      apply_fn(variables, doubled, train=True, mutable=['batch_stats'])
    else:
      apply_fn(variables, doubled)
  missing = [name for name, record in records.items() if record is not None and name not in seen]
  if missing:
    raise ValueError(
      f'{missing[0]}: found a compressed leaf of no layer that was called, expected the kernel of '
      'an nn.Dense or nn.Conv'
    )
  structure = jax.tree.structure(variables)
  return (
    jax.tree.unflatten(structure, values.values()),
    CompressionState(jax.tree.unflatten(structure, masks.values())),
  )


def _chosen(
  module: nn.Module,
  kernel: Float[Array, '... channels'],
  record: LeafState,
  inputs: Float[Array, 'batch ... channels'],
  compressed: Float[Array, 'batch ... channels'],
  share: float,
  damping: float,
  trellis: bool,
) -> tuple[Array, LeafState]:
  """One layer's decoded weights, and its grid with their mask."""
  # a layer that belongs to no network is the same for all that are alike: compiled once
  alone = module.clone(parent=None, name=None)
  moments = _layer_moments(alone, compressed)
  target = kernel
  if moments is not None:
    cross = _layer_moments(alone, compressed, inputs)
    target = _fitted(kernel, moments, cross, share, damping)
  encoder = trellis_encoding if trellis else feedback
  return encoder.encode_leaf(target, record, moments, damping)


_layer_moments = jax.jit(layer_moments, static_argnums=0)


@jax.jit
def _fitted(
  kernel: Float[Array, '... channels'],
  moments: Float32[Array, 'groups K K'],
  cross: Float32[Array, 'groups K K'],
  share: Float[Array, ''],
  damping: Float[Array, ''],
) -> Float32[Array, '... channels']:
  """W + share (H^-1 C W - W), damped."""
  groups, width, _ = moments.shape
  weights = kernel.astype(jnp.float32).reshape(width, groups, -1).swapaxes(0, 1)
  mean = jnp.mean(jnp.diagonal(moments, axis1=1, axis2=2), axis=1)[:, None, None]
  damped = moments + damping * jnp.where(mean > 0, mean, 1) * jnp.eye(width)[None]
  # H^-1 C - 1 = H^-1 (C - H): nothing where the inputs are the float network's
  moved = jnp.matmul(cross - moments, weights, precision=lax.Precision.HIGHEST)
  fitted = weights + share * jnp.linalg.solve(damped, moved)
  return fitted.swapaxes(0, 1).reshape(kernel.shape)
