"""Folders of Orbax: the tree of arrays in one, as a whole or leaf by leaf.

A folder is a checkpoint of one tree, or a CheckpointManager's, of which the latest step is read,
and in it the default item.  Orbax takes seconds to import, which no other format needs: it is
imported when there is a folder to read.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

_TREE = '_METADATA'  # the file that every folder has in which Orbax keeps one tree
_STEP = re.compile(r'(?:.*[_-])?(\d+)', re.ASCII)


class OrbaxFolder:
  """One tree of arrays.

  Args:
    path: the folder, or one above it.

  Attributes:
    tree: Orbax's metadata of every leaf, which have a shape and a dtype.

  Raises:
    ValueError: there is no tree, or more than one.
  """

  def __init__(self, path: Path):
    self._folder = _tree_folder(path).absolute()
    with _checkpointer() as checkpointer:
      metadata = checkpointer.metadata(self._folder).item_metadata
    self.tree: PyTree = getattr(metadata, 'tree', metadata)

  def read(self) -> PyTree:
    """All leaves, as host arrays."""
    return self._restored(self.tree)

  def read_leaf(self, name: str) -> np.ndarray:
    """The leaf of a path name, and nothing else of the folder."""
    import orbax.checkpoint as ocp

    named = trees.named_leaves(self.tree)
    wanted = [leaf if other == name else ocp.PLACEHOLDER for other, leaf in named.items()]
    found = self._restored(jax.tree.unflatten(jax.tree.structure(self.tree), wanted))
    return trees.named_leaves(found)[name]

  def _restored(self, wanted: PyTree) -> PyTree:
    import orbax.checkpoint as ocp

    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self.tree)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy)
    with _checkpointer() as checkpointer:
      return checkpointer.restore(self._folder, args=arguments)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
  import orbax.checkpoint as ocp

  logger = logging.getLogger('absl')
  level = logger.level
  try:
    # a step's items have no metadata of a whole checkpoint, and Orbax warns of it
    logger.setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      yield checkpointer
  finally:
    logger.setLevel(level)


def _tree_folder(path: Path) -> Path:
  """The folder of one tree at or below `path`: the latest step, and in it the default item."""
  if (path / _TREE).is_file():
    return path
  folders = sorted(child for child in path.iterdir() if child.is_dir())
  trees_in = {child.name: child for child in folders if (child / _TREE).is_file()}
  steps = {
    int(match[1]): child for child in folders if (match := _STEP.fullmatch(child.name)) is not None
  }
  if 'default' in trees_in:
    return trees_in['default']
  if steps:
    return _tree_folder(steps[max(steps)])
  if len(trees_in) == 1:
    return next(iter(trees_in.values()))
  raise ValueError(
    f'{path}: found items {list(trees_in)} among {[child.name for child in folders][:10]}, '
    'expected an Orbax checkpoint of one tree, or one that is called default'
  )
