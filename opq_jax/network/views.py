"""Which axes of a leaf the axes of a value are.

On its way from the parameters to a product a kernel is reshaped, transposed and converted.  Such
operations move numbers and compute nothing, so every axis of their result is still an axis of the
leaf, a part of one, or several joined:

    kernel [in, heads, features]  --reshape-->  [in, heads * features]

An axis of a value is therefore a sequence of `Factor`s, the slowest first, and the functions here
say what an operation makes of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

REPEATED = -1
"""The axis of a factor along which a leaf is broadcast."""

STEP, DYNAMIC = -1, -2
"""Indices that are no numbers: of the step of a scan, and of a value that is not known."""


# operations whose result has the numbers of their operand, up to its dtype
SAME_NUMBERS = frozenset(
  (
    *('convert_element_type', 'copy', 'copy_p', 'mesh_cast', 'name', 'optimization_barrier'),
    *('pvary', 'reduce_precision', 'reshard', 'sharding_constraint', 'stop_gradient'),
  )
)
LAYOUT = frozenset(
  (
    *('broadcast_in_dim', 'concatenate', 'dynamic_slice', 'expand_dims', 'pad', 'reshape', 'rev'),
    *('slice', 'split', 'squeeze', 'transpose'),
  )
)
# elementwise: a weight that only parameters take part in computing is still a weight
ARITHMETIC = frozenset(
  (
    *('abs', 'add', 'clamp', 'div', 'exp', 'integer_pow', 'log', 'logistic', 'max', 'min', 'mul'),
    *('neg', 'pow', 'round', 'rsqrt', 'select_n', 'sign', 'sqrt', 'square', 'sub', 'tanh'),
  )
)


class Factor(NamedTuple):
  """A part of one axis of a leaf.

  Attributes:
    axis: of the leaf, or REPEATED.
    size: how many places it has.
    stride: places of the leaf's axis from one to the next; negative where the order is reversed.
  """

  axis: int
  size: int
  stride: int = 1


Axis = tuple[Factor, ...]


class View(NamedTuple):
  """A leaf as it is seen through operations that only move numbers.

  Attributes:
    leaf: number of the leaf.
    axes: factors of every axis of the value.
    picked: factors of axes of which one index was picked: by a scan, or by `kernel[i]`.
    indices: what was picked of each of them: an index, STEP or DYNAMIC.
    is_exact: False where arithmetic (weight normalization), padding or a cut lies on the way, so
      that the numbers of the value are not those of the leaf.
  """

  leaf: int
  axes: tuple[Axis, ...]
  picked: Axis = ()
  indices: tuple[int, ...] = ()
  is_exact: bool = True

  @property
  def is_repeated(self) -> bool:
    """Whether the leaf is broadcast: then the value is not a kernel of its own."""
    return any(factor.axis == REPEATED for axis in self.axes for factor in axis)


def whole(leaf: int, shape: Sequence[int]) -> View:
  """Returns the view of a leaf itself."""
  return View(leaf, tuple((Factor(axis, size),) for axis, size in enumerate(shape)))


def transposed(view: View, permutation: Sequence[int]) -> View:
  """Returns the view through a transpose."""
  return view._replace(axes=tuple(view.axes[axis] for axis in permutation))


def squeezed(view: View, axes: Sequence[int]) -> View:
  """Returns the view without some axes of length 1."""
  return view._replace(axes=tuple(a for i, a in enumerate(view.axes) if i not in axes))


def broadcast(view: View, shape: Sequence[int], places: Sequence[int]) -> View:
  """Returns the view through `broadcast_in_dim`: axis i of the value becomes axis places[i]."""
  axes: list[Axis] = [(Factor(REPEATED, size),) if size != 1 else () for size in shape]
  for axis, place in zip(view.axes, places, strict=True):
    if size_of(axis) == shape[place]:
      axes[place] = axis
  return view._replace(axes=tuple(axes))


def reversed_along(view: View, axes: Sequence[int]) -> View | None:
  """Returns the view through `rev`, or None where joined axes are reversed."""
  new = list(view.axes)
  for place in axes:
    factors = [factor for factor in view.axes[place] if factor.size > 1]
    if len(factors) > 1:
      return None
    new[place] = tuple(f._replace(stride=-f.stride) for f in view.axes[place])
  return view._replace(axes=tuple(new))


def reshaped(view: View, shape: Sequence[int]) -> View | None:
  """Returns the view through a reshape, or None where an axis is cut at no factor of its length.

  >>> view = whole(0, (6, 4))
  >>> [[(f.axis, f.size, f.stride) for f in axis] for axis in reshaped(view, (2, 12)).axes]
  [[(0, 2, 3)], [(0, 3, 1), (1, 4, 1)]]
  """
  left = [factor for axis in view.axes for factor in axis][::-1]
  if math.prod(factor.size for factor in left) != math.prod(shape):
    return None
  axes: list[Axis] = []
  for size in shape:
    axis: list[Factor] = []
    wanted = size
    while wanted > 1 or (left and left[-1].size == 1):
      factor = left.pop()
      if factor.size <= wanted or factor.size == 1:
        if wanted % factor.size:
          return None
        axis.append(factor)
        wanted //= factor.size
        continue
      if factor.size % wanted:
        return None
      rest = factor.size // wanted
      axis.append(Factor(factor.axis, wanted, factor.stride * rest))
      left.append(Factor(factor.axis, rest, factor.stride))
      wanted = 1
      # the rest of a factor belongs to the next axis
      break
    axes.append(tuple(axis))
  return view._replace(axes=tuple(axes))


def picked(view: View, place: int, index: int) -> View:
  """Returns the view of one index along an axis, with that axis left out."""
  factors = tuple(f for f in view.axes[place] if f.axis != REPEATED)
  return view._replace(
    axes=view.axes[:place] + view.axes[place + 1 :],
    picked=view.picked + factors,
    indices=(*view.indices, index),
  )


def size_of(axis: Axis) -> int:
  """Returns the length of an axis."""
  return math.prod(factor.size for factor in axis)


def through(
  name: str, parameters: dict[str, Any], view: View, before: Sequence[int], after: Sequence[int]
) -> View | None:
  """Returns the view through an operation that moves numbers, or None where it is lost.

  Args:
    name, parameters: of the operation.
    view: of its operand.
    before, after: shapes of the operand and of the result.
  """
  match name:
    case 'reshape':
      return reshaped(view, after) if parameters.get('dimensions') is None else None
    case 'transpose':
      return transposed(view, parameters['permutation'])
    case 'squeeze':
      return squeezed(view, [axis % len(before) for axis in parameters['dimensions']])
    case 'broadcast_in_dim':
      return broadcast(view, after, parameters['broadcast_dimensions'])
    case 'rev':
      return reversed_along(view, parameters['dimensions'])
    case 'slice' | 'dynamic_slice' | 'concatenate' | 'pad':
      return _cut(name, parameters, view, before, after)
  return None


def _cut(
  name: str, parameters: dict[str, Any], view: View, before: Sequence[int], after: Sequence[int]
) -> View | None:
  """Returns the view of a part of a value, or of a larger value that it is a part of."""
  starts = parameters.get('start_indices') if name == 'slice' else None
  axes, indices, taken = list(view.axes), list(view.indices), list(view.picked)
  is_exact = view.is_exact and name != 'pad'
  for place, (length, new_length) in enumerate(zip(before, after, strict=True)):
    if length == new_length:
      continue
    if name in ('slice', 'dynamic_slice') and new_length == 1:
      taken += [factor for factor in view.axes[place] if factor.axis != REPEATED]
      indices.append(DYNAMIC if starts is None else starts[place])
      axes[place] = ()
    elif name != 'concatenate':
      is_exact = False
  return view._replace(
    axes=tuple(axes), picked=tuple(taken), indices=tuple(indices), is_exact=is_exact
  )
