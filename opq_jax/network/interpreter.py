"""Walks the jaxpr of a function with the leaf that each value comes from.

A jaxpr is the list of operations that JAX records of a function.  The walk goes through it in
order, into the bodies of jit, remat, custom derivatives, scan, cond and while, and knows of every
value

  * through which leaf of the parameters it can be seen (`opq_jax.network.views`),
  * whether it depends on the inputs of the function: a kernel times a function of parameters is
    still a kernel, a kernel times activations is not,
  * a number that two values share if they are equal up to their dtype: so q, k and v are known to
    read the same activations.

At every product of a leaf with activations it calls `Interpreter.product`.  Subclasses give values
their contents: none (`opq_jax.network.uses`), those of one network
(`opq_jax.network.moment_sums`), or those of the float and of the compressed network
(`opq_jax.network.side_by_side`).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from opq_jax.network import views
from opq_jax.network.views import View

# code that is written for a platform
_KERNELS = frozenset(('pallas_call', 'ffi_call', 'custom_call', 'tpu_custom_call'))
_DATA = frozenset(('scan', 'while', 'cond', 'random_bits', 'random_unwrap', 'threefry2x32'))


class Value(NamedTuple):
  """A value of the walk.

  Attributes:
    shape, dtype: of the array.
    content: what the interpreter computes; None where it only looks.
    views: the leaves whose numbers it holds; of several, each fills a part of it.
    is_data: whether it depends on the inputs of the function.
    number: equal for values that are equal up to their dtype.
    layer: the leaf whose dot or convolution with data this is, up to its layout; else None.
  """

  shape: tuple[int, ...]
  dtype: Any
  content: Any
  views: tuple[View, ...]
  is_data: bool
  number: Any
  layer: int | None = None


class Product(NamedTuple):
  """A product of a leaf with another value, or another operation that a leaf takes part in.

  Attributes:
    equation: of the jaxpr.
    view: the leaf, as the operation sees it.
    operand: which operand the leaf is.
    values: all operands.
    where: the loops and branches around it, the outermost first.
  """

  equation: Any
  view: View
  operand: int
  values: Sequence[Value]
  where: tuple[str, ...]

  @property
  def operation(self) -> str:
    """The name of the operation."""
    return str(self.equation.primitive.name)


class Interpreter:
  """Walks a jaxpr.  The base class computes no contents."""

  def __init__(self, outer: 'Interpreter | None' = None):
    # numbers are of one sequence in all walks of a function
    self._fresh: Iterator[int] = outer._fresh if outer else itertools.count()
    self._known: dict[Any, Any] = outer._known if outer else {}

  def fresh(self) -> int:
    """Returns a number that no value has."""
    return next(self._fresh)

  # what subclasses override

  def compute(self, equation: Any, values: Sequence[Value]) -> Sequence[Any]:
    """Returns the contents of an operation's results."""
    return [None] * len(equation.outvars)

  def product(self, product: Product) -> None:
    """Receives every operation that uses a leaf, before it is computed."""

  def loop(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> list[Value]:
    """Walks a scan, while or cond that leaves go into, once."""
    results = self.results(equation, values, [None] * len(equation.outvars))
    for body, arguments in _bodies(self, equation, values):
      name = equation.primitive.name
      self.walk(body.jaxpr, self.constants(body), arguments, (*where, name))
    self.carried_leaves(equation, values, where)
    return results

  def carried_leaves(self, equation: Any, values: Sequence[Value], where: tuple[str, ...]) -> None:
    """Reports leaves that a loop carries from step to step: the walk does not follow them."""
    for operand in _carried(equation, values):
      for view in values[operand].views:
        self.product(Product(equation, view, operand, values, where))

  # the walk

  def constants(self, closed: Any) -> list[Value]:
    """Returns the values of the constants of a closed jaxpr; they count as data."""
    return [self.constant(value) for value in closed.consts]

  def constant(self, content: Any) -> Value:
    shape, dtype = jax.numpy.shape(content), jax.dtypes.result_type(content)
    return Value(shape, dtype, self.lift(content), (), bool(shape), self.fresh())

  def carried(self, value: Value, content: Any = None) -> Value:
    """Returns a value that a loop carries, as each step finds it."""
    return value._replace(views=(), is_data=True, number=self.fresh(), content=content)

  def step_of(self, value: Value, content: Any = None) -> Value:
    """Returns one step's part of a value that a scan runs over."""
    return Value(
      value.shape[1:],
      value.dtype,
      content,
      tuple(views.picked(view, 0, views.STEP) for view in value.views),
      value.is_data,
      self.fresh(),
    )

  def lift(self, content: Any) -> Any:
    """Returns the content of a constant."""
    return None

  def walk(
    self, jaxpr: Any, constants: Sequence[Value], arguments: Sequence[Value], where: tuple[str, ...]
  ) -> list[Value]:
    """Walks the equations of a jaxpr, and returns the values of its results."""
    environment: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
      if isinstance(atom, jex.Literal):
        number = 'literal', repr(atom)
        return Value(*_facts(atom), self.lift(atom.val), (), False, number)
      return environment[atom]

    environment.update(zip(jaxpr.constvars, constants, strict=True))
    environment.update(zip(jaxpr.invars, arguments, strict=True))
    last = _last_uses(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
      results = self._equation(equation, [read(atom) for atom in equation.invars], where)
      for variable, value in zip(equation.outvars, results, strict=True):
        environment[variable] = value
      # contents are freed as soon as nothing reads them again
      for variable in last[number]:
        environment.pop(variable, None)
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, equation: Any, values: list[Value], where: tuple[str, ...]) -> list[Value]:
    name = equation.primitive.name
    if any(value.views for value in values):
      inner = body_of(equation)
      if inner is not None:
        return self.walk(inner.jaxpr, self.constants(inner), values, where)
      branch = branch_of_platforms(equation)
      if branch is not None:
        return self.walk(branch.jaxpr, self.constants(branch), values[1:], where)
      if name in ('scan', 'while', 'cond'):
        return self.loop(equation, values, where)
      moved = _moved(equation, values)
      kept = {view.leaf for result in moved for view in result}
      for operand, value in enumerate(values):
        for view in value.views:
          if view.leaf not in kept:
            self.product(Product(equation, view, operand, values, where))
    else:
      moved = [()] * len(equation.outvars)
    results = self.results(equation, values, self.compute(equation, values))
    layer = None
    if name in views.SAME_NUMBERS or name in views.LAYOUT:
      layer = values[0].layer
    elif name in ('dot_general', 'conv_general_dilated') and results[0].is_data:
      layer = next((view.leaf for value in values for view in value.views), None)
    return [
      result._replace(views=tuple(seen), layer=layer)
      for result, seen in zip(results, moved, strict=True)
    ]

  def results(self, equation: Any, values: Sequence[Value], contents: Sequence[Any]) -> list[Value]:
    """Returns the values of an operation's results, as they are without a view of a leaf."""
    name = equation.primitive.name
    # random bits and what a loop has carried are no parameters either
    is_data = any(value.is_data for value in values) or name in _DATA
    numbers = [self.fresh() for _ in equation.outvars]
    if name in views.SAME_NUMBERS and len(values) == len(numbers):
      numbers = [value.number for value in values]
    elif name in views.LAYOUT and len(numbers) == 1:
      key = (name, *(value.number for value in values), str(equation.params), str(values[0].shape))
      numbers = [self._known.setdefault(key, numbers[0])]
    return [
      Value(*_facts(variable), content, (), is_data, number)
      for variable, content, number in zip(equation.outvars, contents, numbers, strict=True)
    ]


def _moved(equation: Any, values: Sequence[Value]) -> list[Sequence[View]]:
  """Returns the views that the results of an operation have."""
  name, parameters = equation.primitive.name, equation.params
  shapes = [_facts(variable)[0] for variable in equation.outvars]
  seen = [(place, view) for place, value in enumerate(values) for view in value.views]
  if name in views.SAME_NUMBERS and len(values) == len(shapes):
    return [value.views for value in values]
  if name == 'neg':
    return [values[0].views]
  if name == 'split':
    # parts of an axis, which are no kernels of their own
    return [[view._replace(is_exact=False) for _, view in seen] for _ in shapes]
  if name in views.LAYOUT:
    new = [views.through(name, parameters, view, values[at].shape, shapes[0]) for at, view in seen]
    return [[view for view in new if view is not None]]
  if name in views.ARITHMETIC and not any(value.is_data for value in values):
    if name in ('mul', 'div') and any(isinstance(atom, jex.Literal) for atom in equation.invars):
      # a constant factor changes neither inputs nor outputs
      return [[view for _, view in seen]]
    return [
      [
        view._replace(is_exact=False)
        for place, view in seen
        if values[place].shape == shapes[0] and not view.is_repeated
      ]
    ]
  return [()] * len(shapes)


def scan_operands(equation: Any) -> tuple[int, int]:
  """Returns where the operands of a scan that it carries begin, and those that it runs over.

  Told by their ranks, since JAX has had several names for the numbers of operands: a step finds
  what is run over without its first axis.
  """
  body = equation.params['jaxpr'].jaxpr

  def same_ranks(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    ranks = [len(_facts(atom)[0]) for atom in outer], [len(_facts(atom)[0]) for atom in inner]
    return sum(one == other for one, other in zip(*ranks, strict=True))

  carried = same_ranks(equation.invars, body.invars)
  return carried - same_ranks(equation.outvars, body.outvars), carried


def evaluated(equation: Any, contents: Sequence[Any]) -> Sequence[Any]:
  """Computes one equation of a jaxpr, as `jax.core.eval_jaxpr` does."""
  primitive, functions = equation.primitive, ()
  parameters = primitive.get_bind_params(equation.params)
  if isinstance(parameters, tuple):  # before JAX 0.9 functions were apart
    functions, parameters = parameters
  with equation.ctx.manager:
    result = primitive.bind(*functions, *contents, **parameters)
  return result if primitive.multiple_results else [result]


def _facts(atom: Any) -> tuple[tuple[int, ...], Any]:
  """Returns the shape and dtype of a variable or literal; tokens have neither."""
  return getattr(atom.aval, 'shape', ()), getattr(atom.aval, 'dtype', None)


def body_of(equation: Any) -> Any:
  """Returns the one body of jit, remat, custom derivatives and the like, closed, or None."""
  if equation.primitive.name in ('scan', 'while', 'cond', 'shard_map', 'pallas_call'):
    return None
  bodies = [
    value for value in equation.params.values() if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)
  ]
  if len(bodies) != 1:
    return None
  body = bodies[0]
  closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
  # the bodies of `lax.reduce` and `lax.reduce_window` have scalars in the places of arrays
  shapes = lambda atoms: [_facts(atom)[0] for atom in atoms]
  inner, outer = closed.jaxpr, equation
  fits = shapes(inner.invars) == shapes(outer.invars)
  return closed if fits and shapes(inner.outvars) == shapes(outer.outvars) else None


def branch_of_platforms(equation: Any) -> Any:
  """Returns the branch of a `lax.platform_dependent` that is walked; None of other equations.

  All branches compute the same.  The default one says it in JAX's own operations, as a rule, where
  a branch of one platform may be written for speed there: a depthwise convolution as shifted
  products, which nobody would know for one.  A default with a kernel of its own may not run here,
  and the branch of this platform takes its place.
  """
  platforms = equation.params.get('branches_platforms')
  if equation.primitive.name != 'cond' or platforms is None:
    return None
  branches = dict(zip(platforms, equation.params['branches'], strict=True))
  default = branches.pop(None, None)
  if default is not None and not _has_kernel(default.jaxpr):
    return default
  here = jax.default_backend()
  own = [branch for names, branch in branches.items() if here in names]
  return own[0] if own else default


def _has_kernel(jaxpr: Any) -> bool:
  """Returns whether a jaxpr calls code that is not JAX's own."""
  names = (equation.primitive.name for equation in jaxpr.eqns)
  inner = (body_of(equation) for equation in jaxpr.eqns)
  return any(name in _KERNELS for name in names) or any(
    _has_kernel(body.jaxpr) for body in inner if body is not None
  )


def _bodies(
  interpreter: Interpreter, equation: Any, values: Sequence[Value]
) -> list[tuple[Any, list[Value]]]:
  """Returns the bodies of a loop or of a branch, with the values that each is called with."""
  parameters = equation.params
  # what a loop carries changes from step to step: it is data where it is, or becomes, data
  match equation.primitive.name:
    case 'scan':
      constants, carried = scan_operands(equation)
      arguments = [
        *values[:constants],
        *(interpreter.carried(value) for value in values[constants:carried]),
        *(interpreter.step_of(value) for value in values[carried:]),
      ]
      return [(parameters['jaxpr'], arguments)]
    case 'while':
      of_test, of_body = parameters['cond_nconsts'], parameters['body_nconsts']
      carry = [interpreter.carried(value) for value in values[of_test + of_body :]]
      return [
        (parameters['cond_jaxpr'], [*values[:of_test], *carry]),
        (parameters['body_jaxpr'], [*values[of_test : of_test + of_body], *carry]),
      ]
    case 'cond':
      return [(branch, list(values[1:])) for branch in parameters['branches']]
  raise AssertionError(equation.primitive.name)


def _carried(equation: Any, values: Sequence[Value]) -> range:
  """Returns which operands a loop carries from step to step."""
  parameters = equation.params
  match equation.primitive.name:
    case 'scan':
      return range(*scan_operands(equation))
    case 'while':
      return range(parameters['cond_nconsts'] + parameters['body_nconsts'], len(values))
  return range(0)


def _last_uses(jaxpr: Any) -> list[list[Any]]:
  """Returns, for every equation, the variables that nothing reads after it."""
  seen = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
  last: list[list[Any]] = []
  for equation in reversed(jaxpr.eqns):
    atoms = [*equation.invars, *equation.outvars]
    dead = {atom for atom in atoms if not isinstance(atom, jex.Literal) and atom not in seen}
    seen |= dead
    last.append(list(dead))
  return last[::-1]
