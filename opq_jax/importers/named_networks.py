"""What the metadata of an `.opq` file say of its network: name, source of the weights, classes."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from opq_jax.file.reader import OpqFile

KEYS = NAME, SOURCE, CLASSES = 'model', 'source', 'num_classes'
"""Metadata keys of a network's name, source and number of classes."""


class Identity(NamedTuple):
  """Name, source and number of classes of the network in a file."""

  name: str
  source: str
  num_classes: int


def identity(found: Mapping[str, str]) -> Identity | None:
  """Returns the network that the metadata of a file name, None where they name none.

  Raises:
    ValueError: one of the three keys is missing, or the number of classes is no number.

  >>> identity({'model': 'resnet50', 'source': 'timm', 'num_classes': '1000'})
  Identity(name='resnet50', source='timm', num_classes=1000)
  >>> identity({'weights': 'net.npz'}) is None
  True
  """
  if NAME not in found:
    return None
  missing = [key for key in KEYS if key not in found]
  classes = found.get(CLASSES, '')
  if missing or not classes.isdecimal():
    shown = {key: found[key] for key in KEYS if key in found}
    raise ValueError(f'metadata: found {shown}, expected a name for each of {", ".join(KEYS)}')
  return Identity(found[NAME], found[SOURCE], int(classes))


def identity_of(path: str | os.PathLike[str]) -> Identity | None:
  """Returns the network that a file names, None where it names none or is no `.opq` file.

  Raises:
    ValueError: the metadata are not complete (`identity`), or the file is damaged.
    OSError: the file cannot be read.
  """
  if not os.fspath(path).lower().endswith('.opq'):
    return None
  with OpqFile(path) as file:
    try:
      return identity(file.metadata)
    except ValueError as error:
      raise ValueError(f'{os.fspath(path)}: {error}') from error
