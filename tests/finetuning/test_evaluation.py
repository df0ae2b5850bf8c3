"""Counts of correct answers: padding, ties, NaN and labels of no class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.finetuning import evaluation, parallel
from opq_jax.finetuning.batches import pad_batch


def test_eval_step_skips_padding():
  logits = np.array(
    [[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5]], np.float32
  )
  apply_fn = lambda variables, images, train: images
  step = parallel.pmap_eval_step(apply_fn, devices=jax.devices()[:2])
  batch = {'image': logits[:3], 'label': np.array([0, 5, 1], np.int32)}
  counts = step({}, pad_batch(batch, 4))
  assert {name: int(count) for name, count in counts.items()} == {
    'top1': 1,
    'top5': 2,
    'examples': 3,
  }


def test_eval_step_ranks_ties_and_nan():
  apply_fn = lambda variables, images, train: images
  equal = {'image': np.zeros((3, 7), np.float32), 'label': np.array([0, 4, 5], np.int32)}
  counts = evaluation.eval_step({}, equal, apply_fn=apply_fn)
  assert (int(counts['top1']), int(counts['top5'])) == (1, 2)
  nan = {'image': np.full((2, 7), np.nan, np.float32), 'label': np.array([0, 4], np.int32)}
  counts = evaluation.eval_step({}, nan, apply_fn=apply_fn)
  assert (int(counts['top1']), int(counts['top5']), int(counts['examples'])) == (0, 0, 2)
  # of fewer than five classes all ranks but those of NaN and of no class are among the top 5
  few = {
    'image': np.array([[1, 2, 3], [np.nan] * 3, [1, 2, 3], [1, 2, 3]], np.float32),
    'label': np.array([0, 0, -1, 3], np.int32),
  }
  counts = evaluation.eval_step({}, few, apply_fn=apply_fn)
  assert (int(counts['top1']), int(counts['top5']), int(counts['examples'])) == (0, 1, 4)


@pytest.mark.parametrize(('dtype', 'classes'), [('uint8', 256), ('uint8', 260), ('int8', 200)])
def test_eval_step_of_short_labels(dtype, classes):
  """The number of classes does not fit into the dtype of the labels."""
  labels = jnp.array([0, 100, 5], dtype)
  logits = jax.nn.one_hot(labels.astype(jnp.int32), classes)
  step = jax.jit(lambda batch: evaluation.eval_step({}, batch, apply_fn=lambda _, x, train: x))
  counts = step({'image': logits, 'label': labels})
  assert (int(counts['top1']), int(counts['examples'])) == (3, 3)
