"""Parameter trees, and trees of the same structure that hold one record per compressed leaf.

An allocation and a compression state have the structure of the parameters, with a small struct
where a leaf is compressed and None where it passes through.  The functions here name the leaves of
a tree and walk a tree together with its records.

JAX is imported where a tree is not plain (`opq_jax.core.plain_trees`), and by the functions that
need it: a file can be opened, checked and decompressed without it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from opq_jax.core import plain_trees

if TYPE_CHECKING:
  from jax.tree_util import KeyPath

PyTree = Any

_MAX_LISTED = 10  # paths of each kind that an error lists: a large tree has thousands


def path_name(path: 'KeyPath') -> str:
  """Returns the readable name of a key path: `params/Conv_0/kernel`.

  >>> import jax
  >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({'params': [1.0]})
  >>> path_name(path)
  'params/0'
  """
  from jax import tree_util

  return tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of `tree` by path name, in JAX's flattening order.

  Raises:
    ValueError: two leaves have the same name, as in `{'a/b': …, 'a': {'b': …}}`.

  >>> named_leaves({'b': {'c': 1}, 'a': 2})
  {'a': 2, 'b/c': 1}
  """
  if plain_trees.is_plain(tree):
    return plain_trees.named_leaves(tree)
  from jax import tree_util

  named = {}
  for path, leaf in tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    if name in named:
      raise ValueError(f'{name}: found two leaves of this path, expected every path once')
    named[name] = leaf
  return named


def slice_name(name: str, index: tuple[int, ...]) -> str:
  """Returns the name of a slice of a leaf, for messages.

  >>> slice_name('params/kernel', (3, 5)), slice_name('params/kernel', ())
  ('slice 3,5 of params/kernel', 'params/kernel')
  """
  return f'slice {",".join(map(str, index))} of {name}' if index else name


def beside(tree: PyTree, other: PyTree) -> list[Any]:
  """Returns the node of `other` at the place of each leaf of `tree`, in flattening order.

  Raises:
    ValueError, TypeError or KeyError: the containers of `other` differ from those of `tree`.

  >>> beside({'a': 1, 'b': 2}, {'a': None, 'b': (3, 4)})
  [None, (3, 4)]
  """
  import jax

  structure: Any = jax.tree.structure(tree)
  return structure.flatten_up_to(other)


def replaced(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
  """Returns `tree` with the leaves named in `new` replaced.

  >>> replaced({'a': 1, 'b': 2}, {'b': 3})
  {'a': 1, 'b': 3}
  """
  if plain_trees.is_plain(tree):
    return plain_trees.replaced(tree, new)
  from jax import tree_util

  return tree_util.tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), tree)


def records(tree: PyTree, record_tree: PyTree, kind: type) -> list[Any]:
  """Returns the record of each leaf of `tree`, or None.

  Args:
    tree: a parameter tree.
    record_tree: the same tree with a `kind` or None at every leaf; where `tree` has an array, it
      may be in a variable of Flax NNX.
    kind: the class of the records.

  Returns:
    One entry per leaf of `tree`, in flattening order.

  Raises:
    ValueError: the trees differ in structure.  The message lists the paths of each tree that are
      missing from the other, at most ten of each.

  >>> records({'kernel': 1.0, 'bias': 2.0}, {'kernel': 'record', 'bias': None}, str)
  [None, 'record']
  """
  try:
    found = beside(tree, record_tree)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(_difference(tree, record_tree, kind)) from error
  found = [_without_box(record, kind) for record in found]
  for name, record in zip(named_leaves(tree), found, strict=True):
    if record is not None and not isinstance(record, kind):
      raise ValueError(
        f'{name}: found {type(record).__name__}, expected {kind.__name__} or None: '
        'the state was made for a tree of other structure'
      )
  return found


def _without_box(record: Any, kind: type) -> Any:
  """Returns what a variable of Flax NNX holds; `nnx.Optimizer` takes arrays out of theirs."""
  if not type(record).__module__.startswith('flax.nnx'):
    return record
  import jax

  held = jax.tree.leaves(record, is_leaf=lambda node: node is None or isinstance(node, kind))
  return held[0] if len(held) == 1 else record


def map_records(
  function: Callable[[str, Any, Any], Any], tree: PyTree, record_tree: PyTree, kind: type
) -> PyTree:
  """Applies `function(name, leaf, record)` to the leaves that have a record; others stay.

  Raises:
    ValueError: as `records`.

  >>> double = lambda name, leaf, record: 2 * leaf
  >>> map_records(double, {'kernel': 1.0, 'bias': 2.0}, {'kernel': 'record', 'bias': None}, str)
  {'bias': 2.0, 'kernel': 2.0}
  """
  import jax

  leaves = named_leaves(tree)
  new = [
    leaf if record is None else function(name, leaf, record)
    for (name, leaf), record in zip(leaves.items(), records(tree, record_tree, kind), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), new)


def _difference(tree: PyTree, record_tree: PyTree, kind: type) -> str:
  """Describes the paths that the two trees do not share."""
  import jax

  is_leaf = lambda node: node is None or isinstance(node, kind)
  names = lambda paths: {path_name(path) for path, _ in paths}
  have = names(jax.tree_util.tree_leaves_with_path(tree))
  want = names(jax.tree_util.tree_leaves_with_path(record_tree, is_leaf=is_leaf))
  missing, unexpected = sorted(want - have), sorted(have - want)
  lines = ['the state was made for a tree of other structure:']
  lines += [
    f'  {name}: not found in the tree, expected by the state' for name in missing[:_MAX_LISTED]
  ]
  lines += [
    f'  {name}: found in the tree, not expected by the state' for name in unexpected[:_MAX_LISTED]
  ]
  if not missing and not unexpected:
    lines.append(
      f'  found containers {jax.tree.structure(tree)}, expected those of '
      f'{jax.tree.structure(record_tree, is_leaf=is_leaf)}'
    )
  return '\n'.join(lines)


def native(leaf: Any) -> Any:
  """Returns a leaf in this machine's byte order, the only one that JAX accepts.

  >>> native(np.ones(2, '>f4')).dtype.isnative
  True
  """
  dtype = getattr(leaf, 'dtype', None)
  if isinstance(dtype, np.dtype) and not dtype.isnative:
    return leaf.astype(dtype.newbyteorder('='))
  return leaf


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps `function` in `jax.jit`, and accepts numpy arrays of any byte order."""
  import jax

  program = jax.jit(function)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    return program(*jax.tree.map(native, args), **jax.tree.map(native, kwargs))

  call.lower = program.lower  # type: ignore[attr-defined]
  return call


def is_traced(tree: PyTree) -> bool:
  """Returns whether any leaf is a tracer, whose value is not known yet."""
  import jax

  return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def on_host(tree: PyTree) -> PyTree:
  """Returns the leaves as numpy arrays, or unchanged inside of a trace.

  Leaves may lie on different devices, and no program of JAX takes two such arrays.
  """
  import jax

  return tree if is_traced(tree) else jax.device_get(tree)
