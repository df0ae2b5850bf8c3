"""The base of all encoders: values that choose the code of every weight.

An encoder is a frozen dataclass without state.  Its fields are the moments, or the network and its
calibration inputs, that the choice depends on.
"""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from opq_jax.compression import CompressionState, LeafState, slice_of, stacked
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders.factors import Factored, IndefiniteMomentsError, factor_of
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.network import InputMoments, StoredMatrix


class Encoded(NamedTuple):
  """The answer of an encoder.

  Attributes:
    params: the decoded values of compressed leaves; the other leaves as they came.
    state: grids with the masks of these codes.  `opq_jax.encode(params, state)` gives the codes,
      and `opq_jax.save(path, params, state)` writes them.
  """

  params: PyTree
  state: CompressionState


class Trial(NamedTuple):
  """The answer of an encoder to the grids that a search proposes.

  Attributes:
    params, state: as in `Encoded`.
    bits_per_weight: entropy of the codes, per weight of the compressed leaves.
  """

  params: PyTree
  state: CompressionState
  bits_per_weight: float


class Encoder(abc.ABC):
  """Chooses the code of every weight: the base class of all encoders."""

  @abc.abstractmethod
  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of a tree.

    Args:
      params: the original weights.
      grids: their plain grids, from `opq_jax.init_state(params, allocation)`.

    Returns:
      An `Encoded`: decoded values, and their state.

    Raises:
      ValueError: `grids` were made for a tree of other structure, shapes or dtypes.
    """

  def __repr__(self) -> str:
    """Returns the class and its fields; of a tree of arrays, the number of arrays."""
    fields = dataclasses.fields(self)  # type: ignore[arg-type]
    shown = [f'{field.name}={_short(getattr(self, field.name))}' for field in fields]
    return f'{type(self).__name__}({", ".join(shown)})'


Moments = InputMoments | Factored | None
"""Moments of one leaf, factored by the encoder that reads them or not yet."""


class LeafEncoder(Encoder):
  """An encoder that codes each leaf by itself, from the leaf and the moments of its inputs."""

  def factored(self, moments: InputMoments, damping: float) -> Factored:
    """Returns moments without slices as this encoder factors them, for several leaves and grids.

    Raises:
      IndefiniteMomentsError: damped moments are not positive definite.
    """
    return Factored(factor_of(np.asarray(moments.matrix, np.float32), damping), moments.inputs)

  @abc.abstractmethod
  def choose_matrix(
    self, weights: Array, grid: LeafState, moments: Moments, damping: float
  ) -> tuple[Array, LeafState]:
    """Chooses the codes of a leaf without slices, whatever moments the encoder itself holds.

    Args:
      weights: of the leaf, in its dtype or in float32.
      grid: its plain grid.
      moments: second moments of its inputs, or None.
      damping: of the moments, as in `Feedback`; factored moments are damped already.

    Returns:
      The decoded values, in the dtype of the grid, and the grid with the mask of these codes.

    Raises:
      IndefiniteMomentsError: (outside of a trace) damped moments are not positive definite.
    """

  def choose_leaf(
    self, weights: Array, grid: LeafState, moments: InputMoments | None, damping: float
  ) -> tuple[Array, LeafState]:
    """Chooses the codes of one leaf, slice by slice; arguments and result as `choose_matrix`."""
    parts = [
      self.choose_matrix(part.weights, part.grid, part.moments, damping)
      for part in parts_of(LeafToCode('', weights, grid, moments))
    ]
    if not grid.slices:
      return parts[0]
    values = stack_slices([value for value, _ in parts], grid.slice_shape)
    return values, stacked([state for _, state in parts], grid.slice_shape)

  def survey(self, params: PyTree, grids: CompressionState) -> float | None:
    """Estimates the bits of codes over those of rounded codes, from some outputs of every leaf.

    Returns:
      The ratio; None where this would save no time, or is not done.
    """
    return None

  def preferred(self, params: PyTree) -> set[str]:
    """Returns the leaves whose codes tied leaves take: those that the encoder has moments of."""
    names, moments = list(trees.named_leaves(params)), getattr(self, 'moments', None)
    matrices = [None] * len(names) if moments is None else _matrices(params, moments)
    return {name for name, matrix in zip(names, matrices, strict=True) if matrix is not None}

  def trials(self) -> Callable[[PyTree, CompressionState], Trial] | None:
    """Returns a function (params, plain grids) -> `Trial`, for one search for an allocation.

    None where codes have the bits that `opq_jax.allocate` predicts, so that no search is needed.
    """
    return None


class LeafToCode(NamedTuple):
  """A leaf of a tree, with all that an encoder has to know of it.

  Attributes:
    name: its path.
    weights: its values.
    grid: its plain grid; None where it passes through.
    moments: second moments of its inputs, or None.
  """

  name: str
  weights: Any
  grid: LeafState | None
  moments: InputMoments | None


def leaves_to_code(
  params: PyTree, grids: CompressionState, moments: PyTree | None = None
) -> Iterator[LeafToCode]:
  """Walks a tree, its plain grids and its moments together.

  Raises:
    ValueError: one of them has the structure of another tree; a matrix of moments has another
      shape than its leaf needs or (outside of a trace) is not finite.
  """
  leaves = trees.named_leaves(params)
  records = trees.records(params, grids.tree, LeafState)
  matrices = [None] * len(records) if moments is None else _matrices(params, moments)
  for (name, leaf), grid, matrix in zip(leaves.items(), records, matrices, strict=True):
    moments_of_leaf = None
    if grid is not None and matrix is not None:
      moments_of_leaf = _checked_moments(name, leaf, matrix)
      if moments_of_leaf.slices > grid.slices:
        raise ValueError(
          f'{name}: found moments of {moments_of_leaf.slices} axes of slices and a grid of '
          f'{grid.slices}, expected an allocation with the same: opq_jax.compress, or '
          'opq_jax.allocate(params, usage=opq_jax.usage(fn, params, *inputs))'
        )
    yield LeafToCode(name, leaf if grid is None else trees.native(leaf), grid, moments_of_leaf)


def parts_of(leaf: LeafToCode) -> Iterator[Any]:
  """Yields the slices of a compressed leaf, in C order, each as a leaf; or the leaf itself.

  Moments on disk are read slice by slice.
  """
  assert leaf.grid is not None
  for place in np.ndindex(leaf.grid.slice_shape):
    weights = leaf.weights[place] if place else leaf.weights
    grid = slice_of(leaf.grid, place) if place else leaf.grid
    yield LeafToCode(leaf.name, weights, grid, part_of(leaf.moments, place))


def part_of(moments: InputMoments | None, place: tuple[int, ...]) -> InputMoments | None:
  """Returns the moments of one slice, read from disk if need be: its own, or those of all slices.

  The place of a leaf without slices is ().
  """
  if moments is None:
    return None
  matrix: Any = moments.matrix
  inputs = tuple(axis - len(place) for axis in moments.inputs)
  if moments.slices or isinstance(matrix, StoredMatrix):
    matrix = matrix[place[: moments.slices]]
  return InputMoments(matrix, inputs)


def stack_slices(arrays: Sequence[Any], shape: tuple[int, ...]) -> Any:
  """Returns the arrays of all slices, in C order, as one array with the slices' axes in front."""
  # of NumPy where values are known: XLA would compile a program for every number of slices
  numpy: Any = jnp if trees.is_traced(list(arrays)) else np
  stack = numpy.stack([numpy.asarray(array) for array in arrays])
  return jnp.asarray(stack.reshape(*shape, *stack.shape[1:]))


