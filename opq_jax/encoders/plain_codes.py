"""Says which leaves an encoder does not serve: they have plain codes."""

from collections.abc import Sequence

from opq_jax.core import messages


class PlainCodesWarning(UserWarning):
  """Leaves that the trellis does not serve, and that have plain codes.

  Args:
    names: their paths; none where the leaf that is being coded is meant.
  """

  def __init__(self, names: Sequence[str] = ()):
    super().__init__(
      f'{messages.listed(names) or "weights"}: found leaves that the trellis does not serve, for '
      'their shape or their many weights beyond its levels: they have plain codes'
    )


def without_plain_codes(
  notes: Sequence[str | Warning], name: str, plain: list[str]
) -> list[str | Warning]:
  """Returns warnings of a leaf without `PlainCodesWarning`, for which the leaf is added to `plain`.

  >>> plain = []
  >>> without_plain_codes([PlainCodesWarning(), 'all weights are pruned'], 'dense/kernel', plain)
  ['all weights are pruned']
  >>> plain
  ['dense/kernel']
  """
  others = [note for note in notes if not isinstance(note, PlainCodesWarning)]
  if len(others) < len(notes) and name not in plain:
    plain.append(name)
  return others
