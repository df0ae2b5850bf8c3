"""Smaller uncompressed leaves (BatchNorm, biases) for a network that is not trained further.

In a small network these leaves are a fifth of an `.opq` file.  The functions here change values
only, no tree, shape or dtype, so that the same `model.apply` takes the result.  Constant leaves and
zeroed low bytes take no space in the file, whose coder detects them.
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
from opq_jax.correction.batch_statistics import STATISTICS, mean_var_pairs
from opq_jax.correction.checks import check_collections


def fold_batch_norm(variables: Mapping[str, PyTree], *, epsilon: float) -> dict[str, PyTree]:
  """Absorbs mean and variance of every BatchNorm into its scale and bias.

  On running statistics, y = scale (x - mean) / sqrt(var + epsilon) + bias is the same function with

      scale  <-  scale / sqrt(var + epsilon)        mean  <-  0
      bias   <-  bias - mean * new scale            var   <-  1 - epsilon

  so that two of the four vectors are constant.  A folded network must not be trained further: its
  statistics no longer describe what its layers see.

  Args:
    variables: `{'params': …, 'batch_stats': …}`.  A BatchNorm is every node of `batch_stats` that
      holds `mean` and `var` and has `scale` and `bias` at the same path of `params`; a node without
      both is left as it is.
    epsilon: added to the variance by the network's BatchNorms: 1e-5 by Flax's default,
      `model.epsilon` in `opq_jax.models`.

  Returns:
    The same tree; all leaves but BatchNorm's are the same arrays.

  Raises:
    ValueError: a collection is missing, or epsilon is not in [0, 1).

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
  check_collections(variables)
  params, statistics = (
    trees.named_leaves(variables[collection]) for collection in ('params', STATISTICS)
  )
  new: dict[str, jax.Array] = {}
  for mean, var in mean_var_pairs(statistics):
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
    folded = new.get(trees.path_name(path))
    return leaf if folded is None else folded.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(replace, dict(variables))


def round_uncompressed(
  tree: PyTree,
  dtype: Any = jnp.bfloat16,
  *,
  compressible: Callable[[str, Any], bool] = is_compressible,
) -> PyTree:
  """Rounds the uncompressed floating leaves to values of a narrower dtype.

  The leaves keep their dtype.  The two low bytes of a float32 rounded to bfloat16 are zeros, which
  take no space in an `.opq` file.

  Args:
    tree: parameters or variables.
    dtype: bfloat16 (8 bits of significand, the range of float32) or float16 (11 bits).
    compressible: (path, leaf) -> bool, the function that `opq_jax.allocate` is given.

  Returns:
    The same tree; leaves that are compressed, or not wider than `dtype`, are the same arrays.

  Raises:
    ValueError: `dtype` is no floating dtype; or (outside of a trace) a finite value exceeds its
      range.

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
    value, is_beyond = _rounded(leaf, dtype)
    if not isinstance(is_beyond, jax.core.Tracer) and is_beyond:
      largest = float(jnp.max(jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0)))
      raise ValueError(
        f'{name}: found {largest:g}, expected at most {float(jnp.finfo(dtype).max):g}, the largest '
        f'{jnp.dtype(dtype)}'
      )
    return value

  return jax.tree_util.tree_map_with_path(rounded, tree)


@functools.partial(jax.jit, static_argnames='dtype')
def _rounded(leaf: Float[Array, '...'], dtype: Any) -> tuple[Float[Array, '...'], Bool[Array, '']]:
  """Returns the leaf in its own dtype, rounded to `dtype`, and whether a value became infinite."""
  value = leaf.astype(dtype).astype(leaf.dtype)
  return value, jnp.any(jnp.isfinite(leaf) & ~jnp.isfinite(value))
