"""Arguments of `allocate` that are not given, from the usage of the leaves.

`opq_jax.usage` reads from a function's jaxpr how it uses each leaf of its parameters.  Only the
attributes below are read here: the allocation knows nothing of functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from opq_jax.allocation.selection import can_be_compressed, is_compressible
from opq_jax.core import trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.trees import PyTree


class Usage(Protocol):
  """How a function uses a leaf, as `opq_jax.network.LeafUsage` says it."""

  @property
  def is_compressible(self) -> bool:
    """Whether the leaf is a stack of matrices that are multiplied or looked up."""

  @property
  def channel_axis(self) -> ChannelAxes:
    """The axis of the output channels, or several."""

  @property
  def slices(self) -> int:
    """How many leading axes count slices."""

  @property
  def share(self) -> float:
    """Share of all rows of inputs that a slice is multiplied with."""


class Arguments(NamedTuple):
  """Arguments of `allocate`, all given.

  Attributes:
    compressible: (path, leaf) -> whether the leaf is compressed.
    channel_axis: axis of the output channels, or (path, leaf) -> axis.
    slices: (path, leaf) -> how many leading axes count slices, or None for none.
    shares: of every leaf by path; None where all are 1.
  """

  compressible: Callable[[str, Any], bool]
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes]
  slices: Callable[[str, Any], int] | None
  shares: dict[str, float] | None


def arguments_of(
  params: PyTree,
  usage: PyTree | None,
  compressible: Callable[[str, Any], bool] | None,
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes] | None,
  slices: Callable[[str, Any], int] | None,
) -> Arguments:
  """Returns the arguments, those that are None by the usage of the leaves.

  Args:
    params: the tree.
    usage: the same tree with a `Usage` at every leaf, or None.
    compressible, channel_axis, slices: as for `allocate`.

  Raises:
    ValueError: `usage` is of another tree.
  """
  if usage is None:
    axis = -1 if channel_axis is None else channel_axis
    return Arguments(compressible or is_compressible, axis, slices, None)
  try:
    nodes = trees.records(params, usage, object)
  except ValueError as error:
    raise ValueError(
      f'usage: found another tree than that of the parameters, expected opq_jax.usage(fn, params, '
      f'*inputs): {error}'
    ) from error
  used: dict[str, Usage] = dict(zip(trees.named_leaves(params), nodes, strict=True))
  shares = {name: float(leaf.share) for name, leaf in used.items()}
  is_multiplied = lambda path, leaf: can_be_compressed(leaf) and used[path].is_compressible
  return Arguments(
    compressible or is_multiplied,
    (lambda path, _: used[path].channel_axis) if channel_axis is None else channel_axis,
    slices or (lambda path, _: used[path].slices),
    shares if any(share != 1 for share in shares.values()) else None,
  )
