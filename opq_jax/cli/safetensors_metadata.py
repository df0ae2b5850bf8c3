"""The strings that a .safetensors file has beside its weights: carried there and back.

They stand in the metadata of the `.opq` file as one JSON object, under the key
`safetensors_metadata`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

KEY = 'safetensors_metadata'


def carried_metadata(source: Path) -> dict[str, str]:
  """Returns what a file carries of the metadata of its source; nothing of other formats.

  Raises:
    ValueError: the source is no safetensors file, or damaged.
    OSError: it cannot be read.
  """
  from opq_jax.weights import safetensors

  if source.suffix.lower() != '.safetensors' or source.is_dir():
    return {}
  found = safetensors.metadata_of(source)
  return {KEY: json.dumps(found, sort_keys=True)} if found else {}


def given_back(metadata: Mapping[str, str]) -> dict[str, str]:
  """Returns the metadata of the source, from those of a file.

  Raises:
    ValueError: the text is no JSON object of strings.

  >>> given_back({KEY: '{"format": "pt"}', 'weights': 'net.safetensors'})
  {'format': 'pt'}
  """
  try:
    found = json.loads(metadata.get(KEY, '{}'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'metadata: {KEY}: found no JSON, {error}') from error
  if type(found) is not dict or not all(type(text) is str for text in found.values()):
    raise ValueError(f'metadata: {KEY}: found {str(found)[:80]}, expected an object of strings')
  return found
