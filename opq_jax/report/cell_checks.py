"""Checks that the codes of a leaf are those of its original weights, by the rule of the cells.

    code 0            |w| <= threshold
    code sign(w) k    threshold + (k - 1) step <= |w| < threshold + k step; the last cell is open
    code -128         the value is w itself, bit for bit (an escaped weight)

with threshold and step times the scale of the weight's output, where outputs have scales.

The check computes in float64, in NumPy, and shares no code with the encoder.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Shaped

from opq_jax.core.limits import ESCAPE
from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.file.written_leaves import written_slice

_PIECE = 1 << 18  # weights checked at a time: 2 MiB for each float64 array
_TINY = float(np.finfo(np.float32).tiny)
_TOLERANCE = 1e-4
"""Steps by which a weight may miss its cell: (|w| - threshold) / step is computed in float32 and up
to 127, where float32 resolves 8e-6."""


@dataclasses.dataclass(frozen=True)
class VerifiedLeaf:
  """The comparison of a compressed leaf with its original weights.

  Attributes:
    path: the leaf's name in the tree.
    weights: number of weights.
    sparsity: share of the weights whose code is 0.
    levels: quantization levels per sign.
    error: ||w - w^||^2 / ||w||^2; 0 if w and w^ are 0.
    worst: the largest |w - w^| in steps of a survivor that is not clipped; below 1.
    clipped: survivors beyond the last cell that are not escaped.
    escaped: survivors that are stored as they are.
    stored: bytes of the payload.
    problems: claims of the file that do not hold.
  """

  path: str
  weights: int
  sparsity: float
  levels: int
  error: float
  worst: float
  clipped: int
  escaped: int
  stored: int
  problems: tuple[str, ...]


class _Piece(NamedTuple):
  """Consecutive weights of a leaf.

  Attributes:
    original: the original weights.
    target: the weights whose cells the codes name (see `check_leaf`).
    code: their codes.
    value: their values in the file.
    scale: of their outputs; None where all are 1.
  """

  original: Shaped[np.ndarray, ' n']
  target: Shaped[np.ndarray, ' n']
  code: Int8[np.ndarray, ' n']
  value: Shaped[np.ndarray, ' n']
  scale: Float32[np.ndarray, ' n'] | None


@dataclasses.dataclass
class _Tally:
  """Counts and sums over the pieces of a leaf.

  Attributes:
    pruned_above, kept_below, other_sign, outside, changed, infinite: weights that break a rule;
      `problems` has the rules in words.
    clipped, escaped, worst: see `VerifiedLeaf`.
    squared_error: sum of (w - w^)^2.
    energy: sum of w^2.
  """

  threshold: float
  step: float
  levels: int
  pruned_above: int = 0
  kept_below: int = 0
  other_sign: int = 0
  outside: int = 0
  changed: int = 0
  infinite: int = 0
  clipped: int = 0
  escaped: int = 0
  worst: float = 0.0
  squared_error: float = 0.0
  energy: float = 0.0

  def add(self, piece: _Piece) -> None:
    """Checks a piece."""
    weight, target, code, value = (
      array.astype(np.float64) for array in (piece.original, piece.target, piece.code, piece.value)
    )
    is_escaped = code == ESCAPE
    is_pruned = code == 0
    is_kept = ~is_pruned & ~is_escaped
    self.escaped += _count(is_escaped)
    self.changed += differing(piece.value[is_escaped], piece.target[is_escaped])
    self.infinite += _count(np.isfinite(weight) & ~np.isfinite(value))

    scale = 1.0 if piece.scale is None else piece.scale.astype(np.float64)
    threshold, step = self.threshold * scale, self.step * scale
    magnitude = np.abs(target)
    # XLA flushes denormal numbers to 0 on some platforms: either code is right
    is_normal = ~((magnitude > 0) & (magnitude < _TINY))
    # negated comparisons: NaN breaks both rules
    self.pruned_above += _count(is_normal & is_pruned & ~(magnitude <= threshold))
    self.kept_below += _count(is_normal & is_kept & ~(magnitude > threshold))
    self.other_sign += _count(is_kept & ((target < 0) != (code < 0)))

    # position of a survivor inside its own cell, in steps: 0 ... 1
    position = (magnitude - threshold) / step - (np.abs(code) - 1)
    is_last = np.abs(code) >= self.levels
    is_inside = (position >= -_TOLERANCE) & (is_last | (position < 1 + _TOLERANCE))
    self.outside += _count(is_kept & ~is_inside)
    is_clipped = is_kept & is_last & (position >= 1)
    self.clipped += _count(is_clipped)

    distance = np.abs(weight - value) / step
    self.worst = max(self.worst, float(np.max(distance, where=is_kept & ~is_clipped, initial=0)))
    self.squared_error += float(np.sum((weight - value) ** 2))
    self.energy += float(np.sum(weight**2))

  def problems(self, name: str) -> list[str]:
    """Returns a line for every broken rule."""
    counts = {
      f'pruned weights above the threshold {self.threshold:g}': self.pruned_above,
      f'survivors that the threshold {self.threshold:g} prunes': self.kept_below,
      'survivors of the other sign': self.other_sign,
      'survivors outside of their cells': self.outside,
      'escaped weights that are not the original ones': self.changed,
      'finite weights that came back infinite or NaN': self.infinite,
    }
    return [
      f'{name}: found {count} {rule}, expected none' for rule, count in counts.items() if count
    ]

  def relative_error(self) -> float:
    """Returns the squared error relative to the energy of the weights."""
    if self.energy:
      return self.squared_error / self.energy
    return math.inf if self.squared_error else 0.0


def check_slice(
  name: str,
  original: Shaped[np.ndarray, '...'],
  target: Shaped[np.ndarray, '...'],
  coded: CodedSlice,
  stored: int,
  axes: tuple[int, ...] = (),
) -> VerifiedLeaf:
  """Compares a slice of a compressed leaf, or the leaf, with its original weights.

  Args:
    name: of the slice.
    original: the original weights, from which errors are measured; rotated where those of the
      codes are.
    target: the weights whose cells the codes name: the original weights, or the values that an
      encoder has chosen for them (error feedback, trellis).
    coded: the slice in the file.
    stored: bytes of its payload in the file.
    axes: the order of axes in its payload (`OpqFile.axes`).
  """
  grid = coded.grids.grid
  tally = _Tally(float(grid.threshold), float(grid.step), grid.levels)
  flat = [array.reshape(-1) for array in (original, target, coded.codes, coded.coded_values())]
  for start in range(0, original.size, _PIECE):
    stop = min(start + _PIECE, original.size)
    scale = coded.grids.of_weights(original.shape, start, stop)
    tally.add(_Piece._make([*(array[start:stop] for array in flat), scale]))
  return VerifiedLeaf(
    path=name,
    weights=original.size,
    sparsity=1 - _count(coded.codes) / original.size,
    levels=grid.levels,
    error=tally.relative_error(),
    worst=tally.worst,
    clipped=tally.clipped,
    escaped=tally.escaped,
    stored=stored,
    problems=(*tally.problems(name), *_payload_problems(name, coded, stored, axes)),
  )


def _payload_problems(
  name: str, coded: CodedSlice, stored: int, axes: tuple[int, ...]
) -> list[str]:
  """Returns a line if the payload has another length than the codes take when coded again."""
  size = lambda contexts: len(written_slice(coded, contexts=contexts, axes=axes).payload)
  # coded without contexts only if the first length is not it: coding is most of the work
  if stored == (with_contexts := size(True)) or stored == (without := size(False)):
    return []
  return [
    f'{name}: found a payload of {stored} bytes, expected {with_contexts}, or {without} without '
    'contexts'
  ]


def differing(first: Shaped[np.ndarray, '...'], second: Shaped[np.ndarray, '...']) -> int:
  """Returns the number of elements of two arrays of one dtype that differ in some bit."""
  as_bytes = lambda array: np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)
  return _count((as_bytes(first) != as_bytes(second)).any(axis=1))


def _count(is_counted: Any) -> int:
  return int(np.count_nonzero(is_counted))
