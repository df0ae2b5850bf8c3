"""Finetunes a language model whose weights are cut over the devices of several processes.

    python -m tests.helpers.fsdp FOLDER INDEX COUNT PORT STEPS

Kernels of a scanned Llama are cut along the axis `fsdp` of a mesh of all devices, and so are the
optimizer's moments and the masks.  Goes on from the checkpoint of FOLDER, saves one after every
step and prints the step once it is on disk.  One of several processes then waits to be killed.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from opq_jax import models
from opq_jax.core import trees
from opq_jax.finetuning import parallel, training
from opq_jax.finetuning.checkpoints import Checkpoints

CONFIG = {
  'model_type': 'llama',
  'vocab_size': 128,
  'hidden_size': 32,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 64,
  'max_position_embeddings': 32,
}
BATCH, LENGTH = 8, 16


def layout(path, leaf):
  """Cuts the outputs of kernels, and rows of the table; vectors are whole everywhere."""
  return P(*[None] * (leaf.ndim - 1), 'fsdp') if leaf.ndim > 1 else P()


def laid(params, mesh):
  """Lays the same weights over a mesh, whose devices belong to one process or to many."""

  def put(path, leaf):
    host = np.asarray(leaf)
    sharding = NamedSharding(mesh, layout(path, leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map_with_path(put, params)


def batch_of(step, index, count):
  """Returns this process's share of the tokens of a step."""
  tokens = np.random.default_rng(step).integers(0, 128, (BATCH, LENGTH + 1)).astype(np.int32)
  share = np.split(tokens, count)[index]
  return {'image': share[:, :-1], 'label': share[:, 1:]}


def main(folder, index, count, port, steps, *, devices=None):
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', num_processes=count, process_id=index)
    # Gloo connects within 30 s or never: now, while both have just begun
    multihost_utils.sync_global_devices('begun')
  count_of_devices = len(devices or jax.devices())
  mesh = jax.make_mesh((count_of_devices,), ('fsdp',), devices=devices, axis_types=(AxisType.Auto,))
  model = models.from_config(CONFIG)
  tokens = jnp.zeros((1, LENGTH), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  params = laid(variables['params'], mesh)
  slices = lambda path, leaf: int(path.startswith('layers/') and leaf.ndim > 2)
  # of the whole weights, which every process draws alike
  allocation = opq_jax.allocate(variables['params'], compression_rate=8.0, slices=slices)
  state = opq_jax.init_state(params, allocation)
  optimizer = optax.adamw(1e-3)

  def apply_fn(variables, tokens, **_):
    return model.apply(variables, tokens), {}

  step_fn = parallel.sharded_train_step(mesh, apply_fn, optimizer, data_axes='fsdp')
  train_state = training.init_train_state({'params': params}, optimizer, jax.random.key(1))
  with Checkpoints(f'{folder}/checkpoints') as checkpoints:
    if (frozen := checkpoints.restore_compression(state)) is None:
      checkpoints.save_compression(state)
    state = frozen or state
    if (restored := checkpoints.restore(train_state)) is not None:
      train_state = restored.train_state
    for step in range(int(train_state.step), steps):
      train_state, _ = step_fn(train_state, state, batch_of(step, index, count))
      checkpoints.save(train_state, {}, wait=True)
      print(step + 1, flush=True)
    check_laid(train_state, state, mesh)
    if count > 1:
      time.sleep(600)
  return jax.device_get(train_state.params)


def check_laid(train_state, state, mesh):
  """Checks that no process holds more than its shards of any kernel, of the optimizer or masks."""
  moments = train_state.opt_state[0]
  for tree in (train_state.params, moments.mu, moments.nu, state.tree):
    for name, leaf in trees.named_leaves(tree).items():
      if leaf.ndim > 1 and 'codebook' not in name and leaf.dtype != jnp.int32:
        cut = leaf.addressable_shards[0].data.size * len(mesh.devices.flat)
        assert cut == leaf.size, (name, leaf.sharding)


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:]))
