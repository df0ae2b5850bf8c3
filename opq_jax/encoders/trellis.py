"""Codes along a trellis: fewer bits at the same error, in the same kind of file."""

import dataclasses
from collections.abc import Callable, Collection, Iterator

import numpy as np
from jaxtyping import Array

from opq_jax.compression import CompressionState, LeafState, stacked
from opq_jax.core import messages, native, trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import (
  Encoded,
  LeafEncoder,
  LeafToCode,
  Moments,
  Trial,
  encoded,
  leaves_to_code,
  named_leaf,
  parts_of,
  stack_slices,
)
from opq_jax.encoders.factors import DAMPING, Factored, check_damping
from opq_jax.encoders.plain_codes import PlainCodesWarning
from opq_jax.encoders.survey import surveyed
from opq_jax.encoders.tied_codes import with_ties
from opq_jax.encoders.trellis_leaves import CodedLeaf, bits_of, check_finite, code_leaf, factored
from opq_jax.network import InputMoments

TRELLIS_VERSION = 2
"""Version of the encoder, which `opq compress` writes into its files (`Trellis.version`)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trellis(LeafEncoder):
  r"""Chooses codes along a trellis: a finer grid, of which each state allows every other level.

  The codes of a leaf, in the order in which they are coded, follow the trellis of
  `opq_jax.coding.trellis`: at each weight, the codes before it say which half of the levels may be
  chosen.  Viterbi's algorithm finds the path of least

      sum_i (w_i - v_i)^2  +  (slope / h_i) bits_i

  where `bits` is the price of the code in `opq_jax.coding.contexts`, by scores of inputs, outputs
  and neighbouring taps; a first walk, without contexts, gives the codes that scores are made from.
  The slope is that of the plain grid: -dD/dR of the Laplace density for which the grid is optimal.

  With moments, the errors of a row of weights are pushed on to the inputs to come as by `Feedback`,
  input after input in the order of the file.  An error of input i then costs h_i = 1 / U_ii^2 in
  the layer's output, relative to the geometric mean over inputs; h_i is 1 without moments.  A
  kernel whose inputs are not its first axes (outputs by inputs, as in Equinox and PyTorch) is
  walked with its axes moved, and has the codes and the payload of the same kernel inputs first.

  From the same plain grid, the file is smaller and the error lower than with rounded codes;
  `opq_jax.compress` searches for the grid whose codes have the bits asked.  The file loads as any
  other: a leaf has one codebook and one mask.  To finetune, start from `Rounding` or `Feedback`:
  training moves weights off the trellis, and all levels then cost bits.

  Attributes:
    moments: as in `Feedback`; None, of a leaf or of all, where errors are not pushed on.
    damping: as in `Feedback`.
    version: 2; or 1, for the very codes of files that were made before there were versions.  It
      encodes the whole network at every step of the search of `opq_jax.compress`, where version 2
      begins with an estimate from some outputs of every leaf, if these are few beside all.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> error = lambda network: float(jnp.square(network.params - kernel).sum())
  >>> coded = opq_jax.compress(kernel, compression_rate=16.0, encoder=Trellis())
  >>> error(coded) < 0.9 * error(opq_jax.compress(kernel, compression_rate=16.0))
  True
  """

  moments: PyTree | None = None
  damping: float = DAMPING
  version: int = TRELLIS_VERSION

  def __post_init__(self) -> None:
    if self.version not in range(1, TRELLIS_VERSION + 1):
      raise ValueError(f'version: found {self.version}, expected 1 to {TRELLIS_VERSION}')
    check_damping(self.damping)

  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of a tree, and the grids that the trellis refines.

    A weight beyond 127 levels of the new grid escapes.  A leaf of too many escapes, or of a shape
    that the coder has no order for, keeps its plain grid (its errors are still pushed on), and a
    warning names it.  Leaves that are one array get the codes of the first of them that has
    moments.  Runs on the host, and cannot be traced.

    Raises:
      ValueError: grids or moments were made for another tree, a matrix has another shape than its
        leaf needs, a leaf or matrix is not finite, or a matrix is not positive definite once
        damped.
    """
    coded = _encoded(params, _code_leaves(params, grids, self.moments, self.damping, self.version))
    records = trees.records(params, grids.tree, LeafState)
    return with_ties(coded, params, records, lambda: self.preferred(params))

  def factored(self, moments: InputMoments, damping: float) -> Factored:
    found = factored(moments, damping, self.version)
    assert found is not None
    return found

  def choose_matrix(
    self, weights: Array, grid: LeafState, moments: Moments, damping: float
  ) -> tuple[Array, LeafState]:
    coded = code_leaf(weights, grid, factored(moments, damping, self.version))
    assert coded.state is not None
    if not coded.is_served:
      messages.warn(PlainCodesWarning())
    return coded.values, coded.state

  def survey(self, params: PyTree, grids: CompressionState) -> float | None:
    return surveyed(params, grids, self.moments, self.damping) if self.version > 1 else None

  def trials(self) -> Callable[[PyTree, CompressionState], Trial]:
    # once unserved, a leaf stays so: the search would alternate between its two answers otherwise
    unserved: set[str] = set()

    def trial(params: PyTree, grids: CompressionState) -> Trial:
      coded = _code_leaves(params, grids, self.moments, self.damping, self.version, unserved)
      named = zip(trees.named_leaves(params), coded, strict=True)
      unserved.update(name for name, leaf in named if not leaf.is_served)
      weights = sum(leaf.codes.size for leaf in coded if leaf.codes is not None)
      return Trial(*_encoded(params, coded), sum(bits_of(leaf) for leaf in coded) / max(weights, 1))

    return trial


