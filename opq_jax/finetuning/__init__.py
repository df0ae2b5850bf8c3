"""Finetuning with masks and codebooks frozen: one pure step, many devices, checkpoints.

`train_step` is the step; `pmap_train_step`, `shard_map_train_step` and `sharded_train_step` run it
on many devices; `Checkpoints` lets a killed run continue with the same result, bit for bit.  Orbax
is imported when the first `Checkpoints` is made.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.finetuning.batches import Batch, pad_batch, split_batch
  from opq_jax.finetuning.checkpoints import Checkpoints, Restored, StopRequest
  from opq_jax.finetuning.evaluation import eval_step
  from opq_jax.finetuning.losses import Loss, classification_loss
  from opq_jax.finetuning.parallel import (
    AXIS,
    pmap_eval_step,
    pmap_train_step,
    replicate,
    replicated,
    shard_batch,
    shard_map_train_step,
    sharded_train_step,
  )
  from opq_jax.finetuning.training import (
    Metrics,
    TrainState,
    init_train_state,
    kernels,
    network,
    train_step,
  )

_MODULES = {
  'batches': ('Batch', 'pad_batch', 'split_batch'),
  'checkpoints': ('Checkpoints', 'Restored', 'StopRequest'),
  'evaluation': ('eval_step',),
  'losses': ('Loss', 'classification_loss'),
  'parallel': (
    *('AXIS', 'pmap_eval_step', 'pmap_train_step', 'replicate', 'replicated'),
    *('shard_batch', 'shard_map_train_step', 'sharded_train_step'),
  ),
  'training': ('Metrics', 'TrainState', 'init_train_state', 'kernels', 'network', 'train_step'),
}

__all__ = [
  'AXIS',
  'Batch',
  'Checkpoints',
  'Loss',
  'Metrics',
  'Restored',
  'StopRequest',
  'TrainState',
  'classification_loss',
  'eval_step',
  'init_train_state',
  'kernels',
  'network',
  'pad_batch',
  'pmap_eval_step',
  'pmap_train_step',
  'replicate',
  'replicated',
  'shard_batch',
  'shard_map_train_step',
  'sharded_train_step',
  'split_batch',
  'train_step',
]

__getattr__, __dir__ = lazy.attributes(
  __name__, {name: module for module, names in _MODULES.items() for name in names}
)
