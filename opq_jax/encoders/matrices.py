"""A leaf as matrices of inputs by outputs, whatever the order of its axes."""

import math
from typing import Any, NamedTuple

import numpy as np


class MatrixLayout(NamedTuple):
  """Which axes of a leaf are inputs of its matrices.

  Attributes:
    shape: of the leaf, without slices.
    inputs: axes over which a product sums, in the order of K; all others are outputs.
  """

  shape: tuple[int, ...]
  inputs: tuple[int, ...]

  @property
  def outputs(self) -> tuple[int, ...]:
    """The other axes, ascending."""
    return tuple(axis for axis in range(len(self.shape)) if axis not in self.inputs)

  @property
  def width(self) -> int:
    """K, the number of inputs."""
    return math.prod(self.shape[axis] for axis in self.inputs)

  def rows(self, leaf: Any) -> Any:
    """Returns an array of the leaf's shape as [inputs, outputs]."""
    return leaf.transpose(*self.inputs, *self.outputs).reshape(self.width, -1)

  def leaf(self, rows: Any) -> Any:
    """Returns [inputs, outputs] as an array of the leaf's shape.

    >>> layout = MatrixLayout((2, 3, 4), (1,))
    >>> array = np.arange(24).reshape(2, 3, 4)
    >>> layout.rows(array).shape, bool((layout.leaf(layout.rows(array)) == array).all())
    ((3, 8), True)
    """
    order = (*self.inputs, *self.outputs)
    moved = rows.reshape([self.shape[axis] for axis in order])
    return moved.transpose(*np.argsort(order).tolist())
