"""The description of a file, for `opq report` and `opq card`."""

from pathlib import Path
from typing import Any


def described(path: Path) -> dict[str, Any]:
  """Returns `opq_jax.report.file_description` of a file, with the channels that its names tell.

  Rates are left out where an optimizer's state is not kept: it would make the network look larger
  than it was.
  """
  from opq_jax.cli.encoding import channel_axis, lacks_optimizer
  from opq_jax.file.reader import OpqFile
  from opq_jax.report import file_description

  with OpqFile(path) as file:
    metadata = file.metadata
    counts = {name: file.slices(name) for name in file}
  axis = channel_axis(metadata, lambda name, _: counts[name])
  description = file_description(path, channel_axis=axis)
  if lacks_optimizer(metadata):
    description |= {'original': None, 'asFloat32': None}
  return description
