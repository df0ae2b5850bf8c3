"""Searches for the allocation whose codes, by some encoder, have the bits asked."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from opq_jax.allocation import Allocation, LeafAllocation, allocate
from opq_jax.compression import CompressionState, init_state
from opq_jax.core import messages
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import Trial

# share of the bits asked that codes may have more or fewer; contexts change a file by more
_TOLERANCE = 3e-3
# allocations tried: each takes a run of the encoder, and the third is usually within the tolerance
_MAX_STEPS = 4
# bits per weight that a search asks for at most: a code is one int8
_MAX_BITS = 8.0


class Found(NamedTuple):
  """The answer of a search.

  Attributes:
    params, state: of the codes, as in `opq_jax.encoders.Encoded`.
    allocation: of their plain grids.
  """

  params: PyTree
  state: CompressionState
  allocation: Allocation


class _Step(NamedTuple):
  """One step of the search: the excess that it began with, and its move; both logarithms."""

  log_excess: float
  move: float


class Measured(Protocol):
  """Codes whose bits are known."""

  @property
  def bits_per_weight(self) -> float:
    """Entropy of the codes, per weight of the compressed leaves."""


Grids = TypeVar('Grids')
Codes = TypeVar('Codes', bound=Measured)


def search_allocation(
  trial: Callable[[PyTree, CompressionState], Trial],
  params: PyTree,
  bits_per_weight: float,
  options: dict[str, Any],
  survey: Callable[[PyTree, CompressionState], float | None] | None = None,
) -> Found:
  """Searches for the allocation of a tree in memory, as `search` does.

  Args:
    trial: (params, plain grids) -> `Trial`, from an encoder's `trials()`.
    params: the original weights.
    bits_per_weight: the target, as for `allocate`.
    options: of `allocate`, such as `objective`.
    survey: of the encoder; None where there is none.
  """

  def plain(bits: float) -> tuple[Allocation, CompressionState]:
    allocation = allocate(params, bits_per_weight=bits, **options)
    return allocation, init_state(params, allocation)

  allocation, coded = search(
    plain,
    lambda grids: trial(params, grids),
    bits_per_weight,
    None if survey is None else lambda grids: survey(params, grids),
  )
  return Found(coded.params, coded.state, allocation)


def search(
  plain: Callable[[float], tuple[Allocation, Grids]],
  trial: Callable[[Grids], Codes],
  bits_per_weight: float,
  survey: Callable[[Grids], float | None] | None = None,
) -> tuple[Allocation, Codes]:
  """Searches for the allocation whose codes have the entropy of rounded codes at the target.

  On the same plain grids, codes by error feedback take a few percent more bits than rounded codes,
  and codes along a trellis fewer.  So `allocate` is asked for other bits per weight: at first in
  inverse proportion to the excess, or as the encoder's survey says, then by the secant through the
  last two steps, in logarithms.  The search ends with codes within 0.3 % of the target, or after
  four encodings.

  Args:
    plain: returns the allocation of so many bits per weight, and its plain grids.
    trial: returns the codes on plain grids.
    bits_per_weight: the target, as for `allocate`.
    survey: estimates the bits of codes on plain grids, over those of rounded codes; None, or
      returns None, where this would save no time.

  Returns:
    The allocation and its codes: those of the last call of `trial`.
  """
  log_asked, elasticity, last, coded = math.log(bits_per_weight), 1.0, None, None
  (allocation, grids), notes = quietly(plain, math.exp(log_asked))
  wanted = _predicted_entropy(allocation)
  ratio, _ = (None, None) if survey is None else quietly(survey, grids)
  if ratio is not None:
    log_asked = min(log_asked - math.log(ratio), math.log(_MAX_BITS))
    (allocation, grids), notes = quietly(plain, math.exp(log_asked))
  for step in range(_MAX_STEPS):
    coded = None  # frees the codes of the step before
    if step:
      (allocation, grids), notes = quietly(plain, math.exp(log_asked))
    coded, notes_of_codes = quietly(trial, grids)
    # logarithm of the bits of the codes over the bits that they are to have
    log_excess = math.log(max(coded.bits_per_weight, 1e-9) / max(wanted, 1e-9))
    if abs(log_excess) <= _TOLERANCE:
      break
    if last is not None:
      elasticity = min(max((log_excess - last.log_excess) / last.move, 0.5), 2.0)
    move = min(-log_excess / elasticity, math.log(_MAX_BITS) - log_asked)
    if move == 0:  # no grid has more bits
      break
    log_asked, last = log_asked + move, _Step(log_excess, move)
  for note in (*notes, *notes_of_codes):  # of the last allocation alone
    messages.warn(note)
  assert coded is not None
  return allocation, coded


def _predicted_entropy(allocation: Allocation) -> float:
  """Returns the bits per weight that an allocation predicts for rounded codes."""
  is_record = lambda node: isinstance(node, LeafAllocation)
  records = jax.tree.leaves(allocation.tree, is_leaf=is_record)
  leaves = [(math.prod(r.shape), float(np.mean(np.asarray(r.entropy)))) for r in records]
  return sum(size * bits for size, bits in leaves) / max(sum(size for size, _ in leaves), 1)


def quietly(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Warning]]:
  """Returns the answer of a call, and its warnings, which only the last of several calls issues."""
  with messages.collected() as found:
    answer = function(*args)
  return answer, found
