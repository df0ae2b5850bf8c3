"""Sums x^T x over the rows that each leaf is multiplied with, while a network is computed.

The walk is traced like the network itself.  The body of a loop is walked within JAX's own loop,
whose results then hold the sums too: of each step for the layers of a scan, of all steps together
for a leaf that stays the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jaxtyping import Array, Float32

from opq_jax.network import views
from opq_jax.network.interpreter import Interpreter, Product, Value, evaluated, scan_operands
from opq_jax.network.products import Sums, inputs_of, order_of, reading_of, sums_of
from opq_jax.network.uses import leading_slices, rows_key, use_of


@flax.struct.dataclass
class Measured:
  """Matrices, and which leaf has which: leaves that read the same rows share one.

  Attributes:
    matrices: every one once.
    rows: the least number of rows that a slice of each is a mean of.
    leaves: of every leaf, the number of its matrix, its inputs and slices; or None.
    unmeasured: numbers of the leaves that are multiplied and have no moments all the same.
  """

  matrices: list[Array]
  rows: list[Any]
  leaves: tuple[tuple[int, tuple[int, ...], int] | None, ...] = flax.struct.field(pytree_node=False)
  unmeasured: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


class _Rows(NamedTuple):
  """Rows that one or more leaves are multiplied with.

  Attributes:
    key: equal for products of the same rows.
    inputs: axes that a leaf's product sums over, in the order of K.
    slices: leading axes of the leaf that count slices; those of a scan come first.
  """

  key: Any
  inputs: tuple[int, ...]
  slices: int


class MomentSums(Interpreter):
  """Computes a network, and sums x^T x on the way.

  Args:
    leaves: how many leaves the parameters have.
    outer: the walk around this one, where this is the walk of a loop's body.
  """

  def __init__(self, leaves: int, outer: 'MomentSums | None' = None):
    super().__init__(outer)
    # x^T x and the number of rows, of all readings of this walk
    self._sums: dict[Any, Sums] = {}
    self._readings: list[list[_Rows]] = [[] for _ in range(leaves)]
    self._refused: set[int] = set()

  def lift(self, content: Any) -> Any:
    return content

  def compute(self, equation: Any, values: Sequence[Value]) -> Sequence[Any]:
    return evaluated(equation, [value.content for value in values])

  def product(self, product: Product) -> None:
    use, view = use_of(product), product.view
    if use.kind not in ('dot', 'convolution'):
      return
    # slices that a dynamic index picks are not known before the network runs
    is_known = use.is_exact and views.DYNAMIC not in view.indices
    if not is_known or leading_slices([use]) != len(use.slices) or not use.outputs:
      self._refused.add(view.leaf)
      return
    indices = [index for index in view.indices if index != views.STEP]
    reading = reading_of(product)
    key = rows_key(product), order_of(reading), tuple(indices)
    if key not in self._sums:
      total, rows = sums_of(reading, product.values[1 - product.operand].content)
      sums = Sums(total, jnp.float32(rows))
      for index, factor in zip(indices[::-1], view.picked[::-1], strict=False):
        zeros = jax.tree.map(lambda x, size=factor.size: jnp.zeros((size, *x.shape)), sums)
        sums = jax.tree.map(lambda all_, one, at=index: all_.at[at].set(one), zeros, sums)
      self._sums[key] = sums
    self._readings[view.leaf].append(_Rows(key, inputs_of(reading), len(use.slices)))

  def measured(self) -> Measured:
    """Returns the moments of all leaves."""
    numbers: dict[Any, int] = {}
    matrices: list[Array] = []
    rows: list[Any] = []
    leaves: list[tuple[int, tuple[int, ...], int] | None] = []
    unmeasured: list[int] = []
    for leaf, readings in enumerate(self._readings):
      layouts = {(reading.inputs, reading.slices) for reading in readings}
      if len(layouts) != 1 or leaf in self._refused:
        if layouts or leaf in self._refused:
          unmeasured.append(leaf)
        leaves.append(None)
        continue
      keys = tuple(reading.key for reading in readings)
      if keys not in numbers:
        numbers[keys] = len(matrices)
        sums = functools.reduce(_plus, (self._sums[key] for key in keys))
        matrices.append(mean_of(sums))
        rows.append(jnp.min(jnp.asarray(sums.rows, jnp.float32)))
      leaves.append((numbers[keys], *layouts.pop()))
    return Measured(matrices, rows, tuple(leaves), tuple(unmeasured))

  def loop(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Value]:
    name = equation.primitive.name
    walks = {'scan': self._scan, 'while': self._while, 'cond': self._cond}
    contents = walks[name](equation, values, (*where, name))
    self.carried_leaves(equation, values, where)
    return self.results(equation, values, contents)

  def _scan(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> Sequence[Any]:
    parameters = equation.params
    constants, carried = scan_operands(equation)
    walks = []

    def step(carry: list[Any], parts: list[Any]) -> tuple[list[Any], Any]:
      inner = MomentSums(len(self._readings), self)
      arguments = [
        *values[:constants],
        *map(self.carried, values[constants:carried], carry),
        *map(self.step_of, values[carried:], parts),
      ]
      results = inner.contents_of(parameters['jaxpr'], arguments, where)
      walks.append(inner)
      count = carried - constants
      return results[:count], (results[count:], list(inner._sums.values()))

    contents = [value.content for value in values]
    carry, (parts, sums) = lax.scan(
      step,
      contents[constants:carried],
      contents[carried:],
      length=parameters['length'],
      reverse=parameters['reverse'],
    )
    # a leaf that the scan runs over has the moments of each step; all other leaves the sums
    stacked = {view.leaf for value in values[carried:] for view in value.views}
    inner, place = walks[-1], self.fresh()
    for key, of_steps in zip(inner._sums, sums, strict=True):
      self._sums[place, 'steps', key] = of_steps
      self._sums[place, 'all', key] = jax.tree.map(lambda x: jnp.sum(x, axis=0), of_steps)
    self._adopt(inner, lambda leaf, key: (place, 'steps' if leaf in stacked else 'all', key))
    return [*carry, *parts]

  def _while(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> Sequence[Any]:
    parameters = equation.params
    of_test, of_body = parameters['cond_nconsts'], parameters['body_nconsts']
    first = of_test + of_body
    test = jex.jaxpr_as_fun(parameters['cond_jaxpr'])
    test_constants = [value.content for value in values[:of_test]]
    walks = []

    def step(carry: list[Any]) -> tuple[list[Any], list[Sums]]:
      inner = MomentSums(len(self._readings), self)
      arguments = [*values[of_test:first], *map(self.carried, values[first:], carry)]
      results = inner.contents_of(parameters['body_jaxpr'], arguments, where)
      walks.append(inner)
      return results, list(inner._sums.values())

    start = [value.content for value in values[first:]]
    _, shapes = jax.eval_shape(step, start)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def next_state(state: tuple[list[Any], list[Sums]]) -> tuple[list[Any], list[Sums]]:
      results, sums = step(state[0])
      return results, jax.tree.map(jnp.add, state[1], sums)

    results, sums = lax.while_loop(
      lambda state: test(*test_constants, *state[0])[0], next_state, (start, zeros)
    )
    place = self.fresh()
    self._sums |= {(place, key): found for key, found in zip(walks[-1]._sums, sums, strict=True)}
    self._adopt(walks[-1], functools.partial(_keyed, place))
    return results

  def _cond(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> Sequence[Any]:
    bodies = equation.params['branches']
    walks: dict[int, MomentSums] = {}

    def branch(number: int, contents: list[Any]) -> tuple[list[Any], list[Sums]]:
      walks[number] = inner = MomentSums(len(self._readings), self)
      arguments = [v._replace(content=x) for v, x in zip(values[1:], contents, strict=True)]
      return inner.contents_of(bodies[number], arguments, where), list(inner._sums.values())

    contents = [value.content for value in values[1:]]
    shapes = [
      jax.eval_shape(functools.partial(branch, number), contents)[1]
      for number in range(len(bodies))
    ]

    # every branch gives the sums of all: its own, and zeros
    def with_zeros(number: int, contents: list[Any]) -> tuple[list[Any], list[list[Sums]]]:
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      results, zeros[number] = branch(number, contents)
      return results, zeros

    results, sums = lax.switch(
      values[0].content,
      [functools.partial(with_zeros, number) for number in range(len(bodies))],
      contents,
    )
    for number, of_branch in enumerate(sums):
      place, inner = self.fresh(), walks[number]
      self._sums |= {(place, key): found for key, found in zip(inner._sums, of_branch, strict=True)}
      self._adopt(inner, functools.partial(_keyed, place))
    return results

  def contents_of(self, body: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Any]:
    """Returns the contents of the results of a loop's body."""
    results = self.walk(body.jaxpr, self.constants(body), values, where)
    return [result.content for result in results]

  def _adopt(self, inner: 'MomentSums', key_of: Callable[[int, Any], Any]) -> None:
    """Takes the readings of an inner walk, under keys of their own.

    The same rows may be read before it, or in another branch, as often as that one is taken.
    """
    self._refused |= inner._refused
    for leaf, readings in enumerate(inner._readings):
      self._readings[leaf] += [r._replace(key=key_of(leaf, r.key)) for r in readings]


def _keyed(place: int, leaf: int, key: Any) -> Any:
  return place, key


def mean_of(sums: Sums) -> Float32[Array, '*slices groups K K']:
  """Returns the moments of rows; 0 without rows, as in a branch that was not taken."""
  rows = jnp.maximum(jnp.asarray(sums.rows, jnp.float32), 1)
  return sums.total / rows.reshape(rows.shape + (1,) * (sums.total.ndim - rows.ndim))


def _plus(one: Sums, other: Sums) -> Sums:
  return Sums(one.total + other.total, one.rows + other.rows)
