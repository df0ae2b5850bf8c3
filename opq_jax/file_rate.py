"""The compression rate that makes the whole file so many times smaller.

`opq_jax.allocate` is asked for the rate of the codes alone.  A file holds more (biases, BatchNorm,
tables, headers), which matters for small networks.
"""

import dataclasses
from typing import Any

import jax

from opq_jax import artifact
from opq_jax.allocation import Allocation, allocate
from opq_jax.compression import CompressionState, init_state
from opq_jax.trees import PyTree

_TOLERANCE = 2e-3  # of the size, towards smaller alone
_MAX_STEPS = 8


@dataclasses.dataclass(frozen=True)
class FileTarget:
  """What `at_file_rate` found.

  Attributes:
    allocation, state: of the whole tree, such that the file is about as small as asked.
    compression_rate: what `allocate` was asked for.
    file_bytes: of the file.
    file_rate: bytes of the tree in its own dtypes over those of the file.
  """

  allocation: Allocation
  state: CompressionState
  compression_rate: float
  file_bytes: int
  file_rate: float


def at_file_rate(variables: PyTree, file_rate: float, **options: Any) -> FileTarget:
  """Allocates such that the `.opq` file is `file_rate` times smaller than the tree, or 0.2 % more.

  The size is nearly a line in the bits per weight, b = 32 / compression_rate:
  size(b) = rest + n b / 8.  The first guess takes the rest to be nothing; then a secant, at most
  eight steps.

  Args:
    variables: the whole network, as it will be saved.
    file_rate: bytes of the tree over bytes of the file.
    **options: of `opq_jax.allocate`, such as `objective`.

  Returns:
    A `FileTarget`; the last of the steps where none was within 0.2 % (a very small tree).

  Raises:
    ValueError: what `allocate` raises, or the uncompressed leaves alone are larger than the file
      may be.

  >>> import jax.numpy as jnp
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> found = at_file_rate({'kernel': kernel, 'bias': jnp.ones(256)}, 16.0)
  >>> round(found.file_rate, 1), found.compression_rate > 16.0
  (16.0, True)
  """
  original = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  limit = original / file_rate
  target = limit * (1 - _TOLERANCE / 2)
  bits, slope = 32 / file_rate, original / 32
  last: FileTarget | None = None
  for _ in range(_MAX_STEPS):
    if bits <= 0:
      raise ValueError(
        f'file_rate: found {file_rate}, a file of {limit:.0f} bytes, expected more than what the '
        'uncompressed leaves take'
      )
    allocation = allocate(variables, compression_rate=32 / bits, **options)
    state = init_state(variables, allocation)
    size = len(artifact.serialize(variables, state))
    found = FileTarget(allocation, state, 32 / bits, size, original / size)
    if limit * (1 - _TOLERANCE) <= size <= limit:
      break
    if last is not None and size != last.file_bytes:
      slope = (size - last.file_bytes) / (bits - 32 / last.compression_rate)
    last = found
    bits += (target - size) / slope
  return found
