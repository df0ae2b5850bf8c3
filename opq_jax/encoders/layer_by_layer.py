"""Codes chosen layer after layer, each for the inputs that the compressed layers before it give.

`Feedback` and `Trellis` minimise each layer's error on the inputs that the layer reads in the float
network.  In the compressed network it reads x' instead of x, and can make good a part of the error
that the layers before it have made.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from opq_jax.compression import CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import DAMPING, Encoded, Encoder, LeafEncoder, encoded
from opq_jax.network.moments import layer_moments

if TYPE_CHECKING:
  import flax.linen as nn

# of the way from the weights to those that fit the compressed network's inputs
SHARE = 0.5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerByLayer(Encoder):
  r"""Chooses the codes of one layer after the other, given what the compressed layers before give.

  A layer gives x W in the float network and x' Q in the compressed one.  With the moments
  H = E[x'^T x'] and C = E[x'^T x],

      E |x W - x' Q|^2 = tr((V - Q)^T H (V - Q)) + (a term without Q)       V = H^-1 C W

  so the best weights for the inputs x', before rounding, are V instead of W.  The codes are those
  of the encoder `first`, with moments H, for

      W + share (V - W)

  because V is fitted to the noise of a few inputs too, the more so the more weights it has.

  Both networks run side by side on the same inputs, once: a layer's codes are chosen as soon as its
  inputs are known, and the next layer reads what they give.  BatchNorm runs on the statistics of
  the batch, each network's on its own, as in `opq_jax.network.second_moments`; it is not corrected.

  The encoder `first` has two roles: `opq_jax.compress` searches for the allocation whose codes by
  `first` alone have the bits asked, and on the plain grids of this allocation codes are then chosen
  layer by layer, the way that `first` chooses them: `Trellis` or `Feedback` with the moments H in
  the place of their own; `Rounding` rounds W + share (V - W).  The file has the size asked, or a
  little less.

  Attributes:
    fn: `model.apply` of a Flax Linen module, as for `opq_jax.network.second_moments`.
    inputs: calibration inputs, unlabelled, prepared as the network expects them, or
      `opq_jax.correction.synthetic_inputs`; one batch, of which two copies are in memory.  Noise
      will not do: compressed layers make of it something else than of images
      (`experiments/benchmarks/accuracy/error_feedback.py`).
    first: `Rounding()`, `Feedback(moments)` or `Trellis(moments)`.
    share: how far to go from W to V; 0 ignores that the float layer saw other inputs.
    damping: of H, as in `Feedback`.

  >>> import flax.linen as nn, numpy as np, opq_jax
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     for width in (64, 64, 8):
  ...       x = nn.Dense(width)(nn.relu(x))
  ...     return x
  >>> fn = Network().apply
  >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 32)), jnp.float32)
  >>> variables = Network().init(jax.random.key(0), x)
  >>> feedback = opq_jax.encoders.Feedback(opq_jax.network.second_moments(fn, variables, x))
  >>> error = lambda encoder: float(jnp.square(fn(variables, x) - fn(
  ...   opq_jax.compress(variables, compression_rate=20.0, encoder=encoder).params, x)).sum())
  >>> error(LayerByLayer(fn, x, first=feedback)) < 0.9 * error(feedback)
  True
  """

  fn: Callable[..., Any]
  inputs: Float[Array, 'batch ...']
  first: LeafEncoder
  share: float = SHARE
  damping: float = DAMPING

  def __post_init__(self) -> None:
    if not isinstance(self.first, LeafEncoder):
      raise ValueError(
        f'first: found {self.first!r}, expected Rounding(), Feedback(moments) or Trellis(moments)'
      )

  def choose_codes(self, params: Mapping[str, PyTree], grids: CompressionState) -> Encoded:
    """Chooses the codes of a network on its plain grids.

    Args:
      params: the variables of the float network.
      grids: plain grids, from `opq_jax.init_state(params, allocation)`.

    Raises:
      ValueError: grids were made for another tree; a compressed leaf is not the kernel of an
        `nn.Dense` or `nn.Conv` that is called; or a layer is called twice.
    """
    return _choose(self, params, grids)


def _choose(
  encoder: LayerByLayer, variables: Mapping[str, PyTree], state: CompressionState
) -> Encoded:
  import flax.linen as nn

  leaves = trees.named_leaves(variables)
  records = dict(zip(leaves, trees.records(variables, state.tree, LeafState), strict=True))
  values, masks = dict(leaves), dict(records)
  seen: set[str] = set()
  is_nested = False

  def compressed(module: 'nn.Module', replaced: dict[str, Any], *args: Any, **kwargs: Any) -> Array:
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
        encoder, module, leaves[name], records[name], first, second
      )
      replaced = {'kernel': values[name]}
    outputs = (
      layer(first, *others, **kwargs),
      compressed(module, replaced, second, *others, **kwargs),
    )
    return jnp.concatenate(outputs)

  doubled = jnp.concatenate([encoder.inputs, encoder.inputs])
  with nn.intercept_methods(side_by_side):
    if trees.named_leaves(variables.get('batch_stats', {})):
      encoder.fn(variables, doubled, train=True, mutable=['batch_stats'])
    else:
      encoder.fn(variables, doubled)
  missing = [name for name, record in records.items() if record is not None and name not in seen]
  if missing:
    raise ValueError(
      f'{missing[0]}: found a compressed leaf of no layer that was called, expected the kernel of '
      'an nn.Dense or nn.Conv'
    )
  return encoded(variables, [(values[name], masks[name]) for name in leaves])


def _chosen(
  encoder: LayerByLayer,
  module: 'nn.Module',
  kernel: Float[Array, '... channels'],
  record: LeafState,
  inputs: Float[Array, 'batch ... channels'],
  compressed: Float[Array, 'batch ... channels'],
) -> tuple[Array, LeafState]:
  """One layer's decoded weights, and its grid with their mask."""
  # a layer that belongs to no network is the same for all that are alike: compiled once
  alone = module.clone(parent=None, name=None)
  moments = _layer_moments(alone, compressed)
  target = kernel
  if moments is not None:
    cross = _layer_moments(alone, compressed, inputs)
    target = _fitted(kernel, moments, cross, encoder.share, encoder.damping)
  return encoder.first.choose_leaf(target, record, moments, encoder.damping)


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
