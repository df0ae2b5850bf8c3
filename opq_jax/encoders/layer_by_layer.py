"""Codes chosen layer after layer, each for the inputs that the compressed layers before it give.

`Feedback` and `Trellis` minimise each layer's error on the inputs that the layer reads in the float
network.  In the compressed network it reads other inputs, and can make good a part of the error of
the layers before it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32

from opq_jax.compression import CompressionState, LeafState
from opq_jax.core import messages
from opq_jax.core.trees import PyTree
from opq_jax.encoders.allocation_search import quietly
from opq_jax.encoders.encoder import (
  Encoded,
  Encoder,
  LeafEncoder,
  LeafToCode,
  all_finite,
  encoded,
  leaves_to_code,
  named_leaf,
  part_of,
  stack_slices,
)
from opq_jax.encoders.factors import DAMPING, IndefiniteMomentsError, check_damping
from opq_jax.encoders.fitted_weights import fitted_rows
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.encoders.plain_codes import PlainCodesWarning, without_plain_codes
from opq_jax.encoders.tied_codes import with_ties
from opq_jax.network import InputMoments, LeafUsage, on_batch_statistics, uses
from opq_jax.network.moment_sums import mean_of
from opq_jax.network.products import Reading, inputs_of, sums_of
from opq_jax.network.side_by_side import Reached, Replacing

SHARE = 0.5
"""How far to go from the weights to those that fit the compressed network's inputs best.

Half of the way, because a fit to few calibration inputs is a fit to their noise too.
"""


class TracedNetwork(NamedTuple):
  """A function as it was traced, once for all that `LayerByLayer` does with it.

  Attributes:
    jaxpr: closed.
    used: how it uses each leaf of its parameters.
  """

  jaxpr: Any
  used: list[LeafUsage]


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
    fn: called as `fn(params, inputs)`, as for `opq_jax.network.second_moments`.
    inputs: calibration inputs, unlabelled, prepared as the network expects them, or
      `opq_jax.correction.synthetic_inputs`: any pytree; a tuple is several arguments.  Noise
      will not do: compressed layers make of it something else than of images
      (`experiments/benchmarks/accuracy/error_feedback.py`).
    first: `Rounding()`, `Feedback(moments)` or `Trellis(moments)`.
    share: how far to go from W to V; 0 ignores that the float layer saw other inputs.
    damping: of H, as in `Feedback`.

  >>> import flax.linen as nn, jax.numpy as jnp, numpy as np, opq_jax
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
  inputs: PyTree
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

  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of a network on its plain grids.

    Leaves that are one array get the codes of one of them: of a table that is looked up, if there
    is one.

    Args:
      params: the parameters, or variables, of the float network.
      grids: plain grids, from `opq_jax.init_state(params, allocation)`.

    Raises:
      ValueError: grids were made for another tree; or damped moments are not positive definite.

    Warns:
      UserWarning: leaves that are looked up, used several times or not at all, by name.
    """
    return self.choose_codes_in(self.traced(params), params, grids)

  def choose_codes_in(
    self, network: TracedNetwork, params: PyTree, grids: CompressionState
  ) -> Encoded:
    """Chooses the codes of a network that is traced already, as `choose_codes`."""
    leaves = list(leaves_to_code(params, grids))
    coded: list[list[_Coded]] = [[] for _ in leaves]

    @functools.cache
    def own_moments() -> list[LeafToCode]:
      """Returns the leaves with the moments that `first` holds: few networks need them."""
      return list(leaves_to_code(params, grids, getattr(self.first, 'moments', None)))

    alone: list[str] = []
    plain: list[str] = []

    def replace(reached: Reached) -> Array:
      leaf, place = leaves[reached.leaf], reached.place
      assert leaf.grid is not None
      grid = _grid_at(leaf, place)
      with named_leaf(leaf.name):
        if reached.reading is None:
          if not place:
            alone.append(leaf.name)
          # a slice of a branch that was not taken has no inputs
          moments = None if place else own_moments()[reached.leaf].moments
          arguments = leaf.weights[place], grid, moments, self.damping
          new, notes = quietly(self.first.choose_leaf, *arguments)
        else:
          new, notes = quietly(self._choose, leaf.weights[place], grid, reached)
      for note in without_plain_codes(notes, leaf.name, plain):
        messages.warn(note)
      coded[reached.leaf].append(_Coded(place, *new))
      return new[0]

    walk = Replacing(
      [leaf.weights for leaf in leaves],
      network.used,
      [leaf.grid is not None for leaf in leaves],
      replace,
    )
    walk.run(network.jaxpr, self._arguments)
    walk.finish()
    if plain:
      messages.warn(PlainCodesWarning(plain))
    if alone:
      messages.warn(
        f'{messages.listed(alone)}: found leaves that are looked up, used several times or not at '
        f'all: {self.first!r} has chosen their codes without regard to the layers before them'
      )
    states = [_whole_state(leaf, parts) for leaf, parts in zip(leaves, coded, strict=True)]
    whole = encoded(params, list(zip(walk.second, states, strict=True)))
    # all layers were chosen for the inputs that a table gives: its codes stay
    tables = lambda: {leaf.name for leaf in network.used if leaf.kind == 'look-up'}
    return with_ties(whole, params, [leaf.grid for leaf in leaves], tables)

  def traced(self, params: PyTree) -> TracedNetwork:
    """Traces the function that is walked; params of other values have the same trace."""
    fn = on_batch_statistics(self.fn, params)
    jaxpr = uses.traced(fn, params, *self._arguments)
    return TracedNetwork(jaxpr, uses.usage_in(jaxpr, params))

  @property
  def _arguments(self) -> tuple[Any, ...]:
    """The arguments of the function, behind its parameters."""
    return self.inputs if type(self.inputs) is tuple else (self.inputs,)

  def _choose(self, weights: Array, grid: LeafState, reached: Reached) -> tuple[Array, LeafState]:
    """Chooses the codes of one layer, whose inputs are known in both networks."""
    reading, use, picked = reached.reading, reached.use, len(reached.place)
    assert reading is not None and use is not None
    slices = len(use.slices) - picked
    moments = _moments(reading, reached.second_inputs)
    cross_moments = _moments(reading, reached.second_inputs, reached.first_inputs)
    of_leaf = InputMoments(moments, tuple(axis - picked for axis in inputs_of(reading)), slices)
    # the slices that one product reads together, as experts
    places, targets = np.ndindex(weights.shape[:slices]), []
    for place in places:
      part = part_of(of_leaf, place)
      assert part is not None
      layout = MatrixLayout(weights.shape[slices:], part.inputs)
      rows = layout.rows(weights[place])
      fitted = fitted_rows(rows, part.matrix, cross_moments[place], self.share, self.damping)
      targets.append(layout.leaf(fitted))
    target = stack_slices(targets, weights.shape[:slices]) if slices else targets[0]
    if not all_finite(target):
      raise IndefiniteMomentsError(self.damping)
    return self.first.choose_leaf(target, grid, of_leaf, self.damping)