def _encoded(params: PyTree, coded: list[CodedLeaf]) -> Encoded:
  return encoded(params, [(leaf.values, leaf.state) for leaf in coded])


def _code_leaves(
  params: PyTree,
  grids: CompressionState,
  moments: PyTree | None,
  damping: float,
  version: int,
  unserved: Collection[str] = (),
) -> list[CodedLeaf]:
  """Codes all leaves; leaves named in `unserved` on their plain grids."""

  def code(leaf: LeafToCode) -> CodedLeaf:
    if leaf.grid is None:
      return CodedLeaf(leaf.weights)
    parts = list(code_slices(leaf, damping, version, leaf.name not in unserved))
    return _joined(parts, leaf.grid.slice_shape) if leaf.grid.slices else parts[0]

  leaves = list(leaves_to_code(params, grids, moments))
  # the sums of version 1 are those of all threads of BLAS
  blas_threads = None if version == 1 else 1
  coded = native.on_all_processors(code, leaves, blas_threads=blas_threads)
  names = [leaf.name for leaf, result in zip(leaves, coded, strict=True) if not result.is_served]
  if names:
    messages.warn(PlainCodesWarning(names))
  return coded


def code_slices(
  leaf: LeafToCode, damping: float, version: int, may_follow_trellis: bool
) -> Iterator[CodedLeaf]:
  """Chooses the codes of the slices of a compressed leaf, in C order, or of itself.

  Args:
    leaf: with its plain grid.
    damping, version: as in `Trellis`.
    may_follow_trellis: False where codes of the plain grid are wanted.

  Raises:
    ValueError: a weight is not finite, or damped moments are not positive definite.
  """
  check_finite(leaf)
  with named_leaf(leaf.name):
    for part in parts_of(leaf):
      moments = factored(part.moments, damping, version)
      yield code_leaf(part.weights, part.grid, moments, may_follow_trellis)


def _joined(parts: list[CodedLeaf], shape: tuple[int, ...]) -> CodedLeaf:
  """Returns a leaf from its coded slices, in C order."""
  values, states, codes, are_served = zip(*parts, strict=True)
  joined = np.stack(codes)
  return CodedLeaf(
    stack_slices(values, shape),
    stacked(states, shape),
    joined.reshape(*shape, *joined.shape[1:]),
    all(are_served),
  )
