"""Operations of JAX in the forms that jax2onnx converts into ones that runtimes know.

pooling     runtimes pool along three axes at most: those that stay are joined into one
padding     of an array whose length is open: zeros beside it
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST_POOLED = 3
"""Axes that a runtime's pooling has."""


def rewrite(equation: Any, contents: Sequence[Any]) -> Sequence[Any] | None:
  """Returns the results of an operation in another form, None where its own is converted well."""
  rule = _RULES.get(equation.primitive.name)
  return None if rule is None else rule(contents, equation.params)


def _pooling(pool: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the rule of a pooling, which `pool(x, window, strides, padding, dilation)` computes."""

  def rule(contents: Sequence[Any], parameters: Any) -> Sequence[Any] | None:
    (x,) = contents
    window, strides = parameters['window_dimensions'], parameters['window_strides']
    padding, dilation = parameters['padding'], parameters['window_dilation']
    if x.ndim <= _MOST_POOLED or set(parameters['base_dilation']) != {1}:
      return None
    along = [
      axis
      for axis in range(x.ndim)
      if (window[axis], strides[axis], *padding[axis]) != (1, 1, 0, 0)
    ]
    beside = [axis for axis in range(x.ndim) if axis not in along]
    if len(along) >= _MOST_POOLED:
      return None
    order = [*beside, *along]
    moved = jnp.transpose(x, order)
    joined = moved.reshape(math.prod(moved.shape[: len(beside)]), *moved.shape[len(beside) :])
    of = lambda values, first: (first, *(values[axis] for axis in along))
    pooled = pool(joined, of(window, 1), of(strides, 1), of(padding, (0, 0)), of(dilation, 1))
    apart = pooled.reshape(*moved.shape[: len(beside)], *pooled.shape[1:])
    return [jnp.transpose(apart, [order.index(axis) for axis in range(x.ndim)])]

  return rule


def _maximum(x: Any, window: Any, strides: Any, padding: Any, dilation: Any) -> Any:
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  least = np.asarray(-np.inf if is_float else jnp.iinfo(x.dtype).min, x.dtype)
  return jax.lax.reduce_window(
    x, least, jax.lax.max, window, strides, padding, window_dilation=dilation
  )


def _sum(x: Any, window: Any, strides: Any, padding: Any, dilation: Any) -> Any:
  zero = np.zeros((), x.dtype)
  return jax.lax.reduce_window(
    x, zero, jax.lax.add, window, strides, padding, window_dilation=dilation
  )


def _padding(contents: Sequence[Any], parameters: Any) -> Sequence[Any] | None:
  x, value = contents
  is_open = not all(isinstance(size, int) for size in x.shape)
  amounts = parameters['padding_config']
  if not is_open or any(between or min(low, high) < 0 for low, high, between in amounts):
    return None
  for axis, (low, high, _) in enumerate(amounts):
    filled = lambda size, axis=axis, x=x: jnp.broadcast_to(
      value, (*x.shape[:axis], size, *x.shape[axis + 1 :])
    )
    parts = [*([filled(low)] if low else []), x, *([filled(high)] if high else [])]
    if len(parts) > 1:
      x = jnp.concatenate(parts, axis)
  return [x]


_RULES: dict[str, Callable[..., Sequence[Any] | None]] = {
  'pad': _padding,
  'reduce_window_max': _pooling(_maximum),
  'reduce_window_sum': _pooling(_sum),
}