@contextlib.contextmanager
def named_leaf(name: str) -> Iterator[None]:
  """Puts a leaf's path in front of an `IndefiniteMomentsError`."""
  try:
    yield
  except IndefiniteMomentsError as error:
    raise ValueError(f'{name}: {error}') from error


def encoded(params: PyTree, chosen: Sequence[tuple[Any, LeafState | None]]) -> Encoded:
  """Returns values and grids of all leaves as trees like `params`."""
  structure = jax.tree.structure(params)
  values, grids = zip(*chosen, strict=True) if chosen else ((), ())
  return Encoded(
    jax.tree.unflatten(structure, values), CompressionState(jax.tree.unflatten(structure, grids))
  )


def _matrices(params: PyTree, moments: PyTree) -> list[Any]:
  try:
    return trees.beside(params, moments)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'moments: found {jax.tree.structure(moments)}, expected the tree of the parameters with a '
      'matrix or None at every leaf'
    ) from error


def _checked_moments(name: str, weights: Array, moments: Any) -> InputMoments:
  """Returns the moments of a leaf; a bare matrix is of a leaf whose last axis are the outputs."""
  if not isinstance(moments, InputMoments):
    slices = max(np.ndim(moments) - 3, 0)
    moments = InputMoments(moments, tuple(range(slices, np.ndim(weights) - 1)), slices)
  matrix, of_slices = moments.matrix, np.shape(weights)[: moments.slices]
  layout = MatrixLayout(np.shape(weights), moments.inputs)
  width = layout.width
  outputs = math.prod(np.shape(weights)) // max(width * math.prod(of_slices), 1)
  fits = np.ndim(matrix) == moments.slices + 3 and np.shape(matrix)[:-3] == of_slices
  groups = np.shape(matrix)[-3] if fits else 0
  if groups == 0 or np.shape(matrix)[-2:] != (width, width) or outputs % groups:
    lead = ''.join(f'{size}, ' for size in of_slices)
    raise ValueError(
      f'{name}: found moments of shape {np.shape(matrix)}, expected [{lead}groups, {width}, '
      f'{width}] with groups that divide {outputs} channels'
    )
  if isinstance(matrix, jax.core.Tracer):
    return moments
  if not _is_finite(matrix):
    raise ValueError(f'{name}: found NaN or infinite moments, expected finite ones')
  return moments


def _is_finite(matrix: Any) -> bool:
  if isinstance(matrix, StoredMatrix):
    return all(np.isfinite(matrix[place]).all() for place in np.ndindex(matrix.shape[:-3]))
  # numpy's arrays by numpy: XLA would compile a program for every shape
  return bool(np.isfinite(matrix).all() if isinstance(matrix, np.ndarray) else all_finite(matrix))


@jax.jit
def all_finite(array: Array) -> Bool[Array, '']:
  """Returns whether all numbers are finite: one program, and not one for each operation."""
  return jnp.isfinite(array).all()


def _short(value: Any) -> str:
  if isinstance(value, Encoder | int | float | str | None):
    return repr(value)
  if callable(value):
    return getattr(value, '__qualname__', type(value).__name__)
  arrays = jax.tree.leaves(value)
  if len(arrays) == 1 and hasattr(arrays[0], 'shape'):
    return f'<{arrays[0].dtype}{list(arrays[0].shape)}>'
  return f'<{len(arrays)} arrays>'
