"""Reads Flax's msgpack files (`flax.serialization.to_bytes`): nested dicts of arrays."""

from pathlib import Path
from typing import Any

from opq_jax.weights import checks


def read(path: Path) -> dict[str, Any]:
  """Returns the tree of a file.

  Raises:
    ValueError: a name occurs twice, or the file is no tree.
    Exception: whatever msgpack and Flax raise at damaged bytes.
  """
  # msgpack is a requirement of Flax
  import flax.serialization
  import msgpack

  data = path.read_bytes()
  # Flax would keep one of two values of a name
  msgpack.unpackb(data, object_pairs_hook=checks.unique, ext_hook=lambda *_: None, raw=False)
  tree = flax.serialization.msgpack_restore(data)
  if not isinstance(tree, dict):
    raise ValueError(f'{path}: found {type(tree).__name__}, expected a tree of arrays')
  return tree
