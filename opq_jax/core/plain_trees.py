"""Trees of dicts, lists, tuples and None alone, walked without JAX, in the order of JAX."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opq_jax.core.stored_leaves import StoredLeaf

Node = Any
"""A plain tree, or a leaf of one."""

MAX_NAMES = 1 << 24
"""Characters of all path names together: one long key above many leaves is in every name."""

MAX_DEPTH = 100
"""Containers within containers, well within the bound of Python's own recursion."""


def is_plain(tree: Node, depth: int = 0) -> bool:
  """Returns whether a tree has no other containers and no other leaves than NumPy's and Python's.

  Arrays on disk are leaves as well.

  Args:
    tree: any tree.
    depth: containers above it; a tree deeper than `MAX_DEPTH` is left to JAX.

  >>> is_plain({'a': [np.ones(3), None], 'b': 1.0}), is_plain({1, 2})
  (True, False)
  """
  if type(tree) in (dict, list, tuple):
    children = tree.values() if type(tree) is dict else tree
    return depth < MAX_DEPTH and all(is_plain(child, depth + 1) for child in children)
  return isinstance(tree, np.ndarray | np.generic | int | float | complex | str | StoredLeaf | None)


def named_leaves(tree: Node) -> dict[str, Any]:
  """Returns the leaves of a plain tree by path name, in the order in which JAX flattens them.

  Dicts go by their sorted keys.

  Raises:
    ValueError: two leaves have the same name, or keys of one dict have no order.

  >>> named_leaves({'b': [3, None, 4], 'a': 2})
  {'a': 2, 'b/0': 3, 'b/2': 4}
  """
  named: dict[str, Any] = {}

  def walk(node: Node, path: tuple[str, ...]) -> None:
    if isinstance(node, dict):
      try:
        children = sorted(node.items(), key=lambda item: item[0])
      except TypeError as error:
        raise ValueError(f'{"/".join(path)}: found keys without an order: {error}') from error
    elif isinstance(node, list | tuple):
      children = list(enumerate(node))
    else:
      if node is not None:
        if (name := '/'.join(path)) in named:
          raise ValueError(f'{name}: found two leaves of this path, expected every path once')
        named[name] = node
      return
    for key, child in children:
      walk(child, (*path, str(key)))

  walk(tree, ())
  return named


def replaced(tree: Node, new: Mapping[str, Any]) -> Node:
  """Returns a plain tree with the leaves named in `new` replaced.

  >>> replaced({'b': [3, None], 'a': 2}, {'b/0': 5})
  {'b': [5, None], 'a': 2}
  """

  def walk(node: Node, path: tuple[str, ...]) -> Node:
    if isinstance(node, dict):
      return {key: walk(child, (*path, str(key))) for key, child in node.items()}
    if isinstance(node, list | tuple):
      return type(node)(walk(child, (*path, str(i))) for i, child in enumerate(node))
    return None if node is None else new.get('/'.join(path), node)

  return walk(tree, ())


def check_names(tree: Node) -> None:
  """Checks how long the path names of all leaves would be, before they are made.

  Raises:
    ValueError: the names have more than `MAX_NAMES` characters together, or containers lie deeper
      than `MAX_DEPTH`.

  >>> check_names({'a': [1, {'b': None}]})
  """

  def characters(node: Any, length: int, depth: int) -> int:
    if depth > MAX_DEPTH:
      raise ValueError(f'found a tree deeper than {MAX_DEPTH} containers, expected no deeper one')
    items: Any = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list | tuple):
      items = enumerate(node)
    elif not isinstance(node, dict):
      return 0 if node is None else length
    return sum(characters(child, length + 1 + len(str(key)), depth + 1) for key, child in items)

  if (found := characters(tree, 0, 0)) > MAX_NAMES:
    raise ValueError(f'found path names of {found} characters, expected at most {MAX_NAMES}')
