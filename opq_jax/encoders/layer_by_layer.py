"""Codes chosen layer after layer, each for the inputs that the compressed layers before it give.

`Feedback` and `Trellis` minimise each layer's error on the inputs that the layer reads in the float
network.  In the compressed network it reads other inputs, and can make good a part of the error of
the layers before it.
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
from opq_jax.encoders.encoder import (
  DAMPING,
  Encoded,
  Encoder,
  IndefiniteMomentsError,
  LeafEncoder,
  check_damping,
  encoded,
  named_leaf,
)
from opq_jax.network.moments import layer_moments

if TYPE_CHECKING:
  import flax.linen as nn

SHARE = 0.5
"""How far to go from the weights to those that fit the compressed network's inputs best.

Half of the way, because a fit to few calibration inputs is a fit to their noise too.
"""


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
    check_damping(self.damping)
    if not 0 <= self.share <= 1:
      raise ValueError(f'share: found {self.share}, expected 0 ... 1')

  def choose_codes(self, params: Mapping[str, PyTree], grids: CompressionState) -> Encoded:
    """Chooses the codes of a network on its plain grids.

    Args:
      params: the variables of the float network.
      grids: plain grids, from `opq_jax.init_state(params, allocation)`.

    Raises:
      ValueError: grids were made for another tree; a compressed leaf is not the kernel of an
        `nn.Dense` or `nn.Conv` that is called; a layer is called twice; or damped moments are not
        positive definite.
    """
    return _SideBySide(self, params, grids).run()


class _SideBySide:
  """Runs the float and the compressed network together, and chooses codes on the way.

  The network is called once, on a batch that holds the inputs twice.  At every layer and BatchNorm
  an interceptor cuts the batch in two: the first half goes through the float network's module, the
  second half through the same module with decoded weights.  All other operations treat examples
  apart, so they need no care.
  """

  def __init__(
    self, encoder: LayerByLayer, variables: Mapping[str, PyTree], grids: CompressionState
  ):
    self._encoder, self._variables = encoder, variables
    self._leaves = trees.named_leaves(variables)
    records = trees.records(variables, grids.tree, LeafState)
    self._grids: dict[str, LeafState | None] = dict(zip(self._leaves, records, strict=True))
    self._values: dict[str, Any] = dict(self._leaves)
    self._called: set[str] = set()
    self._is_inside = False  # of a module that this class has called itself

  def run(self) -> Encoded:
    import flax.linen as nn

    fn, variables = self._encoder.fn, self._variables
    twice = jnp.concatenate([self._encoder.inputs, self._encoder.inputs])
    # not compiled: at every layer the codes are values that the host works on
    with nn.intercept_methods(self._intercept):
      if trees.named_leaves(variables.get('batch_stats', {})):
        fn(variables, twice, train=True, mutable=['batch_stats'])
      else:
        fn(variables, twice)
    compressed = (name for name, grid in self._grids.items() if grid is not None)
    missing = [name for name in compressed if name not in self._called]
    if missing:
      raise ValueError(
        f'{missing[0]}: found a compressed leaf of no layer that was called, expected the kernel '
        'of an nn.Dense or nn.Conv'
      )
    chosen = [(self._values[name], self._grids[name]) for name in self._leaves]
    return encoded(self._variables, chosen)

  def _intercept(self, call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    """Calls one method of the network; layers and BatchNorm once for each half of the batch."""
    import flax.linen as nn

    module = context.module
    name = '/'.join(('params', *module.path, 'kernel'))
    is_layer = isinstance(module, nn.Conv | nn.Dense) and self._grids.get(name) is not None
    is_norm = isinstance(module, nn.BatchNorm)
    if self._is_inside or context.method_name != '__call__' or not (is_layer or is_norm):
      return call(*args, **kwargs)
    # by position or by name, and Flax has two names for the inputs of a layer and of a BatchNorm
    both, *others = args or (kwargs.pop('inputs' if is_layer else 'x'),)
    float_inputs, compressed_inputs = jnp.split(both, 2)
    new_params = {}
    if is_layer:
      new_params['kernel'] = self._choose(name, module, float_inputs, compressed_inputs)
    return jnp.concatenate(
      [
        call(float_inputs, *others, **kwargs),
        self._call_with(module, new_params, compressed_inputs, *others, **kwargs),
      ]
    )

  def _choose(
    self,
    name: str,
    module: 'nn.Module',
    float_inputs: Float[Array, 'batch ... channels'],
    compressed_inputs: Float[Array, 'batch ... channels'],
  ) -> Array:
    """Chooses the codes of one layer, and returns the decoded weights."""
    if name in self._called:
      raise ValueError(f'{name}: found a layer that is called twice, expected once')
    self._called.add(name)
    # a module of no network equals all modules that are like it: compiled once for them
    alone = module.clone(parent=None, name=None)
    encoder, kernel = self._encoder, self._leaves[name]
    moments = _layer_moments(alone, compressed_inputs)
    grid = self._grids[name]
    assert grid is not None
    with named_leaf(name):
      target = kernel
      if moments is not None:
        cross_moments = _layer_moments(alone, compressed_inputs, float_inputs)
        target = _fitted(kernel, moments, cross_moments, encoder.share, encoder.damping)
        if not jnp.isfinite(target).all():
          raise IndefiniteMomentsError(encoder.damping)
      self._values[name], self._grids[name] = encoder.first.choose_leaf(
        target, grid, moments, encoder.damping
      )
    return self._values[name]

  def _call_with(
    self, module: 'nn.Module', new_params: dict[str, Any], *args: Any, **kwargs: Any
  ) -> Array:
    """Calls a module by itself, with some other parameters; drops its updates of statistics."""
    # updates of the compressed half are dropped: statistics in the variables are those of the float
    # network alone
    params = {**module.variables.get('params', {}), **new_params}
    alone = module.clone(parent=None, name=None)
    # the call below comes through the interceptor again, and must pass
    self._is_inside = True
    output, _ = alone.apply(
      {**module.variables, 'params': params}, *args, **kwargs, mutable=['batch_stats']
    )
    self._is_inside = False
    return output


_layer_moments = jax.jit(layer_moments, static_argnums=0)


@jax.jit
def _fitted(
  kernel: Float[Array, '... channels'],
  moments: Float32[Array, 'groups K K'],
  cross_moments: Float32[Array, 'groups K K'],
  share: Float[Array, ''],
  damping: Float[Array, ''],
) -> Float32[Array, '... channels']:
  """Returns W + share (H^-1 C W - W), with H damped."""
  groups, width, _ = moments.shape
  weights = kernel.astype(jnp.float32).reshape(width, groups, -1).swapaxes(0, 1)
  mean = jnp.mean(jnp.diagonal(moments, axis1=1, axis2=2), axis=1)[:, None, None]
  damped = moments + damping * jnp.where(mean > 0, mean, 1) * jnp.eye(width)[None]
  # H^-1 C - 1 = H^-1 (C - H), which is 0 where the inputs are those of the float network
  moved = jnp.matmul(cross_moments - moments, weights, precision=lax.Precision.HIGHEST)
  fitted = weights + share * jnp.linalg.solve(damped, moved)
  return fitted.swapaxes(0, 1).reshape(kernel.shape)