class _Coded(NamedTuple):
  """Codes of a leaf, or of the slice at `place`."""

  place: tuple[int, ...]
  values: Array
  state: LeafState


def _grid_at(leaf: LeafToCode, place: tuple[int, ...]) -> LeafState:
  """Returns the grid of the slice at `place`, or of several behind it."""
  grid = leaf.grid
  assert grid is not None
  if len(place) > grid.slices:
    raise ValueError(
      f'{leaf.name}: found a leaf of {len(place)} axes of slices and a grid of {grid.slices}, '
      'expected an allocation with the same: opq_jax.compress, or '
      'opq_jax.allocate(params, usage=opq_jax.usage(fn, params, *inputs))'
    )
  return jax.tree.map(lambda array: array[place], grid) if place else grid


def _whole_state(leaf: LeafToCode, parts: list[_Coded]) -> LeafState | None:
  """Returns the state of a leaf, from those of its slices."""
  if leaf.grid is None or not parts[0].place:
    return parts[0].state if parts else None
  in_order = [part.state for part in sorted(parts, key=lambda part: part.place)]
  shape = leaf.weights.shape[: len(parts[0].place)]
  return jax.tree.map(lambda *arrays: stack_slices(arrays, shape), *in_order)


@functools.partial(jax.jit, static_argnums=0)
def _moments(
  reading: Reading, inputs: Array, other_inputs: Array | None = None
) -> Float32[Array, '*slices groups K K']:
  return mean_of(sums_of(reading, inputs, other_inputs))
