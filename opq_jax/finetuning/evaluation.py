"""Counts how many examples of a batch a network classifies correctly."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from opq_jax.core.trees import PyTree
from opq_jax.finetuning.batches import Batch


def eval_step(
  variables: Mapping[str, PyTree],
  batch: Batch,
  *,
  apply_fn: Callable[..., Any],
  axis_name: str | tuple[str, ...] | None = None,
) -> dict[str, Int32[Array, '']]:
  """Counts the correct answers of a network on one batch.

  Args:
    variables: of the network to judge; a compressed network's are compressed already.
    batch: {'image', 'label'}, and 'is_example' where the batch was padded (`pad_batch`).
    apply_fn: called as `apply_fn(variables, images, train=False)`.
    axis_name: of the enclosing `pmap` or `shard_map`, over which counts are summed.

  Returns:
    {'top1', 'top5', 'examples'}: whole numbers, to be summed over batches.  A label is among the
    top k if fewer than k other logits are larger; equal logits are ranked by their class.  NaN
    logits, and labels of no class, are never correct.

  >>> batch = {'image': jnp.eye(6), 'label': jnp.array([0, 1, 2, 0, 0, 0])}
  >>> counts = eval_step({}, batch, apply_fn=lambda variables, images, train: images)
  >>> {name: int(count) for name, count in counts.items()}
  {'top1': 3, 'top5': 6, 'examples': 6}
  """
  rank = label_rank(apply_fn(variables, batch['image'], train=False), batch['label'])
  is_example = batch.get('is_example', jnp.ones(rank.shape, bool))
  count = lambda is_counted: jnp.sum((is_counted & is_example).astype(jnp.int32))
  counts = {'top1': count(rank < 1), 'top5': count(rank < 5), 'examples': count(rank >= 0)}
  return counts if axis_name is None else lax.psum(counts, axis_name)


def label_rank(
  logits: Float[Array, '*batch classes'], labels: Int[Array, '*batch']
) -> Int32[Array, '*batch']:
  """Returns how many classes rank before the label's, equal logits by class.

  The rank of a NaN logit, and of a label of no class, is the largest of int32.
  """
  labels = labels.astype(jnp.int32)  # the number of classes need not fit into uint8 or int8
  target = jnp.take_along_axis(logits, labels[..., None], axis=-1)
  number = jnp.arange(logits.shape[-1]).reshape(*[1] * labels.ndim, -1)
  is_later = number >= labels[..., None]
  # counted by the classes surely behind: comparisons with NaN are false, so NaN ranks last
  is_behind: Bool[Array, '*batch classes'] = (logits < target) | ((logits == target) & is_later)
  rank = jnp.sum((~is_behind).astype(jnp.int32), axis=-1)
  is_class = (labels >= 0) & (labels < logits.shape[-1]) & ~jnp.isnan(target[..., 0])
  return jnp.where(is_class, rank, jnp.iinfo(jnp.int32).max)
