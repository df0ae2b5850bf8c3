"""Reads Flax's msgpack files (`flax.serialization.to_bytes`): nested dicts of arrays."""

from pathlib import Path
from typing import Any

from opq_jax.weights import checks


def read(path: Path) -> dict[str | int, Any]:
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
  msgpack.unpackb(
    data, object_pairs_hook=_unique, ext_hook=lambda *_: None, raw=False, strict_map_key=False
  )
  tree = flax.serialization.msgpack_restore(data)
  if not isinstance(tree, dict):
    raise ValueError(f'{path}: found {type(tree).__name__}, expected a tree of arrays')
  return tree


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
  """Returns the dict of pairs whose names are strings, or the places of an `nnx.List`: integers.

  Raises:
    ValueError: a name occurs twice, is neither, or stands beside one of the other kind.
  """
  places = [name for name, _ in pairs if type(name) is int]
  if not places:
    return checks.unique(pairs)
  if len(places) < len(pairs):
    raise ValueError(f'found names {[name for name, _ in pairs][:10]}, expected all of one kind')
  checks.unique([(str(name), value) for name, value in pairs])
  return dict(pairs)
