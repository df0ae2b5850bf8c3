"""Parameter trees beside trees that hold one record, or None, per leaf of them.

An allocation and a compression state are both "the tree of the parameters, with a small struct
where a leaf is compressed and None where it passes through".  The functions here name the leaves
of a tree and walk two such trees together; what happens at a leaf is somebody else's business.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import tree_util

PyTree = Any


def path_name(path: tree_util.KeyPath) -> str:
  """The readable name of a key path: `params/Conv_0/kernel`.

  >>> import jax
  >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({'params': [1.0]})
  >>> path_name(path)
  'params/0'
  """
  return tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """The leaves of `tree` by path name, in the order in which JAX flattens them.

  Raises:
    ValueError: two leaves have the same name (`{'a/b': …, 'a': {'b': …}}`), so that a name would
      not say which is meant.

  >>> named_leaves({'b': {'c': 1}, 'a': 2})
  {'a': 2, 'b/c': 1}
  """
  named = {}
  for path, leaf in tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    if name in named:
      raise ValueError(f'{name}: two leaves of the tree have this path; expected every path once')
    named[name] = leaf
  return named


def beside(tree: PyTree, other: PyTree) -> list[Any]:
  """What `other` has in the place of each leaf of `tree`, in flattening order.

  Raises:
    ValueError, TypeError or KeyError: `other` has other containers.

  >>> beside({'a': 1, 'b': 2}, {'a': None, 'b': (3, 4)})
  [None, (3, 4)]
  """
  structure: Any = jax.tree.structure(tree)
  return structure.flatten_up_to(other)


def replaced(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
  """`tree` with these leaves, by path name, and the rest as it is.

  >>> replaced({'a': 1, 'b': 2}, {'b': 3})
  {'a': 1, 'b': 3}
  """
  return tree_util.tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), tree)


def records(tree: PyTree, record_tree: PyTree, kind: type) -> list[Any]:
  """What `record_tree` holds for each leaf of `tree`: a `kind` or None.

  Args:
    tree: a parameter tree.
    record_tree: the same tree with a `kind` or None at every leaf.
    kind: the class of the records.

  Returns:
    One entry per leaf of `tree`, in flattening order.

  Raises:
    ValueError: the trees differ in structure; the message lists every path of one that is missing
      from the other (at most ten of each).
  """
  try:
    found = beside(tree, record_tree)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(_difference(tree, record_tree, kind)) from error
  for name, record in zip(named_leaves(tree), found, strict=True):
    if record is not None and not isinstance(record, kind):
      raise ValueError(
        f'{name}: found {type(record).__name__}, expected {kind.__name__} or None: '
        'the state was made for a tree of other structure'
      )
  return found


def map_records(
  function: Callable[[str, Any, Any], Any], tree: PyTree, record_tree: PyTree, kind: type
) -> PyTree:
  """`tree` with `function(name, leaf, record)` where a leaf has a record, and the rest as it is."""
  leaves = named_leaves(tree)
  found = records(tree, record_tree, kind)
  new = [
    leaf if record is None else function(name, leaf, record)
    for (name, leaf), record in zip(leaves.items(), found, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), new)


def _difference(tree: PyTree, record_tree: PyTree, kind: type) -> str:
  """Which paths the two trees do not share, as one message."""
  is_leaf = lambda node: node is None or isinstance(node, kind)
  have = [path_name(p) for p, _ in tree_util.tree_leaves_with_path(tree)]
  want = [path_name(p) for p, _ in tree_util.tree_leaves_with_path(record_tree, is_leaf=is_leaf)]
  missing, unexpected = sorted(set(want) - set(have)), sorted(set(have) - set(want))
  lines = ['the state was made for a tree of other structure:']
  lines += [f'  {name}: not found in the tree, expected by the state' for name in missing[:10]]
  lines += [f'  {name}: found in the tree, not expected by the state' for name in unexpected[:10]]
  if not missing and not unexpected:
    lines.append(
      f'  found containers {jax.tree.structure(tree)}, expected those of '
      f'{jax.tree.structure(record_tree, is_leaf=is_leaf)}'
    )
  return '\n'.join(lines)


def native(leaf: Any) -> Any:
  """A leaf in the byte order of this machine, which is the only one that JAX takes.

  >>> native(np.ones(2, '>f4')).dtype.isnative
  True
  """
  dtype = getattr(leaf, 'dtype', None)
  if isinstance(dtype, np.dtype) and not dtype.isnative:
    return leaf.astype(dtype.newbyteorder('='))
  return leaf


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit` of a function whose arrays may be numpy's, in any byte order."""
  program = jax.jit(function)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    return program(*jax.tree.map(native, args), **jax.tree.map(native, kwargs))

  call.lower = program.lower  # type: ignore[attr-defined]
  return call


def is_traced(tree: PyTree) -> bool:
  """Whether some of its arrays stand for values that are not known yet."""
  return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def on_host(tree: PyTree) -> PyTree:
  """The arrays as numpy's, unless some are traced: leaves may lie on different devices."""
  return tree if is_traced(tree) else jax.device_get(tree)
