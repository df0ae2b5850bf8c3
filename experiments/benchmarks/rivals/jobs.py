"""A job makes one row: a network's file, written, timed and read back."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# names of methods in results.csv
OURS, TRELLIS = 'opq_jax', 'opq_jax, trellis'
SCALAR = f'{OURS}, feedback'  # error feedback with plain codes
FEEDBACK, LAYERS = f'{TRELLIS}, feedback', f'{TRELLIS}, layer by layer'
IMAGES, HALVES = ', images', ', bfloat16'
# as it ships; with coarser vectors; with rate-distortion optimised quantization besides
SHIPPED, COARSER, TUNED = 'NNCodec', 'NNCodec, coarser vectors', 'NNCodec, tuned'
SETTINGS = 'NNCodec, settings'  # tried to choose those of COARSER and TUNED
INFERENCE = ', for inference only'
RECIPE, QWIX = 'magnitude, rounding, LZMA', 'qwix, LZMA'
KERNELS = ', kernels alone'
CHOSEN_ON = 'resnet20', 'mobilenet_v1'  # networks on which our defaults were chosen


class Seconds(NamedTuple):
  """Seconds of the wall clock and of the processor."""

  clock: float
  processor: float

  def plus(self, other: 'Seconds') -> 'Seconds':
    return Seconds(self.clock + other.clock, self.processor + other.processor)

  @classmethod
  def since(cls, begin: 'Seconds') -> 'Seconds':
    return cls(time.perf_counter() - begin.clock, time.process_time() - begin.processor)


class Coded(NamedTuple):
  """A network that was written to a file and read back.

  Attributes:
    variables: as decoded.
    file_bytes: of the whole file.
    vector_bytes: of all in it but the kernels.
    encode, decode: time from the weights to the file, and back.
  """

  variables: Any
  file_bytes: int
  vector_bytes: int
  encode: Seconds
  decode: Seconds


class Job(NamedTuple):
  """One row to make: its key in the table, and the function that makes it."""

  method: str
  setting: str
  correction: str
  make: Callable[[], Coded]


def timed(function: Callable[[], Any]) -> tuple[Any, Seconds]:
  """Returns the result of a function, and the time it took."""
  begin = Seconds.since(Seconds(0, 0))
  result = jax.block_until_ready(function())
  return result, Seconds.since(begin)
