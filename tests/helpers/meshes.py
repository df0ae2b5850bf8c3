"""Trees that lie over a mesh of eight devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opq_jax.core import trees


def laid_out(params, slices):
  """The parameters over a mesh of 2 x 4, as `jax.make_mesh` makes it, cut where lengths allow.

  Args:
    params: the tree.
    slices: leading axes that count slices, by path: the first is cut by four, and so are the
      outputs of all other leaves.
  """
  mesh = jax.make_mesh((2, 4), ('data', 'model'))

  def lay(path, leaf):
    leaf = jnp.asarray(leaf)
    spec = [None] * leaf.ndim
    first, second = (0, -1) if slices.get(path) and len(leaf) % 4 == 0 else (-1, -2)
    for axis, (name, size) in ((first, ('model', 4)), (second, ('data', 2))):
      if -axis <= leaf.ndim and leaf.shape[axis] % size == 0:
        spec[axis] = name
    return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

  named = trees.named_leaves(params)
  return trees.replaced(params, {path: lay(path, leaf) for path, leaf in named.items()})


def lies_alike(tree, other):
  """Fails unless the leaves of two trees are cut in the same way."""
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
