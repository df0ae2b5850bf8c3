"""Checkpoints restore what was saved, and a killed run ends as an undisturbed one."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opq_jax
from opq_jax.finetuning import parallel
from opq_jax.finetuning.checkpoints import Checkpoints, StopRequest
from tests.helpers import killed_run, processes, small_networks
from tests.helpers.small_networks import assert_same_bits, batches

OPTIMIZER = optax.adamw(1e-2)


def trained(steps=2):
  _, state = small_networks.compressed_network()
  step = parallel.pmap_train_step(small_networks.Network().apply, OPTIMIZER)
  train_state = parallel.replicate(small_networks.start(OPTIMIZER, with_average=True))
  for batch in batches(steps):
    train_state, _ = step(train_state, parallel.replicate(state), batch)
  return train_state


def test_checkpoints_of_empty_folder(tmp_path):
  _, state = small_networks.compressed_network()
  with Checkpoints(tmp_path / 'new' / 'folder') as checkpoints:
    assert checkpoints.restore_compression(state) is None
    assert checkpoints.restore(small_networks.start(OPTIMIZER)) is None


def test_compression_state_is_written_once(tmp_path):
  variables, state = small_networks.compressed_network()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save_compression(state)
    with pytest.raises(ValueError, match='found a compression state, expected none'):
      checkpoints.save_compression(state)
  # a later process knows shapes and dtypes without allocating anything
  like = jax.eval_shape(
    lambda tree: opq_jax.init_state(tree, opq_jax.allocate(tree)), variables['params']
  )
  with Checkpoints(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore_compression(like), state)


@pytest.mark.parametrize('count', [1, 2, 4])
def test_restore_on_other_device_count(tmp_path, count):
  train_state = trained()
  expected = jax.tree.map(
    lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf),
    train_state,
  )
  position = {'next_index': 2}
  devices = jax.devices()[:count]
  step = parallel.pmap_train_step(small_networks.Network().apply, OPTIMIZER, devices=devices)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(train_state, position)
  with Checkpoints(tmp_path) as checkpoints:
    like = small_networks.start(OPTIMIZER, with_average=True)
    found = checkpoints.restore(like, devices)
  assert found.position == position
  assert_same_bits(found.train_state, expected)
  assert len(found.train_state.params['head']['kernel'].sharding.device_set) == count
  [batch] = batches(1)
  after, _ = step(
    found.train_state, parallel.replicate(small_networks.compressed_network()[1], devices), batch
  )
  assert int(after.step) == 3


def test_saved_state_may_be_donated(tmp_path):
  _, state = small_networks.compressed_network()
  step = parallel.pmap_train_step(small_networks.Network().apply, OPTIMIZER)
  train_state, state = trained(steps=1), parallel.replicate(state)
  copies = {}
  with Checkpoints(tmp_path, keep=100) as checkpoints:
    for batch in batches(20):
      copies[int(train_state.step)] = np.array(train_state.params['hidden']['kernel'])
      checkpoints.save(train_state, {})
      train_state, _ = step(train_state, state, batch)
  like = small_networks.start(OPTIMIZER, with_average=True)
  for number in (20, 19):
    with Checkpoints(tmp_path, keep=100) as checkpoints:
      found = checkpoints.restore(like).train_state
    assert int(found.step) == number
    np.testing.assert_array_equal(found.params['hidden']['kernel'], copies[number])
    remove(tmp_path / str(number))


def remove(folder):
  for path in sorted(folder.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  folder.rmdir()


def test_save_keeps_the_latest_states(tmp_path):
  train_state = trained(steps=1)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for number in (1, 2, 3):
      state = train_state.replace(step=train_state.step + number)
      checkpoints.save(state, {'next_index': number}, wait=True)
      checkpoints.save(state, {'next_index': -1}, wait=True)
    assert checkpoints.restore(train_state).position == {'next_index': 3}
  assert sorted(path.name for path in tmp_path.iterdir()) == ['3', '4']


def test_save_into_the_folder_of_another_run(tmp_path):
  train_state = trained(steps=2)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(train_state, {}, wait=True)
    with pytest.raises(ValueError, match='found step 2, expected none later than 1'):
      checkpoints.save(train_state.replace(step=train_state.step - 1), {})
  with Checkpoints(tmp_path) as checkpoints:
    # Orbax would write none of these steps, and restore the earlier run afterwards
    with pytest.raises(ValueError, match='found step 2 of an earlier run'):
      checkpoints.save(train_state.replace(step=train_state.step - 1), {})
    checkpoints.restore(train_state)
    checkpoints.save(train_state.replace(step=train_state.step + 1), {'next_index': 3}, wait=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']


def test_restore_refuses_other_dtypes_and_shapes(tmp_path):
  train_state = trained(steps=1)
  _, state = small_networks.compressed_network()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(train_state, {}, wait=True)
    checkpoints.save_compression(state)
  half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      ValueError, match=r'params/head/bias: found float32 of shape \(5,\), expected bfloat16'
    ):
      checkpoints.restore(train_state.replace(params=half(train_state.params)))
    other = jax.tree.map(lambda leaf: leaf[..., None], state)
    with pytest.raises(ValueError, match=r'kernel/kinds: found uint8 of shape \(64, 5\), expected'):
      checkpoints.restore_compression(other)


def test_stop_request_only_inside():
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as stop:
    assert not stop.is_requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_requested(2)
  assert signal.getsignal(signal.SIGTERM) is before


def start(folder, *arguments, is_killed=False):
  folder.mkdir(exist_ok=True)
  # as many devices as this process has, for the runs are compared
  return processes.start(
    *('-m', 'tests.helpers.killed_run', folder, *arguments),
    devices=jax.device_count(),
    is_killed=is_killed,
  )


def final(folder):
  with np.load(folder / 'final.npz') as arrays:
    return [arrays[name] for name in arrays.files]


@pytest.mark.slow
def test_disturbed_run_ends_bit_identical(tmp_path):
  undisturbed = tmp_path / 'undisturbed'
  undisturbed.mkdir()
  killed_run.main(undisturbed, pause=0.0)
  disturbed = tmp_path / 'disturbed'
  for number in (2, 10):
    with start(disturbed, '0.02', is_killed=True) as process:
      process.wait_for_line(number)
      process.kill()
    assert process.returncode == -signal.SIGKILL
  # SIGTERM saves, and exits with 0
  process = start(disturbed, '0.05')
  process.wait_for_line(16)
  process.terminate()
  printed = [int(line) for line in process.finish().split()]
  assert not (disturbed / 'final.npz').exists()
  steps = [int(line) for line in start(disturbed).finish().split()]
  # from the very step, which need not be a multiple of the interval
  assert steps[0] == max([16, *printed]) + 1 and steps[-1] == 24
  assert_same_bits(final(disturbed), final(undisturbed))
