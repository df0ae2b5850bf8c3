"""Targets of an allocation: checks of the numbers that a caller gives, and one type per problem."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from opq_jax.allocation.defaults import DEFAULT_COMPRESSION_RATE
from opq_jax.core.limits import MAX_LEVELS, levels_of_palette

TARGET_NAMES = 'sparsity', 'bits', 'compression_rate', 'bits_per_weight'
"""Arguments of `check_targets`, in their order.  `file_rate` is apart: it measures files."""

UNBOUNDED = 1e6
"""Bits per weight that no leaf takes, whatever its tables."""

_PALETTE_BITS = 2, 8  # one bit has no level beside 0, and an index is a byte at most
_FLOAT_BITS = 32.0  # bits of the float32 weight that a compression rate is relative to
_MIN_RATE_CORRECTED = 0.5  # 64 bits per weight: above a float32 and the cost of its position
_MIN_RATE_CLOSED_FORM = 4.0  # 8 bits per weight: the closed forms do not know escaped weights


@flax.struct.dataclass
class SparsityAndBits:
  """The two targets of the paper.

  Attributes:
    sparsity: share of the compressed weights that is pruned, in [0, 1).
    bits: mean bits of a surviving weight at a fixed width, sign included.
  """

  sparsity: Float32[Array, '']
  bits: Float32[Array, '']


@flax.struct.dataclass
class BitsPerWeight:
  """The joint target.

  Attributes:
    bits_per_weight: mean bits of a compressed weight, entropy-coded; `UNBOUNDED` where palettes
      alone bound them.
    palette_bits: as in `opq_jax.allocate`; None where weights may escape.
  """

  bits_per_weight: Float32[Array, '']
  palette_bits: int | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def palette_levels(self) -> int | None:
    """Levels a sign of a palette; None where weights may escape."""
    return None if self.palette_bits is None else levels_of_palette(self.palette_bits)


Targets = SparsityAndBits | BitsPerWeight


class TooFewBitsError(ValueError):
  """Fewer bits per weight are asked than the frequency tables of the leaves take.

  Attributes:
    least: bits per weight with every weight pruned.
  """

  def __init__(self, message: str, least: float):
    super().__init__(message)
    self.least = least


def check_targets(
  sparsity: float | Array | None = None,
  bits: float | Array | None = None,
  compression_rate: float | Array | None = None,
  bits_per_weight: float | Array | None = None,
  *,
  palette_bits: int | None = None,
  corrected: bool = True,
) -> Targets:
  """Returns the targets that are asked for, checked.

  Args:
    sparsity, bits, compression_rate, bits_per_weight: as in `opq_jax.allocate`; a compression rate
      of `DEFAULT_COMPRESSION_RATE` where all are None, and no palettes are asked for either.
    palette_bits: as in `opq_jax.allocate`.
    corrected: as in `opq_jax.allocate`; rates below 4 need it.

  Raises:
    ValueError: targets are missing, contradictory or out of range.  Values of tracers are not
      checked.

  >>> float(check_targets(compression_rate=16.0).bits_per_weight)
  2.0
  """
  rates = {'compression_rate': compression_rate, 'bits_per_weight': bits_per_weight}
  given = [name for name, value in rates.items() if value is not None]
  if len(given) > 1:
    raise ValueError(f'found {" and ".join(given)}, expected one of them')
  if given and (sparsity is not None or bits is not None):
    raise ValueError(
      f'found {given[0]} together with sparsity or bits, expected either the one or the others'
    )
  if (sparsity is None) != (bits is None):
    found = 'sparsity' if bits is None else 'bits'
    raise ValueError(f'found {found} alone, expected sparsity and bits together')
  if palette_bits is not None:
    _check_palette_bits(palette_bits, has_two_targets=sparsity is not None, corrected=corrected)
    if not given:
      return BitsPerWeight(jnp.float32(UNBOUNDED), palette_bits)
  if sparsity is not None and bits is not None:
    widest = 1 + math.log2(MAX_LEVELS)
    return SparsityAndBits(
      _checked('sparsity', sparsity, 0.0, 1.0, '0 <= sparsity < 1'),
      _checked('bits', bits, 1.0, widest, '1 <= bits < 7.98, the width of 127 levels a sign'),
    )
  least = _MIN_RATE_CORRECTED if corrected else _MIN_RATE_CLOSED_FORM
  if bits_per_weight is not None:
    most = _FLOAT_BITS / least
    expected = f'0 < bits_per_weight <= {most:g}'
    # 32 over the least rate may be rounded up
    above_zero = float(np.finfo(np.float64).tiny)
    return BitsPerWeight(
      _checked('bits_per_weight', bits_per_weight, above_zero, most + 1e-6, expected), palette_bits
    )
  rate = DEFAULT_COMPRESSION_RATE if compression_rate is None else compression_rate
  rate = _checked('compression_rate', rate, least, math.inf, f'compression_rate >= {least:g}')
  return BitsPerWeight(_FLOAT_BITS / rate, palette_bits)


def _check_palette_bits(palette_bits: int, *, has_two_targets: bool, corrected: bool) -> None:
  """Raises ValueError where palettes are too large or small, or another target excludes them."""
  least, most = _PALETTE_BITS
  if not isinstance(palette_bits, int | np.integer) or not least <= palette_bits <= most:
    raise ValueError(
      f'palette_bits: found {palette_bits}, expected a whole number from {least} to {most}'
    )
  if has_two_targets:
    raise ValueError(
      'palette_bits: found it together with sparsity and bits, expected it alone, or with '
      'compression_rate, bits_per_weight or file_rate'
    )
  if not corrected:
    raise ValueError(
      'palette_bits: found corrected=False, expected True: palettes are solved from histograms'
    )


def _checked(name: str, value: Any, low: float, high: float, expected: str) -> Float32[Array, '']:
  """Returns `value` as a float32, checked to lie in [low, high) unless it is traced."""
  if not isinstance(value, jax.core.Tracer):
    if np.ndim(value) != 0:
      raise ValueError(f'{name}: found shape {np.shape(value)}, expected a number (use jax.vmap)')
    if not low <= float(value) < high:
      raise ValueError(f'{name}: found {float(value)}, expected {expected}')
  return jnp.asarray(value, jnp.float32)


def check_file_rate(file_rate: float, *others: Any) -> None:
  """Checks that `file_rate` is a positive number and the only target.

  Raises:
    ValueError: it is not.
  """
  if any(other is not None for other in others):
    raise ValueError('found file_rate together with another target, expected it alone')
  if not 0 < float(file_rate) < math.inf:
    raise ValueError(f'file_rate: found {file_rate}, expected a positive number')
