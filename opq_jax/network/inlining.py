"""Writes a function in operations alone: without calls, and with one branch for all platforms."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from opq_jax.network import interpreter

Rewrite = Callable[[Any, Sequence[Any]], Sequence[Any] | None]
"""Computes an operation of a jaxpr from its operands in another form; None for its own form."""


def inlined(closed: Any, rewrite: Rewrite = lambda *_: None) -> Callable[..., list[Any]]:
  """Returns the function of a closed jaxpr, which calls no other function when it is traced.

  The bodies of jit, remat and custom derivatives stand in their places, those of scan, while and
  cond are inlined themselves.  Of a `lax.platform_dependent` the branch stays that says what is
  computed: a depthwise convolution, where the branch of the CPU is a sum of products.

  Args:
    closed: a closed jaxpr, of `jax.make_jaxpr`.
    rewrite: computes operations in another form.

  >>> import jax.numpy as jnp
  >>> closed = jax.make_jaxpr(jax.jit(lambda x: jax.nn.relu6(x) + 1))(jnp.ones(3))
  >>> [equation.primitive.name for equation in jax.make_jaxpr(inlined(closed))(jnp.ones(3)).eqns]
  ['max', 'min', 'add']
  """
  return lambda *arguments: _walk(closed, arguments, rewrite)


def _walk(closed: Any, arguments: Sequence[Any], rewrite: Rewrite) -> list[Any]:
  jaxpr = closed.jaxpr
  environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  environment.update(zip(jaxpr.invars, arguments, strict=True))

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, jex.Literal) else environment[atom]

  for equation in jaxpr.eqns:
    contents = [read(atom) for atom in equation.invars]
    if equation.primitive.name == 'platform_index':
      results: Sequence[Any] = [0]  # one branch stays
    elif (body := interpreter.body_of(equation)) is not None:
      results = _walk(body, contents, rewrite)
    elif (branch := interpreter.branch_of_platforms(equation)) is not None:
      results = _walk(branch, contents[1:], rewrite)
    elif (rewritten := rewrite(equation, contents)) is not None:
      results = rewritten
    else:
      parameters = {
        name: _inlined_bodies(value, rewrite) for name, value in equation.params.items()
      }
      results = interpreter.evaluated(equation.replace(params=parameters), contents)
    environment.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _inlined_bodies(value: Any, rewrite: Rewrite) -> Any:
  """Returns a parameter of an operation, with its bodies inlined."""
  if isinstance(value, tuple) and any(isinstance(one, jex.ClosedJaxpr) for one in value):
    return tuple(_inlined_bodies(one, rewrite) for one in value)
  if not isinstance(value, jex.ClosedJaxpr):
    return value
  return jax.make_jaxpr(inlined(value, rewrite))(*value.in_avals)
