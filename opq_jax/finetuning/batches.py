"""A batch as a step takes it: padded to a fixed size, or cut into equal parts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Batch = Mapping[str, Any]
"""`image` [batch, …], `label` [batch] of whole numbers, and whatever else the loss reads."""


def pad_batch(batch: Batch, size: int) -> dict[str, np.ndarray]:
  """Pads a last, smaller batch with zeros to `size` examples.

  Returns:
    The padded arrays, and `is_example`, False for padding.

  Raises:
    ValueError: the batch is larger than `size`.

  >>> padded = pad_batch({'label': np.array([3, 4])}, 3)
  >>> padded['label'].tolist(), padded['is_example'].tolist()
  ([3, 4, 0], [True, True, False])
  """
  count = len(batch['label'])
  if count > size:
    raise ValueError(f'batch: found {count} examples, expected at most {size}')
  pad = lambda leaf: np.pad(leaf, [(0, size - count)] + [(0, 0)] * (np.ndim(leaf) - 1))
  padded = {name: pad(leaf) for name, leaf in batch.items()}
  return {**padded, 'is_example': np.arange(size) < count}


def split_batch(batch: Batch, count: int, parts: str = 'devices') -> dict[str, Any]:
  """Reshapes [batch, …] to [count, batch / count, …], in order.

  Args:
    batch: arrays whose first axis is the batch.
    count: number of parts.
    parts: the word for them in the error message.

  Raises:
    ValueError: the count does not divide the batch.

  >>> split_batch({'label': np.arange(6)}, 2)['label'].tolist()
  [[0, 1, 2], [3, 4, 5]]
  """
  for leaf in batch.values():
    check_divides(leaf, count, parts)
  return {
    name: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])
    for name, leaf in batch.items()
  }


def check_divides(leaf: Any, count: int, parts: str) -> None:
  """Raises ValueError where `count` parts, devices say, do not divide the batch."""
  if leaf.shape[0] % count:
    raise ValueError(
      f'batch: found {leaf.shape[0]} examples, expected a multiple of {count} {parts}'
    )
