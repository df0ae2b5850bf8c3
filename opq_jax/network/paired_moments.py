"""Moments of what the layers of a block read, in the float network and in the compressed one.

Leaves that read the same rows are a stage.  The inputs of a stage depend on the leaves of the
stages before it only, so the codes of a block are chosen stage after stage, and a stage's moments
are sums over batches of calibration inputs: one batch is in memory at a time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.network.interpreter import Interpreter, Product
from opq_jax.network.moment_sums import mean_of
from opq_jax.network.products import Sums, inputs_of, reading_of, sums_of
from opq_jax.network.side_by_side import SideBySide
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
  """

  moments: Float32[Array, 'groups K K']
  cross_moments: Float32[Array, 'groups K K']
  rows: Float32[Array, '']

  def means(self) -> 'PairedSums':
    """Returns sums over their number of rows."""
    mean = lambda total: mean_of(Sums(total, self.rows))
    return PairedSums(mean(self.moments), mean(self.cross_moments), jnp.float32(1))


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
  """Computes both networks up to a stage, and the sums over what it reads."""

  def __init__(self, first: PyTree, second: PyTree, leaf: int):
    super().__init__(first, second, [True] * len(first))
    self._leaf_of_stage = leaf
    self.sums: PairedSums | None = None

  def product(self, product: Product) -> None:
    if product.view.leaf != self._leaf_of_stage:
      return
    reading, content = reading_of(product), product.values[1 - product.operand].content
    x, other = content.first, content.of_second()
    moments, rows = sums_of(reading, other)
    cross_moments = sums_of(reading, other, x).total
    self.sums = PairedSums(moments, cross_moments, jnp.float32(rows))
    raise _Reached


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
    jax.tree.leaves(params), jax.tree.leaves(compressed), names.index(stage.leaves[0])
  )
  with contextlib.suppress(_Reached):
    walk.run(closed, (inputs, *shared), (compressed_inputs,))
  assert walk.sums is not None
  return walk.sums


def sum_of_batches(sums: Iterable[PairedSums]) -> PairedSums:
  """Returns the sums over several batches."""
  return functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), sums)
