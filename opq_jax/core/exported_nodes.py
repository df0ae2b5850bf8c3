"""Registration of pytree classes with `jax.export`, so that an exported function may take them."""

import dataclasses
import json
from typing import Any

import numpy as np
from jax import export


def register(kind: type) -> type:
  """Makes a `flax.struct.dataclass` a node that `jax.export` writes and reads; returns the class.

  Its static fields are written as JSON: numbers, strings, None, tuples and dtypes.  Whoever reads
  an exported function imports the class first.
  """
  fields = dataclasses.fields(kind)
  names = [field.name for field in fields if field.metadata.get('pytree_node', True)]
  static = [field.name for field in fields if not field.metadata.get('pytree_node', True)]

  def write(values: tuple[Any, ...]) -> bytes:
    return json.dumps([_to_json(value) for value in values]).encode()

  def read(text: bytes) -> tuple[Any, ...]:
    return tuple(map(_from_json, json.loads(bytes(text))))

  def make(aux_data: Any, children: Any) -> Any:
    named = zip((*static, *names), (*aux_data, *children), strict=True)
    return kind(**dict(named))

  export.register_pytree_node_serialization(
    kind,
    serialized_name=f'opq_jax.{kind.__name__}',
    serialize_auxdata=write,
    deserialize_auxdata=read,
    from_children=make,
  )
  return kind


def _to_json(value: Any) -> Any:
  if isinstance(value, tuple):
    return {'tuple': [_to_json(item) for item in value]}
  if isinstance(value, np.dtype):
    return {'dtype': value.name}
  return value


def _from_json(value: Any) -> Any:
  match value:
    case {'tuple': items}:
      return tuple(map(_from_json, items))
    case {'dtype': name}:
      return np.dtype(name)
  return value
