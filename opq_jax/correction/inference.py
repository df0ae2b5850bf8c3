"""Variables of a network that is only to be used, with what its file need not hold taken out.

In a small network the leaves that are not compressed (BatchNorm, biases) are a fifth of an
`.opq` file.  These functions change their values and neither tree, shapes nor dtypes, so that the
same `model.apply` takes them; constants and zeroed low bytes then cost nothing in the file, whose
coder sees them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opq_jax.allocation import is_compressible
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction import batch_statistics
from opq_jax.correction.batch_statistics import STATISTICS


def fold_batch_norm(variables: Mapping[str, PyTree], *, epsilon: float) -> dict[str, PyTree]:
  """Every BatchNorm's four vectors as two: mean and variance absorbed in scale and bias.

  y = scale (x - mean) / sqrt(var + epsilon) + bias is the same function with

      scale  <-  scale / sqrt(var + epsilon)        mean  <-  0
      bias   <-  bias - mean * new scale            var   <-  1 - epsilon

  on running statistics, which are constants thereafter.  Not for a network that is to be trained
  further: the statistics no longer say what its layers see.

  Args:
    variables: `{'params': …, 'batch_stats': …}`.  A BatchNorm is every node of `batch_stats` that
      holds `mean` and `var` and has `scale` and `bias` at the same place of `params`; one that
      lacks either stays as it is.
    epsilon: that the network's BatchNorms add to the variance: 1e-5 by Flax's default,
      `model.epsilon` in `opq_jax.models`.

  Returns:
    The same tree; leaves that are no BatchNorm's are the same arrays.

  Raises:
    ValueError: a collection is missing, or epsilon is no number between 0 and 1.

  >>> variables = {
  ...   'params': {'norm': {'scale': jnp.array([3.0]), 'bias': jnp.array([1.0])}},
  ...   'batch_stats': {'norm': {'mean': jnp.array([2.0]), 'var': jnp.array([2.25])}},
  ... }
  >>> folded = fold_batch_norm(variables, epsilon=0.0)
  >>> [leaf.tolist() for leaf in jax.tree.leaves(folded)]  # mean, var, bias, scale
  [[0.0], [1.0], [-3.0], [2.0]]
  """
  if not 0 <= epsilon < 1:
    raise ValueError(f'epsilon: found {epsilon}, expected a number between 0 and 1')
  batch_statistics.check_collections(variables)
  params, statistics = (
    trees.named_leaves(variables[collection]) for collection in ('params', STATISTICS)
  )
  new: dict[str, jax.Array] = {}
  for mean, var in batch_statistics.pairs(statistics):
    scale, bias = (mean.removesuffix('mean') + leaf for leaf in ('scale', 'bias'))
    if not {scale, bias} <= params.keys():
      continue
    moments = [jnp.asarray(statistics[name], jnp.float32) for name in (mean, var)]
    factor = jnp.asarray(params[scale], jnp.float32) * jax.lax.rsqrt(moments[1] + epsilon)
    new |= {
      f'params/{scale}': factor,
      f'params/{bias}': jnp.asarray(params[bias], jnp.float32) - moments[0] * factor,
      f'{STATISTICS}/{mean}': jnp.zeros_like(moments[0]),
      f'{STATISTICS}/{var}': jnp.full_like(moments[1], 1 - epsilon),
    }

  def replace(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
    found = new.get(trees.path_name(path))
    return leaf if found is None else found.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(replace, dict(variables))


def round_uncompressed(
  tree: PyTree,
  dtype: Any = jnp.bfloat16,
  *,
  compressible: Callable[[str, Any], bool] = is_compressible,
) -> PyTree:
  """The floating leaves that are not compressed, rounded to what a narrower dtype can hold.

  Their dtype stays, so that a file of them is loaded as ever; of a float32 that is a bfloat16 the
  two low bytes are zeros, which an `.opq` file holds for nothing.

  Args:
    tree: parameters or variables.
    dtype: bfloat16 (8 bits of significand, the range of float32) or float16 (11 bits).
    compressible: (path, leaf) -> bool, the one that `opq_jax.allocate` is given.

  Returns:
    The same tree; leaves that are compressed, or not wider than `dtype`, are the same arrays.

  Raises:
    ValueError: `dtype` is no floating dtype; or (outside of a trace) a finite value is beyond it.

  >>> tree = {'kernel': jnp.full((2, 2), 0.1), 'bias': jnp.array([0.1])}
  >>> rounded = round_uncompressed(tree)
  >>> float(rounded['bias'][0]), rounded['bias'].dtype, rounded['kernel'] is tree['kernel']
  (0.10009765625, dtype('float32'), True)
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype: found {jnp.dtype(dtype)}, expected a floating one')

  def rounded(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
    name = trees.path_name(path)
    is_wider = (
      jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
      and jnp.result_type(leaf).itemsize > jnp.dtype(dtype).itemsize
    )
    if not is_wider or compressible(name, leaf):
      return leaf
    value, is_lost = _rounded(leaf, dtype)
    if not isinstance(is_lost, jax.core.Tracer) and is_lost:
      most = float(jnp.max(jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0)))
      raise ValueError(
        f'{name}: found {most:g}, expected at most {float(jnp.finfo(dtype).max):g}, the largest '
        f'{jnp.dtype(dtype)}'
      )
    return value

  return jax.tree_util.tree_map_with_path(rounded, tree)


@functools.partial(jax.jit, static_argnames='dtype')
def _rounded(leaf: Float[Array, '...'], dtype: Any) -> tuple[Float[Array, '...'], Bool[Array, '']]:
  """The leaf in its own dtype with the values of another, and whether one became infinite."""
  value = leaf.astype(dtype).astype(leaf.dtype)
  return value, jnp.any(jnp.isfinite(leaf) & ~jnp.isfinite(value))
