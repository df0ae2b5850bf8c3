"""Two networks that are computed together: the float one, and one whose leaves change on the way.

Operation after operation, both are computed on the same inputs.  Just before a leaf is used, it may
be replaced in the other network, given what either network multiplies it with or adds it to.  The
steps of a scan run one after the other, and so do the layers of a stack.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from opq_jax.network import views
from opq_jax.network.interpreter import Interpreter, Product, Value, evaluated, scan_operands
from opq_jax.network.products import Reading, reading_of
from opq_jax.network.uses import LeafUsage, Use, arguments, use_of


class Both(NamedTuple):
  """A value in either network.

  Attributes:
    first: in the float network.
    second: returns it in the other; None where it is the same.  A function, because a leaf that
      goes through reshapes and conversions is replaced after them, where it is used.
  """

  first: Any
  second: Callable[[], Any] | None

  def of_second(self) -> Any:
    """Returns the value in the other network."""
    return self.first if self.second is None else self.second()


class SideBySide(Interpreter):
  """Walks a function with the leaves of two networks.

  Attributes:
    first: leaves of the float network, in flattening order.
    second: leaves of the other network.  `product`, which subclasses override, may replace them
      just before they are used.

  Args:
    first, second: as above.
    differs: which leaves are, or become, different.
  """

  def __init__(self, first: Sequence[Any], second: Sequence[Any], differs: Sequence[bool]):
    super().__init__()
    self.first, self.second = list(first), list(second)
    self._differs = differs

  def run(self, closed: Any, inputs: Sequence[Any], other_inputs: Sequence[Any] = ()) -> None:
    """Computes both networks, not compiled: leaves change on the way.

    Args:
      closed: the jaxpr of `fn(params, *inputs)`, from `opq_jax.network.uses.traced`.
      inputs: of the networks.
      other_inputs: the first of those of the other network, where it has inputs of its own.
    """
    leaves, others = jax.tree.leaves(inputs), jax.tree.leaves(other_inputs)
    contents = [
      *map(self._leaf, range(len(self.first))),
      *map(_both, leaves, others),
      *map(self.lift, leaves[len(others) :]),
    ]
    values = arguments(self, closed, len(self.first), contents)
    self.walk(closed.jaxpr, self.constants(closed), values, ())

  def _leaf(self, number: int) -> Both:
    second = functools.partial(self.second.__getitem__, number)
    return Both(self.first[number], second if self._differs[number] else None)

  def lift(self, content: Any) -> Both:
    return Both(content, None)

  def compute(self, equation: Any, values: Sequence[Value]) -> Sequence[Both]:
    contents = [value.content for value in values]
    first = evaluated(equation, [content.first for content in contents])
    if all(content.second is None for content in contents):
      return [Both(result, None) for result in first]
    if any(value.views for value in values) and not any(value.is_data for value in values):
      # on the way from a leaf: computed where it is used
      def later(number: int) -> Any:
        return evaluated(equation, [content.of_second() for content in contents])[number]

      return [Both(x, functools.partial(later, number)) for number, x in enumerate(first)]
    second = evaluated(equation, [content.of_second() for content in contents])
    return list(map(_both, first, second))

  def loop(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Value]:
    self.carried_leaves(equation, values, where)
    loops = {'scan': self._scan, 'while': self._while, 'cond': self._cond}
    name = equation.primitive.name
    contents = loops[name](equation, values, (*where, name))
    return self.results(equation, values, contents)

  def _scan(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Both]:
    parameters = equation.params
    constants, carried = scan_operands(equation)
    body, length = parameters['jaxpr'], parameters['length']
    carry = [value.content for value in values[constants:carried]]
    rows: list[list[Both]] = [[] for _ in range(length)]
    for step in range(length)[:: -1 if parameters['reverse'] else 1]:
      parts = [
        self.step_of(value, _part(value.content, step))._replace(
          views=tuple(views.picked(view, 0, step) for view in value.views)
        )
        for value in values[carried:]
      ]
      of_step = [*values[:constants], *map(self.carried, values[constants:carried], carry), *parts]
      results = self.walk(body.jaxpr, self.constants(body), of_step, where)
      contents = [result.content for result in results]
      carry, rows[step] = contents[: len(carry)], contents[len(carry) :]
    outputs = body.jaxpr.outvars[len(carry) :]
    return [
      *carry,
      *(
        _stacked([row[place] for row in rows], output.aval) for place, output in enumerate(outputs)
      ),
    ]

  def _while(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Both]:
    parameters = equation.params
    of_test, of_body = parameters['cond_nconsts'], parameters['body_nconsts']
    first = of_test + of_body
    test, body = jex.jaxpr_as_fun(parameters['cond_jaxpr']), parameters['body_jaxpr']
    constants = [value.content.first for value in values[:of_test]]
    carry = [value.content for value in values[first:]]
    # the float network decides how often: layers of both must be reached together
    while test(*constants, *(content.first for content in carry))[0]:
      of_step = [*values[of_test:first], *map(self.carried, values[first:], carry)]
      results = self.walk(body.jaxpr, self.constants(body), of_step, where)
      carry = [result.content for result in results]
    return carry

  def _cond(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Both]:
    branches = equation.params['branches']
    # the float network decides, as in a loop
    taken = min(max(int(values[0].content.first), 0), len(branches) - 1)
    body = branches[taken]
    results = self.walk(body.jaxpr, self.constants(body), list(values[1:]), where)
    return [result.content for result in results]


class Reached(NamedTuple):
  """A leaf that is used for the first time, or one slice of it.

  Attributes:
    leaf: its number.
    place: index of the slice; () where the whole leaf is used.
    reading: how the operation reads its rows, where it alone uses the leaf, each slice once; else
      None.
    use: what it does with the leaf.
    first_inputs, second_inputs: what the leaf is multiplied with in either network.
  """

  leaf: int
  place: tuple[int, ...]
  reading: Reading | None = None
  use: Use | None = None
  first_inputs: Array | None = None
  second_inputs: Array | None = None


class Replacing(SideBySide):
  """Replaces each leaf of the other network once, or once for each slice, where it is first used.

  Args:
    leaves: of the float network.
    used: how the function uses them.
    replaced: which leaves are replaced.
    replace: returns the new leaf, or its slice.
  """

  def __init__(
    self,
    leaves: Sequence[Any],
    used: Sequence[LeafUsage],
    replaced: Sequence[bool],
    replace: Callable[[Reached], Array],
  ):
    super().__init__(leaves, leaves, replaced)
    self._replaced, self._replace = replaced, replace
    self._single = [_is_single_product(leaf) for leaf in used]
    # slices that have been replaced; () is the whole leaf
    self._done: list[set[tuple[int, ...]]] = [set() for _ in leaves]
    # leaves whose slices are being replaced, by number
    self._stacks: dict[int, np.ndarray] = {}

  def product(self, product: Product) -> None:
    view = product.view
    number = view.leaf
    if not self._replaced[number] or () in self._done[number]:
      return
    if not self._single[number]:
      self._put(Reached(number, ()))
    elif view.indices not in self._done[number]:
      other = product.values[1 - product.operand].content
      inputs = other.first, other.of_second()
      self._put(Reached(number, view.indices, reading_of(product), use_of(product), *inputs))

  def finish(self) -> None:
    """Replaces leaves that nothing has used, and slices of a branch that was not taken."""
    for number, is_replaced in enumerate(self._replaced):
      done = self._done[number]
      if is_replaced and not done:
        self._put(Reached(number, ()))
      elif done and () not in done:
        picked = np.shape(self.first[number])[: len(next(iter(done)))]
        for place in np.ndindex(*picked):
          if place not in done:
            self._put(Reached(number, place))
    for number, stack in self._stacks.items():
      self.second[number] = jnp.asarray(stack)

  def _put(self, reached: Reached) -> None:
    self._done[reached.leaf].add(reached.place)
    new, number = self._replace(reached), reached.leaf
    if not reached.place:
      self.second[number] = new
      return
    # in place, since a copy of the whole stack for every slice takes the square of their number.  A
    # slice has its new values before it is read, and keeps them
    if number not in self._stacks:
      self.second[number] = self._stacks[number] = np.array(self.second[number])
    self._stacks[number][reached.place] = np.asarray(new)


def _is_single_product(leaf: LeafUsage) -> bool:
  """Returns whether products alone use a leaf, each slice once, with its own numbers."""
  for use in leaf.uses:
    if use.kind not in ('dot', 'convolution') or not use.is_exact or not use.outputs:
      return False
    if leaf.slices != len(use.slices) or views.DYNAMIC in use.indices or 'while' in use.where:
      return False
    # each step of a scan reads a slice of its own
    if use.where.count('scan') > use.indices.count(views.STEP):
      return False
  indices = [use.indices for use in leaf.uses]
  return len(indices) == 1 or (
    len(set(indices)) == len(indices) and all(views.STEP not in index for index in indices)
  )


def _both(first: Any, second: Any) -> Both:
  return Both(first, functools.partial(_same, second))


def _same(value: Any) -> Any:
  return value


def _part(content: Both, step: int) -> Both:
  second = content.second
  return Both(content.first[step], None if second is None else lambda: second()[step])


def _stacked(parts: list[Both], aval: Any) -> Both:
  """Returns the results of all steps of a scan as one array."""
  if not parts:
    return Both(jnp.zeros(aval.shape, aval.dtype), None)
  first = jnp.stack([part.first for part in parts])
  if all(part.second is None for part in parts):
    return Both(first, None)
  second = jnp.stack([part.of_second() for part in parts])
  return _both(first, second)
