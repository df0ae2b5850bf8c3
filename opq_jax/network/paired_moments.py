"""Moments of what the layers of a block read, in the float network and in the compressed one.

Where the outputs of a layer are added to hidden states, as at the end of attention and of a
perceptron, also what the leaves before have done to these: the layer can make good a part of it.

Leaves that read the same rows are a stage.  The inputs of a stage depend on the leaves of the
stages before it only, so the codes of a block are chosen stage after stage, and a stage's moments
are sums over batches of calibration inputs: one batch is in memory at a time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.network import views
from opq_jax.network.interpreter import Interpreter, Product, Value, evaluated
from opq_jax.network.moment_sums import mean_of
from opq_jax.network.products import Sums, inputs_of, reading_of, sums_of
from opq_jax.network.side_by_side import Both, SideBySide
from opq_jax.network.uses import arguments, rows_key, traced, usage_in


class Stage(NamedTuple):
  """Leaves that are multiplied with the same rows.

  Attributes:
    leaves: their paths.
    inputs: axes of each over which a product sums.
  """

  leaves: tuple[str, ...]
  inputs: tuple[tuple[int, ...], ...]


@flax.struct.dataclass
class PairedSums:
  """Sums over the rows that a stage reads: x in the float network, x' in the compressed one.

  Attributes:
    moments: sum of x'^T x'.
    cross_moments: sum of x'^T x.
    rows: their number.
    residual: sum of x'^T (r - r'), in the shape of the leaf, with r and r' what the outputs of the
      one leaf of a stage are added to; None of several leaves, and where they are not added.
  """

  moments: Float32[Array, 'groups K K']
  cross_moments: Float32[Array, 'groups K K']
  rows: Float32[Array, '']
  residual: Float32[Array, '...'] | None = None

  def means(self) -> 'PairedSums':
    """Returns sums over their number of rows."""
    mean = lambda total: mean_of(Sums(total, self.rows))
    residual = None if self.residual is None else self.residual / self.rows
    return PairedSums(mean(self.moments), mean(self.cross_moments), jnp.float32(1), residual)


class _Stages(Interpreter):
  """Collects stages in the order in which a function reaches them."""

  def __init__(self, is_single: list[bool]):
    super().__init__()
    self._is_single = is_single
    self.found: dict[Any, list[tuple[int, tuple[int, ...]]]] = {}

  def product(self, product: Product) -> None:
    leaf = product.view.leaf
    if self._is_single[leaf]:
      self.found.setdefault(rows_key(product), []).append((leaf, inputs_of(reading_of(product))))


def stages(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> list[Stage]:
  """Returns the stages of a function, in the order in which it reaches them.

  In a stage are the leaves that one dot or convolution uses, whole, with their own numbers, and
  nothing else.  A leaf of another use (biases, norms, look-ups, stacks of slices) is in no stage.

  Args:
    fn: called as `fn(params, *inputs)`.
    params: arrays, or `jax.ShapeDtypeStruct`s.
    inputs: any pytrees of arrays or shapes.

  >>> def block(params, x):
  ...   return jax.nn.relu(x @ params['gate']) * (x @ params['up']) @ params['down']
  >>> shape = jax.ShapeDtypeStruct
  >>> params = {'gate': shape((4, 8), 'float32'), 'up': shape((4, 8), 'float32'),
  ...           'down': shape((8, 4), 'float32')}
  >>> [stage.leaves for stage in stages(block, params, shape((2, 4), 'float32'))]
  [('gate', 'up'), ('down',)]
  """
  closed = traced(fn, params, *inputs)
  names = list(trees.named_leaves(params))
  walk = _Stages([_is_single(leaf) for leaf in usage_in(closed, params)])
  walk.walk(closed.jaxpr, walk.constants(closed), arguments(walk, closed, len(names)), ())
  return [
    Stage(tuple(names[leaf] for leaf, _ in found), tuple(inputs for _, inputs in found))
    for found in walk.found.values()
  ]


def _is_single(leaf: Any) -> bool:
  """Returns whether one product uses a leaf, whole, and nothing else does."""
  use = leaf.product
  return (
    len(leaf.uses) == 1
    and use is not None
    and use.kind in ('dot', 'convolution')
    and use.is_exact
    and not use.slices
    and not use.where
  )


class _Reached(Exception):
  """Ends a walk: all after the stage is not computed."""


class _StageSums(SideBySide):
  """Computes both networks up to a stage, and on to what its outputs are added to.

  Attributes:
    sums: what is found; None before the stage is reached.

  Args:
    first, second: leaves of either network.
    leaf: the first one of the stage.
    is_alone: whether it is the only one.
  """

  def __init__(self, first: PyTree, second: PyTree, leaf: int, is_alone: bool):
    super().__init__(first, second, [True] * len(first))
    self._leaf_of_stage, self._is_alone = leaf, is_alone
    self.sums: PairedSums | None = None
    # the leaf as its product sees it, and the operations from there to what is followed
    self._operand: Both | None = None
    self._followed: Both | None = None
    self._steps: list[Callable[[Any], Any]] = []

  def product(self, product: Product) -> None:
    if product.view.leaf != self._leaf_of_stage:
      return
    reading, content = reading_of(product), product.values[1 - product.operand].content
    x, other = content.first, content.of_second()
    moments, rows = sums_of(reading, other)
    cross_moments = sums_of(reading, other, x).total
    self.sums = PairedSums(moments, cross_moments, jnp.float32(rows))
    if not self._is_alone:
      raise _Reached
    self._operand = self._followed = product.values[product.operand].content

  def compute(self, equation: Any, values: Sequence[Value]) -> Sequence[Both]:
    places = [i for i, value in enumerate(values) if value.content is self._followed]
    if self._followed is None or not places:
      return super().compute(equation, values)
    place, name = places[0], equation.primitive.name
    if name == 'add' and len(places) == 1:
      other = values[1 - place]
      if other.is_data and other.shape == values[place].shape:
        self._add_residual(other.content)
        raise _Reached
      # else a bias: outputs are followed beyond it
    elif self._steps and not (
      name in views.SAME_NUMBERS or (name in views.LAYOUT and len(values) == 1)
    ):
      raise _Reached  # a nonlinearity, say
    self._steps.append(functools.partial(_step, equation, values, place))
    results = super().compute(equation, values)
    self._followed = results[0]
    return results

  def _add_residual(self, added: Both) -> None:
    """Adds x'^T (r - r') to the sums: the gradient of <y, r - r'> in the leaf, as y = x' W."""
    assert self.sums is not None and self._operand is not None
    number, operand = self._leaf_of_stage, self._operand

    def outputs(leaf: Array) -> Array:
      # the way from the leaf to its product reads it from `second`
      kept, self.second[number] = self.second[number], leaf
      value = operand.of_second()
      self.second[number] = kept
      for step in self._steps:
        value = step(value)
      return value

    _, transposed = jax.vjp(outputs, self.second[number])
    self.sums = self.sums.replace(residual=transposed(added.first - added.of_second())[0])  # type: ignore[attr-defined]


def _step(equation: Any, values: Sequence[Value], place: int, value: Any) -> Any:
  """Computes an operation in the compressed network, with another value of one operand."""
  contents = [other.content.of_second() if i != place else value for i, other in enumerate(values)]
  return evaluated(equation, contents)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def stage_sums(
  fn: Callable[..., Any],
  stage: Stage,
  params: PyTree,
  compressed: PyTree,
  inputs: PyTree,
  compressed_inputs: PyTree,
  shared: tuple[Any, ...] = (),
) -> PairedSums:
  """Returns the sums over the rows that a stage reads in both networks, on one batch.

  Compiled once for all blocks that are alike.

  Args:
    fn: called as `fn(params, inputs, *shared)`.
    stage: from `stages`.
    params, compressed: the leaves of either network; the stages before this one are compressed.
    inputs, compressed_inputs: what either network calls the block with.
    shared: further arguments, the same for both.
  """
  closed = traced(fn, params, inputs, *shared)
  names = list(trees.named_leaves(params))
  walk = _StageSums(
    jax.tree.leaves(params),
    jax.tree.leaves(compressed),
    names.index(stage.leaves[0]),
    len(stage.leaves) == 1,
  )
  with contextlib.suppress(_Reached):
    walk.run(closed, (inputs, *shared), (compressed_inputs,))
  assert walk.sums is not None
  return walk.sums


def sum_of_batches(sums: Iterable[PairedSums]) -> PairedSums:
  """Returns the sums over several batches."""
  return functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), sums)
