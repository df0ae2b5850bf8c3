"""Leaves that are buffers by their values: masks of 0 and 1, and masks of 0 and -infinity.

A mask that is added to the scores of attention has 0 where a token may look, and elsewhere a number
so low that no exponential is left: -infinity, the least number of its dtype, or -1e4 and less.  A
mask that is multiplied has 0 and 1.  No layer has such weights, whatever the leaf is called.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

LARGEST_SENTINEL = -9e3
"""Upper bound of what stands for -infinity: -1e4 is -9984 in bfloat16."""

_HEAD = 1 << 10  # weights that are looked at first: hardly any leaf is a buffer


def is_buffer(leaf: Any) -> bool:
  """Returns whether a leaf holds 0 and 1 alone, or 0 and numbers that stand for -infinity.

  Leaves of zeros alone are none.  Neither is a leaf whose values are not known here: statistics, a
  tracer, an array that lies on other processes too.

  Args:
    leaf: an array; or a leaf on disk, with `first()` and `read()`.

  >>> causal = np.where(np.triu(np.ones((3, 3)), 1), np.finfo(np.float32).min, 0)
  >>> is_buffer(causal), is_buffer(np.tril(np.ones((3, 3)))), is_buffer(np.eye(3) / 2)
  (True, True, False)
  """
  head = first_weights(leaf)
  if head is None or not _has_sentinels(head):
    return False
  values = np.asarray(leaf.read() if hasattr(leaf, 'read') else leaf)
  return bool(values.any()) and _has_sentinels(values)


def first_weights(leaf: Any) -> Shaped[np.ndarray, ' n'] | None:
  """Returns some of the first weights of a leaf; None where they are not known.

  Args:
    leaf: as for `is_buffer`.
  """
  if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, 'is_fully_addressable', True):
    return None
  if hasattr(leaf, 'first'):
    return np.asarray(leaf.first()).reshape(-1)[:_HEAD]
  if isinstance(leaf, jax.Array):
    leaf = leaf.addressable_data(0)
    # a row is enough to fetch from an accelerator; on the host the array is its own memory
    leaf = leaf if leaf.device.platform == 'cpu' else leaf[:1]
  elif not isinstance(leaf, np.ndarray):
    return None
  return np.asarray(leaf).reshape(-1)[:_HEAD]


def _has_sentinels(values: Shaped[np.ndarray, '...']) -> bool:
  if values.dtype.kind not in 'fV':  # V: of ml_dtypes
    return False
  numbers = values if values.dtype.kind == 'f' else values.astype(np.float32)
  is_zero = numbers == 0
  return bool((is_zero | (numbers == 1)).all() or (is_zero | (numbers <= LARGEST_SENTINEL)).all())
