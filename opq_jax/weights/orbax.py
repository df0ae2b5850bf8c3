"""Reads Orbax folders: the tree of arrays of one, as a whole or leaf by leaf.

A folder is a checkpoint of one tree or the folder of a CheckpointManager; of the latter the default
item of the latest step is read.  Orbax takes seconds to import and is imported when there is a
folder to read.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opq_jax.core import messages, trees
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.core.trees import PyTree
from opq_jax.weights import checks

_TREE = '_METADATA'  # a file in every folder in which Orbax stores one tree
_STEP = re.compile(r'(?:.*[_-])?(\d+)', re.ASCII)
_UNFINISHED = '.orbax-checkpoint-tmp'
"""Part of the name of a folder that Orbax has not written to the end; some versions add a time."""


class OrbaxFolder:
  """A stored tree of arrays.

  Args:
    path: its folder, or a folder above it.

  Attributes:
    tree: Orbax's metadata at every leaf, with a shape and a dtype.

  Raises:
    ValueError: there is no tree, or more than one, or it is damaged.
  """

  def __init__(self, path: Path):
    self._folder = _tree_folder(path).absolute()
    with _checkpointer() as checkpointer:
      metadata = checkpointer.metadata(self._folder).item_metadata
    if metadata is None:  # Orbax logs why, and returns nothing
      raise ValueError(f'{path}: found metadata that Orbax cannot read, expected a whole folder')
    self.tree: PyTree = getattr(metadata, 'tree', metadata)

  def read(self) -> PyTree:
    """Returns the tree as host arrays."""
    return self._restored(self.tree)

  def read_leaf(self, name: str) -> np.ndarray:
    """Returns the leaf of a path name and reads no other."""
    import jax
    import orbax.checkpoint as ocp

    named = trees.named_leaves(self.tree)
    requested = [leaf if other == name else ocp.PLACEHOLDER for other, leaf in named.items()]
    restored = self._restored(jax.tree.unflatten(jax.tree.structure(self.tree), requested))
    return trees.named_leaves(restored)[name]

  def _restored(self, requested: PyTree) -> PyTree:
    """Returns the arrays of a tree of metadata; Orbax leaves its placeholders out."""
    import jax
    import orbax.checkpoint as ocp

    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self.tree)
    arguments = ocp.args.PyTreeRestore(item=requested, restore_args=as_numpy)
    with _checkpointer() as checkpointer:
      return checkpointer.restore(self._folder, args=arguments)


def open_leaves(path: Path) -> PyTree:
  """Returns the tree of a folder with a `StoredLeaf` for every array.

  Raises:
    ValueError: there is no tree of arrays, or more than one.
    OSError: it cannot be read.
  """
  import jax

  expected = 'an Orbax checkpoint'
  folder = checks.guarded(OrbaxFolder, path, expected)

  def fetch(name: str) -> np.ndarray:
    return checks.guarded(lambda _: folder.read_leaf(name), path, expected)

  leaves = []
  for name, leaf in trees.named_leaves(folder.tree).items():
    dtype = checks.dtype_of_numbers(path, name, leaf)
    leaves.append(StoredLeaf(os.fspath(path), name, tuple(leaf.shape), dtype, fetch))
  return jax.tree.unflatten(jax.tree.structure(folder.tree), leaves)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
  """Opens a checkpointer that does not log warnings."""
  import orbax.checkpoint as ocp

  logger = logging.getLogger('absl')
  level = logger.level
  try:
    # Orbax warns that the items of a step lack the metadata of a whole checkpoint
    logger.setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      yield checkpointer
  finally:
    logger.setLevel(level)


def _tree_folder(path: Path) -> Path:
  """Returns the folder of one tree at or below `path`: the default item of the latest step."""
  if (path / _TREE).is_file():
    return path
  folders = sorted(child for child in path.iterdir() if child.is_dir())
  whole = [child for child in folders if _UNFINISHED not in child.name]
  items = {child.name: child for child in whole if (child / _TREE).is_file()}
  steps = {
    int(match[1]): child for child in whole if (match := _STEP.fullmatch(child.name)) is not None
  }
  if 'default' in items:
    if others := [name for name in items if name != 'default']:
      messages.warn(f'{path}: {messages.listed(others)}: found trees beside default, left out')
    return items['default']
  if steps:
    return _tree_folder(steps[max(steps)])
  if len(items) == 1:
    return next(iter(items.values()))
  if items:
    raise ValueError(
      f'{path}: found the trees {", ".join(items)}, expected the folder of one of them, as '
      f'{next(iter(items.values()))}'
    )
  raise ValueError(
    f'{path}: found folders {[child.name for child in folders][:10]}, expected an Orbax checkpoint '
    'of one tree, or one that is called default'
  )
