"""Files and folders as one string of bytes, and damage to them that knows their formats.

A bundle is a file, or a folder with all its files.  Damage removes a file, puts another in its
place, mutates bytes, or replaces what a file says of itself: a value in JSON (an index, a config, a
manifest, the header of a safetensors file), or a field of an ONNX model or a Core ML program.
"""

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.robustness.mutated_bytes import mutated

_LIES = (
  *(-1, 0, 1, 7, 1 << 31, 1 << 40, (1 << 62) + 1, -(1 << 62), 0.5, True, None),
  *('', '.', '..', '../canary', '/etc/passwd', 'a/../../canary', 'x\0y', '\x1b[2J', 'ñ' * 300),
  *([], {}, [1 << 40, 1 << 40], [-5, -6], {'a': {'a': {}}}),
)
"""Values that a file may claim."""

_HEADER = 2048
"""Bytes: what begins with a header is damaged there as often as elsewhere."""


def packed(files: Mapping[str, bytes]) -> bytes:
  """Returns the bytes of a bundle."""
  parts = [part for name, data in files.items() for part in (name.encode(), data)]
  return b''.join(struct.pack('<I', len(part)) + part for part in parts)


def unpacked(bundle: bytes) -> dict[str, bytes]:
  """Returns the files of a bundle by name."""
  parts, place = [], 0
  while place < len(bundle):
    (size,) = struct.unpack_from('<I', bundle, place)
    parts.append(bundle[place + 4 : place + 4 + size])
    place += 4 + size
  return {name.decode(): data for name, data in zip(parts[::2], parts[1::2], strict=True)}


def files_of(path: Path) -> dict[str, bytes]:
  """Returns the files at or below a path by name; of a file, under its own name alone."""
  if path.is_file():
    return {path.name: path.read_bytes()}
  inner = sorted(child for child in path.rglob('*') if child.is_file())
  return {f'{path.name}/{child.relative_to(path)}': child.read_bytes() for child in inner}


def write(folder: Path, bundle: bytes) -> None:
  """Writes the files of a bundle into a folder."""
  for name, data in unpacked(bundle).items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def damaged(bundle: bytes, rng: random.Random) -> bytes:
  """Returns a bundle of which one file is missing, another one, mutated, or lies."""
  files = unpacked(bundle)
  name = rng.choice([*files])
  data = files[name]
  lie = _liar(name)
  drawn = rng.random()
  if len(files) > 1 and drawn < 0.04:
    del files[name]
    return packed(files)
  if len(files) > 1 and drawn < 0.08:
    files[name] = files[rng.choice([*files])]
  elif lie is not None and drawn < 0.65:
    files[name] = lie(data, rng)
  elif drawn < 0.8:
    files[name] = mutated(data[:_HEADER], rng) + data[_HEADER:]
  else:
    files[name] = mutated(data, rng)
  return packed(files)


def _liar(name: str) -> Callable[[bytes, random.Random], bytes] | None:
  """Returns what replaces a field of a file, None of formats without such."""
  if name.endswith('.json'):
    return lambda data, rng: _json_with_lie(data, rng)
  if name.endswith('.safetensors'):
    return _header_with_lie
  if name.endswith('.onnx'):
    return _onnx_with_lie
  if name.endswith('.mlmodel'):
    return _core_ml_with_lie
  return None


def _json_with_lie(data: bytes, rng: random.Random) -> bytes:
  content = json.loads(data)
  places: list[tuple[Any, Any]] = []

  def walk(node: Any) -> None:
    items: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
      items = [*node.items()]
    elif isinstance(node, list):
      items = [*enumerate(node)]
    for key, child in items:
      places.append((node, key))
      walk(child)

  walk(content)
  if not places:
    return json.dumps(rng.choice(_LIES)).encode()
  node, key = rng.choice(places)
  other, other_key = rng.choice(places)
  match rng.randrange(4):
    case 0:
      del node[key]
    case 1 if isinstance(node, dict):  # under another name
      node[str(rng.choice(_LIES))] = node.pop(key)
    case 2:  # what stands elsewhere; of a list, it may have gone
      node[key] = json.loads(json.dumps(other[other_key]))
    case _:
      node[key] = rng.choice(_LIES)
  return json.dumps(content).encode()


def _header_with_lie(data: bytes, rng: random.Random) -> bytes:
  end = 8 + int.from_bytes(data[:8], 'little')
  header = _json_with_lie(data[8:end], rng)
  return struct.pack('<Q', len(header)) + header + data[end:]


def _onnx_with_lie(data: bytes, rng: random.Random) -> bytes:
  import onnx

  model = onnx.ModelProto.FromString(data)
  return _message_with_lie(model, rng).SerializeToString()


def _core_ml_with_lie(data: bytes, rng: random.Random) -> bytes:
  from opq_jax.weights import core_ml

  model = core_ml.protocol('Core ML').Model_pb2.Model.FromString(data)
  return _message_with_lie(model, rng).SerializeToString()


def _message_with_lie(message: Any, rng: random.Random) -> Any:
  """Replaces one field of a message of protocol buffers, or of a message within."""
  inner = [message]
  while True:  # down to a message of any depth
    here = inner[-1]
    children = []
    for field, value in here.ListFields():
      if field.message_type is None:
        continue
      if hasattr(value, 'values') and field.message_type.GetOptions().map_entry:
        children += [one for one in value.values() if hasattr(one, 'ListFields')]
      elif hasattr(value, 'ListFields'):
        children.append(value)
      else:
        children += [*value]
    if not children:
      break
    inner.append(rng.choice(children))
  rng.shuffle(inner)
  for here in inner:
    fields = [(field, value) for field, value in here.ListFields()]
    rng.shuffle(fields)
    for field, value in fields:
      if _set_lie(here, field, value, rng):
        return message
  return message


def _set_lie(message: Any, field: Any, value: Any, rng: random.Random) -> bool:
  """Puts a lie into a field, or into an item of it; returns whether the field takes it."""
  is_list = not isinstance(value, str | bytes | int | float | bool) and field.message_type is None
  kinds: dict[int, tuple[type, ...]] = {
    field.CPPTYPE_STRING: (str, bytes),
    field.CPPTYPE_ENUM: (int,),
  }
  number = (int, float) if field.message_type is None else ()
  lies = [lie for lie in _LIES if isinstance(lie, kinds.get(field.cpp_type, number))]
  if field.type == field.TYPE_BYTES:
    lies = [b'', b'\xff' * 9, bytes(1 << 10)]
  if is_list and rng.random() < 0.2:
    place = rng.randrange(len(value))
    value.extend([value[place]])
    return True
  if not lies or (field.message_type is not None):
    if field.message_type is not None and not hasattr(value, 'ListFields') and len(value):
      if hasattr(value, 'values'):  # a map
        return False
      value.extend([value[rng.randrange(len(value))]])  # twice
      return True
    return False
  lie: Any = rng.choice(lies)
  try:
    if is_list:
      value[rng.randrange(len(value))] = lie
    else:
      setattr(message, field.name, lie)
  except (TypeError, ValueError):  # out of the range of the type
    return False
  return True
