"""A few steps as one of many processes: `python many_processes.py KIND DIR INDEX COUNT PORT`.

KIND is pmap, shard_map, or sigterm, which steps until it gets one and then saves.  The others save,
restore and go on; the process of index 0 writes what became of it to DIR/KIND_COUNT.npz.
COUNT 1 is one process that has all the devices.
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from opq_jax import data
from opq_jax.data import streams
from opq_jax.finetuning import parallel, training
from opq_jax.finetuning.checkpoints import Checkpoints, StopRequest
from tests.helpers import small_networks

PLAIN = data.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
OPTIMIZER = optax.adamw(1e-2)


def main(kind, folder, index, count, port):
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', num_processes=count, process_id=index)
  assert jax.device_count() == 2
  if kind != 'shard_map':
    devices = jax.local_devices()
    step_fn = parallel.pmap_train_step(apply_fn, OPTIMIZER)
  else:
    devices = jax.devices()
    mesh = Mesh(np.array(devices), (parallel.AXIS,))
    step_fn = parallel.shard_map_train_step(mesh, apply_fn, OPTIMIZER)
  train_state = parallel.replicate(small_networks.start(OPTIMIZER), devices)
  state = parallel.replicate(small_networks.compressed_network()[1], devices)
  batches = streams.stream(
    streams.fake((2, 4, 3), classes=5, count=50), batch_size=8, preprocessing=PLAIN
  )
  with Checkpoints(f'{folder}/{kind}_{count}') as checkpoints, StopRequest() as stop:
    checkpoints.save_compression(state)
    for step in range(1, 4):
      train_state, metrics = step_fn(train_state, state, next(batches))
      assert not stop.is_requested(step)
    while kind == 'sigterm':
      step += 1
      train_state, _ = step_fn(train_state, state, next(batches))
      print(step, flush=True)
      if stop.is_requested(step):
        checkpoints.save(train_state, batches.get_state(), wait=True)
        return
    checkpoints.save(train_state, batches.get_state())
  with Checkpoints(f'{folder}/{kind}_{count}') as checkpoints:
    state = checkpoints.restore_compression(state, devices)
    train_state, position = checkpoints.restore(train_state, devices)
  batches.set_state(position)
  for _ in range(2):
    train_state, metrics = step_fn(train_state, state, next(batches))
  if kind == 'pmap':
    variables, _ = training.network(train_state, state)
    counts = parallel.pmap_eval_step(apply_fn)(variables, next(batches))
    assert int(counts['examples']) == 8
  if index == 0:
    leaves = jax.tree.leaves((train_state.replace(rng=None), metrics))
    np.savez(f'{folder}/{kind}_{count}.npz', *map(np.asarray, leaves))


def apply_fn(variables, images, **options):
  return small_networks.Network().apply(variables, images.reshape(len(images), -1), **options)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
