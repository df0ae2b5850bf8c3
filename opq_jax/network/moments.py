"""The second moments of each layer's inputs, from calibration inputs or without any data.

A layer's output is y = x W, row by row of x: a token, an example, a window of a convolution.  Under
other weights Q, its squared error depends on the inputs by one matrix alone,

    E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))          H = E[x^T x]

and this matrix is all that error feedback (`opq_jax.encoders.Feedback`) needs to know.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jaxtyping import Array, Float32

from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.network import views
from opq_jax.network.batch_mode import on_batch_statistics
from opq_jax.network.interpreter import Interpreter, Product, Value, evaluated, scan_operands
from opq_jax.network.products import Sums, order_of, reading_of, sums_of
from opq_jax.network.uses import arguments, leading_slices, rows_key, traced, use_of

_MAX_NAMED = 10  # leaves that a warning lists


@flax.struct.dataclass
class InputMoments:
  """Second moments of the inputs of one leaf.

  Attributes:
    matrix: H = E[x^T x] of every slice and group.  A row x holds the K numbers that one output is
      a weighted sum of, in the order of the leaf's axes.
    inputs: axes of the leaf that a product sums over: K is the product of their lengths.
    slices: how many leading axes of the leaf count slices.
  """

  matrix: Float32[Array, '*slices groups K K']
  inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
  slices: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class _Measured:
  """Matrices, and which leaf has which: leaves that read the same rows share one.

  Attributes:
    matrices: every one once.
    leaves: of every leaf, the number of its matrix, its inputs and slices; or None.
    unmeasured: numbers of the leaves that are multiplied and have no moments all the same.
  """

  matrices: list[Array]
  leaves: tuple[tuple[int, tuple[int, ...], int] | None, ...] = flax.struct.field(pytree_node=False)
  unmeasured: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


def second_moments(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> PyTree:
  """Returns the second moments H = E[x^T x] of the inputs of every leaf that is multiplied.

  The jaxpr of `fn` is walked with the leaf that each value comes from, so any function that JAX can
  trace will do: dense layers, attention, einsum, convolutions (also grouped, dilated, transposed),
  scan, remat, recurrent cells.  The expectation is over all rows that a leaf is multiplied with:
  examples, tokens, places of a window with the zeros that it sees beyond the border, and steps of
  a loop in which the leaf stays the same.  The layers of a scan and batched experts are slices, and
  each has a matrix of its own.

  A Linen network with BatchNorm runs on batch statistics, as in
  `opq_jax.correction.correct_batch_norm`: then every layer sees, per channel, the first two moments
  that it had in training, even if the inputs are noise.  Noise does not know how channels and
  neighbours go together; `opq_jax.correction.natural_noise` knows it of the neighbours, and
  `opq_jax.correction.synthetic_inputs` knows much of both.

  Args:
    fn: called as `fn(params, *inputs)`.  `model.apply` of a Flax Linen module whose variables hold
      `batch_stats` is called such that BatchNorm runs on the batch
      (`opq_jax.network.on_batch_statistics`).  Compiled once for each such function.
    params: the parameters, or variables, of the network.
    inputs: calibration inputs, any pytrees of arrays, or PRNG keys: prepared as the network expects
      them, or synthetic, or noise.

  Returns:
    The tree of the parameters with an `InputMoments` at every leaf of a dot or a convolution, and
    None elsewhere: at leaves that are looked up or taken part in elementwise, and where arithmetic,
    a cut or a `shard_map` lies between the leaf and its product (`opq_jax.usage` names these).

  Raises:
    ValueError: a leaf is no array; Linen's BatchNorm cannot be told to run on the batch.

  Warns:
    UserWarning: leaves that are multiplied and have no moments, by name.

  >>> import flax.linen as nn
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(3, name='head')(x)
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> variables = Network().init(jax.random.key(0), x)
  >>> second_moments(Network().apply, variables, x)['params']['head']['kernel'].matrix.tolist()
  [[[5.0, 1.0], [1.0, 2.0]]]
  """
  return _tree_of(params, _measured(fn, params, *inputs))


def mean_moments(fn: Callable[..., Any], params: PyTree, batches: Iterable[Any]) -> PyTree:
  """Returns the second moments over several batches of one size: the mean of `second_moments`.

  Args:
    fn, params: as for `second_moments`.
    batches: the inputs of each call; a tuple is several arguments.

  Raises:
    ValueError: as `second_moments`, or there is no batch.
  """
  total, count = None, 0
  for batch in batches:
    inputs = batch if type(batch) is tuple else (batch,)
    measured = _measured(fn, params, *inputs)
    total = measured if total is None else _sum(total, measured)
    count += 1
  if total is None:
    raise ValueError('batches: found none, expected at least one')
  return _tree_of(params, _divided(total, count))


def _tree_of(params: PyTree, measured: _Measured) -> PyTree:
  """Returns the moments as a tree, and names the leaves that ought to have some and have none."""
  if measured.unmeasured:
    names = list(trees.named_leaves(params))
    unmeasured = [names[number] for number in measured.unmeasured]
    more = f' and {len(unmeasured) - _MAX_NAMED} more' if len(unmeasured) > _MAX_NAMED else ''
    messages.warn(
      f'{", ".join(unmeasured[:_MAX_NAMED])}{more}: found leaves that are multiplied behind '
      'arithmetic, a cut or a computed index, or along several axes: they have no moments, and '
      'get plain codes (opq_jax.usage shows their uses)'
    )
  found = [
    None if entry is None else InputMoments(measured.matrices[entry[0]], *entry[1:])
    for entry in measured.leaves
  ]
  return jax.tree.unflatten(jax.tree.structure(params), found)


@functools.partial(jax.jit, donate_argnums=0)
def _sum(one: _Measured, other: _Measured) -> _Measured:
  return jax.tree.map(jnp.add, one, other)


@functools.partial(jax.jit, donate_argnums=0)
def _divided(total: _Measured, count: Array) -> _Measured:
  return jax.tree.map(lambda matrix: matrix / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _measured(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> _Measured:
  leaves = jax.tree.leaves(params)
  closed = traced(on_batch_statistics(fn, params), params, *inputs)
  walk = _Moments(len(leaves))
  contents = [*leaves, *jax.tree.leaves(inputs)]
  walk.walk(
    closed.jaxpr, walk.constants(closed), arguments(walk, closed, len(leaves), contents), ()
  )
  return walk.measured()


class _Rows(NamedTuple):
  """Rows that one or more leaves are multiplied with.

  Attributes:
    key: equal for products of the same rows.
    inputs: axes that a leaf's product sums over.
    slices: leading axes of the leaf that count slices; those of a scan come first.
  """

  key: Any
  inputs: tuple[int, ...]
  slices: int


class _Moments(Interpreter):
  """Computes a network, and sums x^T x on the way.

  Args:
    leaves: how many leaves the parameters have.
    outer: the walk around this one, where this is the walk of a loop's body.
  """

  def __init__(self, leaves: int, outer: '_Moments | None' = None):
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
    self._readings[view.leaf].append(_Rows(key, use.inputs, len(use.slices)))

  def measured(self) -> _Measured:
    """Returns the moments of all leaves."""
    numbers: dict[Any, int] = {}
    matrices: list[Array] = []
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
        matrices.append(mean_of(functools.reduce(_plus, (self._sums[key] for key in keys))))
      leaves.append((numbers[keys], *layouts.pop()))
    return _Measured(matrices, tuple(leaves), tuple(unmeasured))

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
      inner = _Moments(len(self._readings), self)
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
    inner = walks[-1]
    for key, of_steps in zip(inner._sums, sums, strict=True):
      self._sums['steps', key] = of_steps
      self._sums['all', key] = jax.tree.map(lambda x: jnp.sum(x, axis=0), of_steps)
    self._adopt(inner, lambda leaf, key: ('steps' if leaf in stacked else 'all', key))
    return [*carry, *parts]

  def _while(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> Sequence[Any]:
    parameters = equation.params
    of_test, of_body = parameters['cond_nconsts'], parameters['body_nconsts']
    first = of_test + of_body
    test = jex.jaxpr_as_fun(parameters['cond_jaxpr'])
    test_constants = [value.content for value in values[:of_test]]
    walks = []

    def step(carry: list[Any]) -> tuple[list[Any], list[Sums]]:
      inner = _Moments(len(self._readings), self)
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
    self._sums.update(zip(walks[-1]._sums, sums, strict=True))
    self._adopt(walks[-1], lambda leaf, key: key)
    return results

  def _cond(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> Sequence[Any]:
    bodies = equation.params['branches']
    walks: dict[int, _Moments] = {}

    def branch(number: int, contents: list[Any]) -> tuple[list[Any], list[Sums]]:
      walks[number] = inner = _Moments(len(self._readings), self)
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
      self._sums.update(zip(walks[number]._sums, of_branch, strict=True))
      self._adopt(walks[number], lambda leaf, key: key)
    return results

  def contents_of(self, body: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Any]:
    """Returns the contents of the results of a loop's body."""
    results = self.walk(body.jaxpr, self.constants(body), values, where)
    return [result.content for result in results]

  def _adopt(self, inner: '_Moments', key_of: Callable[[int, Any], Any]) -> None:
    """Takes the readings of an inner walk, under other keys."""
    self._refused |= inner._refused
    for leaf, readings in enumerate(inner._readings):
      self._readings[leaf] += [r._replace(key=key_of(leaf, r.key)) for r in readings]


def mean_of(sums: Sums) -> Float32[Array, '*slices groups K K']:
  """Returns the moments of rows; 0 without rows, as in a branch that was not taken."""
  rows = jnp.maximum(jnp.asarray(sums.rows, jnp.float32), 1)
  return sums.total / rows.reshape(rows.shape + (1,) * (sums.total.ndim - rows.ndim))


def _plus(one: Sums, other: Sums) -> Sums:
  return Sums(one.total + other.total, one.rows + other.rows)
