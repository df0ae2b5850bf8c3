"""Trains as one of many: `python -m tests.helpers.many_processes DIR INDEX COUNT PORT`.

A few steps with pmap and with shard_map, each saved, restored and continued; process 0 writes the
results to DIR/KIND_COUNT.npz.  Two processes then go on until one gets SIGTERM; both print every
step and save the last.  `main` with a count of 1 takes two devices of its own process.
"""

import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from opq_jax import data
from opq_jax.data import streams
from opq_jax.finetuning import parallel, training
from opq_jax.finetuning.checkpoints import Checkpoints, StopRequest
from tests.helpers import small_networks

PLAIN = data.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
OPTIMIZER = optax.adamw(1e-2)


def main(folder, index, count, port=None):
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', num_processes=count, process_id=index)
    # Gloo connects within 30 s or never: now, while both have just begun
    multihost_utils.sync_global_devices('begun')
  # a sum of two does not depend on its order
  devices = jax.devices()[:2]
  local = devices if count == 1 else jax.local_devices()
  pmap_step = parallel.pmap_train_step(apply_fn, OPTIMIZER, devices=devices)
  mesh = Mesh(np.array(devices), (parallel.AXIS,))
  shard_map_step = parallel.shard_map_train_step(mesh, apply_fn, OPTIMIZER)
  for kind, step_fn, places in (
    ('pmap', pmap_step, local),
    ('shard_map', shard_map_step, devices),
  ):
    result = train_restore_and_go_on(kind, f'{folder}/{kind}_{count}', step_fn, places)
    if index == 0:
      np.savez(f'{folder}/{kind}_{count}.npz', *map(np.asarray, jax.tree.leaves(result)))
  if count > 1:
    train_until_sigterm(f'{folder}/sigterm', pmap_step)


def begin(devices):
  return (
    parallel.replicate(small_networks.start(OPTIMIZER), devices),
    parallel.replicate(small_networks.compressed_network()[1], devices),
    streams.stream(streams.fake((2, 4, 3), classes=5, count=50), batch_size=8, preprocessing=PLAIN),
  )


def train_restore_and_go_on(kind, folder, step_fn, devices):
  train_state, state, batches = begin(devices)
  with Checkpoints(folder) as checkpoints, StopRequest() as stop:
    checkpoints.save_compression(state)
    for step in range(1, 4):
      train_state, _ = step_fn(train_state, state, next(batches))
      assert not stop.is_requested(step)
    checkpoints.save(train_state, batches.get_state())
  with Checkpoints(folder) as checkpoints:
    state = checkpoints.restore_compression(state, devices)
    train_state, position = checkpoints.restore(train_state, devices)
  batches.set_state(position)
  for _ in range(2):
    train_state, metrics = step_fn(train_state, state, next(batches))
  if kind == 'pmap':
    variables, _ = training.network(train_state, state)
    eval_fn = parallel.pmap_eval_step(apply_fn, devices=jax.devices()[:2])
    counts = eval_fn(variables, next(batches))
    assert int(counts['examples']) == 8
  return train_state.replace(rng=None), metrics


def train_until_sigterm(folder, step_fn):
  train_state, state, batches = begin(jax.local_devices())
  with Checkpoints(folder) as checkpoints, StopRequest() as stop:
    for step in range(1, 100_000):
      train_state, _ = step_fn(train_state, state, next(batches))
      print(step, flush=True)
      if stop.is_requested(step):
        checkpoints.save(train_state, batches.get_state(), wait=True)
        return
  raise AssertionError('found no SIGTERM')


def apply_fn(variables, images, **options):
  return small_networks.Network().apply(variables, images.reshape(len(images), -1), **options)


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:]))
