"""Limits of a code and of its grid; both ends of the file format hold them, without JAX."""

MAX_LEVELS = 127
"""Levels a sign: a code is one int8, 0 is a pruned weight, and -128 an escaped one."""

STEP_BITS = 17
"""Significant bits of a step: times up to 127, it is a float32 of 24 bits without rounding."""

GRID_MARGIN = 1 / 64
"""Of a step, between a level and the edges of its cell: rounding must not cross it."""

ESCAPE = -128
"""The code of an escaped weight, the one int8 that is the negative of no other."""


def levels_of_palette(palette_bits: int) -> int:
  """Returns the levels a sign of a palette: with 0 they are one less than 2^palette_bits values."""
  return (1 << palette_bits - 1) - 1
