"""Which leaves are compressed, and in which dtype."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opq_jax.allocation import is_compressible
from opq_jax.allocation.buffers import is_buffer
from opq_jax.allocation.leaf_names import kind_of_name
from opq_jax.allocation.optimizer_states import optimizer_leaves
from opq_jax.allocation.selection import can_be_compressed, left_by_place
from opq_jax.cli.encoding import slices_of
from opq_jax.cli.globs import matches
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import GraphUse, StoredLeaf

_MASKS = 'masks by their values'


def chosen_paths(
  params: PyTree,
  include: Sequence[str],
  exclude: Sequence[str],
  graph: Mapping[str, GraphUse] | None = None,
) -> set[str]:
  """Returns the paths of the leaves to compress.

  Args:
    params: the weights; `is_compressible` says which leaves are compressed by default, of which
      masks by their values (`is_buffer`) are left out.
    include: globs; if there are any, a leaf must match one of them.  A glob that matches none of
      the default's leaves chooses the other leaves that it matches: matrices whose name is that of
      a bias, a mask, ...
    exclude: globs; a leaf must match none of them.
    graph: the weights of an ONNX file by its graph, which then says what is compressed by default
      in the place of names.

  Raises:
    ValueError: a glob of `include` matches no leaf that can be compressed, or one of `exclude` no
      leaf.
  """
  named = trees.named_leaves(params)
  moments, left = set(optimizer_leaves(named)), left_by_place(named)
  possible = [
    path for path, leaf in named.items() if path not in moments and can_be_compressed(leaf)
  ]
  default = [
    path
    for path in possible
    if (path not in left and is_compressible(path, named[path]) if graph is None else path in graph)
    and not is_buffer(named[path])
  ]
  for option, globs, paths in (('--include', include, possible), ('--exclude', exclude, [*named])):
    for glob in globs:
      if not _matching(paths, glob):
        raise ValueError(
          f'{option}: found no leaf that {glob!r} matches, expected one of {possible[:5]}'
        )
  chosen = set(default)
  if include:
    chosen = {
      path for glob in include for path in _matching(default, glob) or _matching(possible, glob)
    }
  return chosen.difference(*(_matching(possible, glob) for glob in exclude))


def checked_slices(slices: Mapping[str, int], chosen: set[str]) -> Callable[[str, Any], int]:
  """Returns (path, leaf) -> how many leading axes count slices.

  Args:
    slices: globs and numbers.
    chosen: the paths of the leaves to compress.

  Raises:
    ValueError: a glob matches none of them.
  """
  for glob in slices:
    if not _matching([*chosen], glob):
      raise ValueError(
        f'--slices: found no compressed leaf that {glob!r} matches, expected one of '
        f'{sorted(chosen)[:5]}'
      )
  return slices_of(slices)


def names_note(
  params: PyTree,
  chosen: set[str],
  exclude: Sequence[str],
  graph: Mapping[str, GraphUse] | None = None,
) -> str:
  """Returns a line about matrices that are left alone because of their names; '' without any.

  Args:
    params: the weights.
    chosen: the paths of the leaves to compress.
    exclude: globs of leaves that are known to be left alone.
    graph: the weights of an ONNX file by its graph.
  """
  named = trees.named_leaves(params)
  moments, excluded = set(optimizer_leaves(named)), set()
  for glob in exclude:
    excluded.update(_matching([*named], glob))
  first: dict[str, str] = {}
  count = 0
  for path, leaf in named.items():
    if path in chosen | moments | excluded or not can_be_compressed(leaf):
      continue
    count += 1
    kind = kind_of_name(path) or (_MASKS if is_buffer(leaf) else 'biases')
    if graph is not None:
      kind = _MASKS if path in graph else 'read by no product and no look-up of the graph'
    first.setdefault(kind, path)
  if not count:
    return ''
  kinds = ', '.join(f'{kind} ({path})' for kind, path in first.items())
  leaves = '1 leaf' if count == 1 else f'{count} leaves'
  reason = 'by name or values' if _MASKS in first else 'by name'
  reason = reason if graph is None else 'by graph or values'
  return f'{leaves} of two axes or more stored bit for bit, {reason}: {kinds}; see --include'


def _matching(paths: Sequence[str], glob: str) -> list[str]:
  return [path for path in paths if matches(path, glob)]


def narrowed(params: PyTree, chosen: set[str]) -> PyTree:
  """Returns the tree with its chosen float64 leaves in float32, JAX's widest by default.

  Stored leaves stay on disk, and are read as float32.
  """
  as_float32 = lambda leaf: (
    leaf.narrowed() if isinstance(leaf, StoredLeaf) else leaf.astype(np.float32)
  )
  named = trees.named_leaves(params).items()
  is_wide = lambda path, leaf: path in chosen and leaf.dtype == np.float64
  return trees.replaced(
    params, {path: as_float32(leaf) for path, leaf in named if is_wide(path, leaf)}
  )
