"""Trees of weights of all dtypes, and the Orbax folders that hold one."""

import functools

import ml_dtypes
import numpy as np

from opq_jax.core import trees


def flat_tree():
  """A small flat dict with all kinds of dtypes and numbers."""
  draw = np.random.default_rng(0).normal
  return {
    'conv1.weight': draw(size=(4, 3, 2)).astype(np.float32),
    'dense/kernel': draw(size=(3, 2)).astype(ml_dtypes.bfloat16),
    'half': draw(size=5).astype(np.float16),
    'steps': np.array(7, np.int32),
    'empty': np.zeros((0, 2), np.float32),
    'nan': np.array([np.nan, -0.0, np.inf], np.float64),
    'flag': np.array([True, False]),
  }


def nested_tree():
  """Arrays of `flat_tree` in nested dicts."""
  flat = flat_tree()
  return {
    'params': {'conv': {'kernel': flat['conv1.weight'], 'bias': flat['dense/kernel']}},
    'batch_stats': {'mean': flat['half'], 'count': flat['steps']},
  }


@functools.cache
def large_tree():
  """A flat dict with a leaf of more than one piece and a leaf of more than one block."""
  rng = np.random.default_rng(0)
  laplace = lambda *shape: rng.laplace(size=shape).astype(np.float32)
  return {
    # more than one piece, and few channels: its allocation shares a program with small networks
    'z.weight': laplace(100, 110, 100),
    'conv.weight': laplace(32, 8, 3, 3).astype(np.float16),
    'conv.bias': laplace(32),
    'table': laplace(96, 24).astype(ml_dtypes.bfloat16),
    'denormal': laplace(16, 16) * np.float32(1e-40),
    'empty': np.zeros((0, 5), np.float32),
    'step': np.array(3, np.int64),
    'flag': np.array([True]),
    'large': rng.integers(0, 9, 400_000).astype(np.int32),  # two blocks
  }


@functools.cache
def large_nested_tree():
  """Leaves of `large_tree` in nested containers, without the empty one: Orbax refuses it."""
  leaves = large_tree()
  rest = {name: leaf for name, leaf in leaves.items() if '.' not in name and leaf.size}
  conv = {'bias': leaves['conv.bias'], 'kernel': leaves['conv.weight']}
  return {'params': {'conv': conv, 'dense': [leaves['z.weight'], rest.pop('large')]}, **rest}


def save_orbax_checkpoint(path):
  """Writes `large_nested_tree` as a checkpoint."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, large_nested_tree())


def save_orbax_steps(path):
  """Writes `large_nested_tree` as the latest of a manager's two steps."""
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(path) as manager:
    for step in (2, 10):
      tree = large_nested_tree()
      changed = {**tree, 'step': np.array(step)} if step < 10 else tree
      manager.save(step, args=ocp.args.StandardSave(changed))
    manager.wait_until_finished()


def assert_same(found, expected):
  """Asserts that two trees have the same names, dtypes, shapes and bits, in NumPy arrays."""
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  assert list(found) == list(expected)
  for name, leaf in expected.items():
    assert isinstance(found[name], np.ndarray), name
    assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
    assert found[name].tobytes() == leaf.tobytes(), name
