"""Uncompressed leaves that are an earlier one again: large ones are stored once."""

import hashlib

import numpy as np
from jaxtyping import Shaped

from opq_jax.file.packing import BLOCK

LEAST_BYTES = BLOCK
"""Bytes of the smallest leaf that is compared with others: within a block, LZMA finds what repeats,
and an entry of its own takes about as many bytes."""


class RepeatedLeaves:
  """Finds, leaf after leaf, those whose bytes an earlier one has.

  >>> table = np.arange(1 << 18, dtype=np.float32)
  >>> seen = RepeatedLeaves()
  >>> [seen.first(number, leaf) for number, leaf in enumerate([table, table + 1, table.copy()])]
  [None, None, 0]
  """

  def __init__(self) -> None:
    self._numbers: dict[tuple[np.dtype, tuple[int, ...], bytes], int] = {}

  def first(self, number: int, array: Shaped[np.ndarray, '...']) -> int | None:
    """Returns the number of the first leaf of these bytes; None where it is this one, or small.

    Args:
      number: of the leaf in its tree.
      array: its values.
    """
    if array.nbytes < LEAST_BYTES:
      return None
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    # a digest, not the array: leaves on disk do not stay in memory
    key = array.dtype, array.shape, hashlib.sha256(content.data).digest()
    first = self._numbers.setdefault(key, number)
    return None if first == number else first
