"""What a codec makes of a network: decoded leaves, and the bits that each is stored in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.benchmarks.language_models import networks

Matrix = Float[np.ndarray, 'outputs inputs']


class Coded(NamedTuple):
  """Leaves after a codec; leaves that it does not name are stored as float16.

  Attributes:
    leaves: decoded values by path.
    bits: what each of them takes, with scales and tables.
    other_bits: of what belongs to no leaf: headers, names, padding.
  """

  leaves: Mapping[str, np.ndarray]
  bits: Mapping[str, float]
  other_bits: float = 0.0

  def only(self, chosen: Callable[[str], bool]) -> 'Coded':
    """Returns some of the leaves; all others will be float16."""
    names = [path for path in self.leaves if chosen(path)]
    leaves = {path: self.leaves[path] for path in names}
    return Coded(leaves, {path: self.bits[path] for path in names}, self.other_bits)

  def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the decoded network."""
    return networks.replaced(params, self._rest(params) | dict(self.leaves))

  def sizes(self, params: Mapping[str, Any]) -> dict[str, float]:
    """Returns bits per weight of the kernels, and of the whole network with everything counted."""
    bits = {path: 16.0 * leaf.size for path, leaf in self._rest(params).items()} | dict(self.bits)
    counts = {path: leaf.size for path, leaf in networks.leaves(params).items()}
    of_kernels = [path for path in counts if networks.is_kernel(path)]
    sizes = {
      'bits of kernels': sum(bits[path] for path in of_kernels)
      / sum(counts[path] for path in of_kernels),
      'bits': (sum(bits.values()) + self.other_bits) / sum(counts.values()),
    }
    return {name: round(value, 4) for name, value in sizes.items()}

  def _rest(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the leaves that it does not name, rounded to float16."""
    return {
      path: leaf.astype(np.float16).astype(np.float32)
      for path, leaf in networks.leaves(params).items()
      if path not in self.leaves
    }


def each_matrix(
  stacks: Mapping[str, np.ndarray], codec: Callable[[Matrix], tuple[np.ndarray, float]]
) -> Coded:
  """Codes every matrix by itself.

  Args:
    stacks: kernels [layers, inputs, outputs], or tables [tokens, features] by path.
    codec: from a matrix to its decoded values and their bits.

  >>> coded = each_matrix({'a': np.ones((2, 3, 5))}, lambda matrix: (2 * matrix, matrix.shape[0]))
  >>> coded.leaves['a'].shape, float(coded.leaves['a'].sum()), coded.bits['a']
  ((2, 3, 5), 60.0, 10.0)
  """
  leaves, bits = {}, {}
  for path, stack in stacks.items():
    matrices = stack.swapaxes(1, 2) if stack.ndim == 3 else stack[None]
    found = [codec(np.ascontiguousarray(matrix)) for matrix in matrices]
    values = np.stack([value for value, _ in found])
    leaves[path] = values.swapaxes(1, 2) if stack.ndim == 3 else values[0]
    bits[path] = float(sum(count for _, count in found))
  return Coded(leaves, bits)


def joined(*parts: Coded) -> Coded:
  """Returns all leaves of several codecs."""
  leaves: dict[str, np.ndarray] = {}
  bits: dict[str, float] = {}
  for part in parts:
    leaves |= part.leaves
    bits |= part.bits
  return Coded(leaves, bits, sum(part.other_bits for part in parts))
