"""Kernels for an encoder with contexts: blocks of symbols with activities, signs flipped."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, UInt8

from opq_jax.coding import arrangements, frequencies, neighbours


class Block(NamedTuple):
  """A block of a kernel as it is coded.

  Attributes:
    rows: its inputs.
    activities: of each weight, None where no weight has neighbours.
    symbols: of each weight, as places among the symbols that occur: counts of these are small.
    subsets: of each weight where codes follow the trellis.
  """

  rows: slice
  activities: UInt8[np.ndarray, 'rows outputs'] | None
  symbols: UInt8[np.ndarray, 'rows outputs']
  subsets: UInt8[np.ndarray, 'rows outputs'] | None


class CodedKernel(NamedTuple):
  """A kernel as it is coded, signs flipped.

  Attributes:
    shape: of the kernel.
    blocks: in the order of the payload.
    occurring: the symbols that occur.
  """

  shape: tuple[int, ...]
  blocks: list[Block]
  occurring: Int8[np.ndarray, ' symbols']

  @property
  def magnitudes(self) -> Float32[np.ndarray, ' symbols']:
    """The magnitude of every symbol that occurs."""
    return np.abs(self.occurring.astype(np.float32))


def coded_kernel(
  kernel: arrangements.Kernel,
  subsets: UInt8[np.ndarray, 'taps inputs outputs'] | None,
  window: tuple[int, ...],
  has_window: bool,
) -> CodedKernel:
  """Returns a kernel with its activities and flipped signs."""
  counts = frequencies.histogram(kernel)
  # a sign may be flipped: -c occurs wherever c does; the byte of -c is 256 less that of c
  counts += counts[-np.arange(256)]
  occurring = np.flatnonzero(counts).astype(np.uint8)
  # places are dense, where bytes may lie at both ends of 0 to 255: counts by score (`score_ranges`)
  # then have no columns of zeros
  place = np.zeros(256, np.uint8)
  place[occurring] = np.arange(occurring.size)
  blocks = []
  for tap, rows in arrangements.blocks(kernel.shape):
    activities, is_flipped = neighbours.NOTHING
    if has_window:
      activities, is_flipped = neighbours.neighbourhood(kernel, window, tap, rows)
    symbols = place[neighbours.flipped(kernel[tap, rows], is_flipped).view(np.uint8)]
    block_subsets = None if subsets is None else subsets[tap, rows]
    blocks.append(Block(rows, activities, symbols, block_subsets))
  return CodedKernel(kernel.shape, blocks, occurring.view(np.int8))
