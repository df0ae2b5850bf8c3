"""Names and defaults of an allocation's arguments, for help texts too: they need no JAX."""

from typing import Literal, get_args

Objective = Literal['balanced_error', 'retained_signal', 'relative_error', 'squared_error']
OBJECTIVES: tuple[str, ...] = get_args(Objective)

DEFAULT_COMPRESSION_RATE = 10.0
"""The rate where no target is given: 3.2 bits per weight."""
