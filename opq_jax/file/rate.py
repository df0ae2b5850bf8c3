"""Finds the bits per weight with which the whole file is so many times smaller than the network.

`opq_jax.allocate` spends bits on codes alone.  A file holds more than codes (biases, BatchNorm,
tables, headers), which matters for small networks, and contexts make the codes themselves smaller.
So files are written at several bits per weight, and their sizes compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from opq_jax.allocation import (
  TARGET_NAMES,
  Allocation,
  TooFewBitsError,
  allocate,
  check_file_rate,
)
from opq_jax.compression import CompressionState, init_state
from opq_jax.core import messages
from opq_jax.core.trees import PyTree
from opq_jax.file import writer

_TOLERANCE = 3e-3
"""Share of the size by which a file may be smaller than asked; it is never larger."""

_MAX_STEPS = 10
"""Files that are written at most; a secant takes three to five."""

_MOST_BITS = 32.0
"""Bits per weight of float32, beyond which nothing is gained."""


class _Trial(NamedTuple):
  """One file that was written.

  Attributes:
    allocation, state: of the whole tree.
    file_bytes: of the file.
    messages: the warnings of the allocation.
  """

  allocation: Allocation
  state: CompressionState
  file_bytes: int


@dataclasses.dataclass(frozen=True)
class FileTarget:
  """An allocation whose file is as small as asked.

  Attributes:
    allocation, state: of the whole tree.
    bits_per_weight: the target of `opq_jax.allocate` that gives them.
    file_bytes: of the file.
    file_rate: bytes of the tree in its own dtypes over bytes of the file.
  """

  allocation: Allocation
  state: CompressionState
  bits_per_weight: float
  file_bytes: int
  file_rate: float

  @property
  def compression_rate(self) -> float:
    """32 over the bits per weight."""
    return 32 / self.bits_per_weight


def at_file_rate(variables: PyTree, file_rate: float, **options: Any) -> FileTarget:
  """Allocates such that the `.opq` file is `file_rate` times smaller than the tree, or 0.3 % more.

  Args:
    variables: the whole network, as it will be saved.
    file_rate: bytes of the tree over bytes of the file.
    **options: of `opq_jax.allocate`, such as `objective`.

  Returns:
    A `FileTarget`.  Where no bits per weight give a file within 0.3 % (a very small tree, or one
    whose values are exact in a smaller file), the largest file that is smaller, with a warning.

  Raises:
    ValueError: as `opq_jax.allocate`; `file_rate` is no positive number, or not the only target; or
      the uncompressed leaves alone are larger than the file may be.

  >>> import jax.numpy as jnp
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> target = at_file_rate({'kernel': kernel, 'bias': jnp.ones(256)}, 16.0)
  >>> round(target.file_rate, 1), target.bits_per_weight < 2
  (16.0, True)
  """
  check_file_rate(file_rate, *map(options.get, TARGET_NAMES))
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
  original = sum(leaf.nbytes for leaf in leaves)
  trials: dict[float, _Trial] = {}

  def size_of(bits: float) -> int:
    allocation = allocate(variables, bits_per_weight=bits, **options)
    state = init_state(variables, allocation)
    size = len(writer.serialize(variables, state))
    trials[bits] = _Trial(allocation, state, size)
    return size

  bits = bits_of_file(size_of, original, file_rate, sum(leaf.size for leaf in leaves))
  trial = trials[bits]
  size = trial.file_bytes
  return FileTarget(trial.allocation, trial.state, bits, size, original / size)


def bits_of_file(
  size_of: Callable[[float], int], original: int, file_rate: float, weights: int
) -> float:
  """Returns the bits per weight with which a file has the asked size, or the next smaller one.

  The size is nearly linear in the bits per weight b: size(b) = rest + n b / 8.  The first guess
  takes the rest to be 0; then follow secants between the largest file that is small enough and the
  smallest that is not, ten steps at most.

  Args:
    size_of: bits per weight -> bytes of the file.
    original: bytes of the tree in its own dtypes.
    file_rate: `original` over the asked bytes.
    weights: n, about.

  Returns:
    Bits per weight that `size_of` was called with.  Of the warnings of all calls, those of this one
    are issued.

  Raises:
    ValueError: the file is larger than asked, however few the bits.

  >>> bits_of_file(lambda bits: 1000 + int(bits * 1000), 32000, 10.0, 8000) > 2.19
  True
  """
  notes: dict[float, list[Warning]] = {}

  def measured(bits: float) -> int:
    with messages.collected() as notes[bits]:
      return size_of(bits)

  limit = original / file_rate
  wanted = limit * (1 - _TOLERANCE / 2)
  sizes: dict[float, int] = {}
  bits, slope = min(8 * limit / max(weights, 1), _MOST_BITS), weights / 8
  for _ in range(_MAX_STEPS):
    try:
      sizes[bits] = measured(bits)
    except TooFewBitsError as error:
      bits = error.least * (1 + _TOLERANCE)
      sizes[bits] = measured(bits)
      break  # even the fewest bits may be too many
    small = max((b for b, size in sizes.items() if size <= limit), default=None)
    large = min((b for b, size in sizes.items() if size > limit), default=None)
    if small is not None and (sizes[small] >= limit * (1 - _TOLERANCE) or small == _MOST_BITS):
      break
    if small is not None and large is not None:
      slope = max((sizes[large] - sizes[small]) / (large - small), 1e-9)
      part = min(max((wanted - sizes[small]) / slope / (large - small), 0.05), 0.95)
      bits = small + part * (large - small)
    else:
      bits = min(bits + (wanted - sizes[bits]) / slope, _MOST_BITS)
    if bits <= 0:
      bits = min(sizes) / 4
  small = max((b for b, size in sizes.items() if size <= limit), default=None)
  if small is None:
    least = min(sizes.values())
    raise ValueError(
      f'file_rate: found {file_rate:g}, a file of {limit:,.0f} bytes, expected one of {least:,} at '
      'least: uncompressed leaves, tables and headers take so much'
    )
  if sizes[small] < limit * (1 - 2 * _TOLERANCE):
    found = f'{original / sizes[small]:.4g} times smaller, {sizes[small]:,} bytes'
    messages.warn(
      f'file_rate: found {found}, where {file_rate:.4g} was asked: there is nothing between'
    )
  for note in notes[small]:
    messages.warn(note)
  return small
