"""Objectives: the price of a squared error in one leaf beside the same error in another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opq_jax.allocation.defaults import OBJECTIVES, Objective
from opq_jax.core import trees
from opq_jax.core.trees import PyTree

_ENERGY_POWERS = {
  'balanced_error': 0.5,
  'retained_signal': None,
  'relative_error': 0.0,
  'squared_error': 1.0,
}


def energy_power(objective: Objective | PyTree) -> float | None:
  """Returns p of F_i = (D_i / S_i) S_i^p, or None where F_i is not linear in the error D_i.

  Args:
    objective: a name, or a tree of omegas (p = 1: F_i = omega_i D_i).

  Raises:
    ValueError: the name is unknown.

  >>> energy_power('balanced_error')
  0.5
  """
  if not isinstance(objective, str):
    return 1.0
  if objective not in OBJECTIVES:
    raise ValueError(f'objective: found {objective!r}, expected one of {OBJECTIVES} or a pytree')
  return _ENERGY_POWERS[objective]


def check_omegas(
  params: PyTree, objective: PyTree, shapes: dict[str, tuple[tuple[int, ...], int]]
) -> list[Array]:
  """Returns the weights omega_i of the compressed leaves as float32.

  Args:
    params: the parameters.
    objective: the same tree with a positive number at every compressed leaf, or one for each of its
      slices, or one for each output of these, as it broadcasts over the leaf.
    shapes: the shape of the compressed leaves, and how many leading axes count slices, by path.

  Raises:
    ValueError: the trees differ, or a leaf has no positive number.  Values of tracers are not
      checked.
  """
  try:
    omegas = trees.beside(params, objective)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'objective: found {jax.tree.structure(objective)}, expected the tree of the parameters '
      f'with a number at every compressed leaf, or one of {OBJECTIVES}'
    ) from error
  by_name = dict(zip(trees.named_leaves(params), omegas, strict=True))
  for name, (whole, slices) in shapes.items():
    omega, slice_shape = by_name[name], whole[:slices]
    shape = None if omega is None else jnp.shape(omega)
    of_outputs = [
      (*slice_shape, *(n if own == axis else 1 for own, n in enumerate(whole[slices:])))
      for axis in range(len(whole) - slices)
    ]
    if shape not in ((), slice_shape, *of_outputs):
      more = f', or {slice_shape}' if slice_shape else ''
      raise ValueError(
        f'{name}: found an objective of shape {shape}, expected one number{more}, or numbers along '
        f'one axis of {whole}, of length 1 along all others'
      )
    if isinstance(omega, jax.core.Tracer):
      continue
    for number in np.ravel(np.asarray(omega, np.float32)):
      if not 0 < number < math.inf:
        raise ValueError(f'{name}: found an objective of {number}, expected a positive number')
  return [jnp.asarray(by_name[name], jnp.float32) for name in shapes]
