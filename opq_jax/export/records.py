"""What an export tells of the file that it has written."""

from typing import NamedTuple


class ExportedLeaf(NamedTuple):
  """What stands in the place of a compressed leaf.

  Attributes:
    name: of the leaf.
    form: what its weights are, in words: `UINT8`, `UINT8 of 2 weights`, `floats`, ...
    bytes: of its tensors and nodes.
    float_bytes: of its float initializer.
    reason: why it is a float initializer; '' where it is none.
  """

  name: str
  form: str
  bytes: int
  float_bytes: int
  reason: str = ''


class ExportedModel(NamedTuple):
  """A file of another runtime that was written.

  Attributes:
    leaves: the compressed leaves that it has.
    size: its bytes.
    changed: leaves that are stored bit for bit, and differ from those of the float network: in it
      now.
    without_place: leaves of the `.opq` file that are no tensors of the float network.
    left: weights of the float network that the `.opq` file does not have, with their bytes.
    rounded: leaves that the dtype of the float network has rounded.
  """

  leaves: tuple[ExportedLeaf, ...]
  size: int
  changed: tuple[str, ...]
  without_place: tuple[str, ...]
  left: dict[str, int]
  rounded: tuple[str, ...] = ()
