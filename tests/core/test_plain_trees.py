"""Plain trees are walked without JAX in the order and with the names of JAX."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import tree_util

from opq_jax.core import plain_trees, trees

KEYS = st.one_of(
  st.lists(st.text(max_size=3), unique=True, max_size=4),
  st.lists(st.integers(-20, 20), unique=True, max_size=4),
)
LEAVES = st.one_of(st.none(), st.integers(), st.floats(), st.just('text'), st.just(np.ones(2)))


@st.composite
def dicts(draw, children):
  return {key: draw(children) for key in draw(KEYS)}


TREES = st.recursive(
  LEAVES,
  lambda children: st.one_of(
    st.lists(children, max_size=3), st.lists(children, max_size=3).map(tuple), dicts(children)
  ),
  max_leaves=12,
)


def names_in_jax(tree):
  return [trees.path_name(path) for path, _ in tree_util.tree_leaves_with_path(tree)]


@given(TREES)
def test_names_are_those_of_jax(tree):
  assert plain_trees.is_plain(tree)
  expected = names_in_jax(tree)
  if len(set(expected)) < len(expected):
    with pytest.raises(ValueError, match='found two leaves of this path'):
      trees.named_leaves(tree)
    return
  found = trees.named_leaves(tree)
  assert list(found) == expected
  assert all(a is b for a, b in zip(found.values(), jax.tree.leaves(tree), strict=True))


@given(TREES)
def test_replaced_keeps_containers(tree):
  names = names_in_jax(tree)
  if len(set(names)) < len(names):
    return
  new = {name: i for i, name in enumerate(names)}
  found = trees.replaced(tree, new)
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  assert jax.tree.leaves(found) == list(range(len(names)))


def test_is_plain_leaves_the_rest_to_jax():
  deep = None
  for _ in range(plain_trees.MAX_DEPTH):
    deep = [deep]
  assert plain_trees.is_plain(deep)
  layer = collections.namedtuple('Layer', 'kernel bias')(1, 2)
  for tree in ([deep], layer, collections.OrderedDict(b=1, a=2), {'w': jax.numpy.ones(2)}, {1, 2}):
    assert not plain_trees.is_plain(tree)
  # registered containers have names and an order of their own
  assert list(trees.named_leaves([layer])) == ['0/kernel', '0/bias']
  assert list(trees.named_leaves(collections.OrderedDict(b=1, a=2))) == ['b', 'a']
