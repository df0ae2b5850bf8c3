"""A run of 24 steps that is meant to be killed: `python -m tests.helpers.killed_run DIR [PAUSE]`.

Prints every step and then pauses for some seconds; ends by writing DIR/final.npz.
"""

import pathlib
import sys
import time

import jax
import numpy as np
import optax

import opq_jax
from opq_jax import data
from opq_jax.data import streams
from opq_jax.finetuning import checkpoints, parallel
from tests.helpers import small_networks

STEPS, EVERY = 24, 3
PLAIN = data.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)


def main(folder, pause):
  optimizer = optax.adamw(1e-2)
  variables, like = small_networks.compressed_network()
  step_fn = parallel.pmap_train_step(apply_fn, optimizer)
  with (
    checkpoints.Checkpoints(folder / 'checkpoints') as manager,
    checkpoints.StopRequest() as stop,
  ):
    state = manager.restore_compression(like)
    if state is None:
      state = opq_jax.init_state(
        variables['params'], opq_jax.allocate(variables['params'], compression_rate=16.0)
      )
      manager.save_compression(state)
    train_state = parallel.replicate(small_networks.start(optimizer, with_average=True))
    batches = streams.stream(
      streams.fake((2, 4, 3), classes=5, count=50), batch_size=8, preprocessing=PLAIN
    )
    restored = manager.restore(train_state)
    if restored is not None:
      train_state, position = restored
      batches.set_state(position)
    for step in range(int(train_state.step) + 1, STEPS + 1):
      train_state, _ = step_fn(train_state, state, next(batches))
      print(step, flush=True)
      time.sleep(pause)
      is_stopping = stop.is_requested(step)
      if step % EVERY == 0 or is_stopping:
        manager.save(train_state, batches.get_state(), wait=is_stopping)
      if is_stopping:
        return
  leaves = jax.tree.leaves((train_state.replace(rng=None), state))
  np.savez(folder / 'final.npz', *map(np.asarray, leaves))


def apply_fn(variables, images, **options):
  return small_networks.Network().apply(variables, images.reshape(len(images), -1), **options)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
