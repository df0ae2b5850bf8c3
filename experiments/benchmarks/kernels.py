"""The kernels of a network apart from its vectors, and the error of all of them together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opq_jax.core import trees


def kernels_of(tree: Any) -> dict[str, np.ndarray]:
  """Returns the leaves of two axes or more, by path."""
  return {n: np.asarray(leaf) for n, leaf in trees.named_leaves(tree).items() if np.ndim(leaf) > 1}


def vectors_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the named leaves of one axis or none."""
  return {name: leaf for name, leaf in leaves.items() if np.ndim(leaf) < 2}


def squared_error(variables: Any, decoded: Any) -> float:
  """Returns the squared error of all kernels together, relative to their energy."""
  before, after = kernels_of(variables), kernels_of(decoded)
  total = lambda leaves: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)
  return total(before[name] - after[name] for name in before) / total(before.values())
