"""States as JAX programs, exporters and Orbax take them: pytrees of JAX's arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export

import opq_jax
from opq_jax.core import trees


def params():
  draw = np.random.default_rng(0).laplace
  kernel = draw(size=(48, 32)).astype(np.float32)
  return {'kernel': kernel, 'half': (kernel[:16] / 3).astype(np.float16), 'bias': np.ones(32, 'f4')}


def states(tree):
  """The states of a tree by the ways to get one."""
  network = opq_jax.compress(tree, compression_rate=12.0)
  data = opq_jax.file.serialize(tree, network.state)
  with opq_jax.OpqFile(data) as file:
    leaf = file.leaf_state('kernel')
  return {
    'init_state': opq_jax.init_state(tree, network.allocation),
    'compress': network.state,
    'trellis': opq_jax.compress(
      tree, compression_rate=12.0, encoder=opq_jax.encoders.Trellis()
    ).state,
    'load': opq_jax.load(data)[1],
    'leaf_state': leaf,
  }


@pytest.mark.parametrize('way', ['init_state', 'compress', 'load', 'leaf_state', 'trellis'])
def test_state_holds_jax_arrays(way):
  state = states(params())[way]
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_state_under_transfer_guard():
  tree = jax.tree.map(jnp.asarray, params())
  program = jax.jit(opq_jax.apply_compression)
  for way in ('init_state', 'load'):
    state = states(tree)[way]
    with jax.transfer_guard('disallow'):
      found = program(tree, state)
    np.testing.assert_array_equal(found['kernel'], opq_jax.apply_compression(tree, state)['kernel'])


def test_state_restored_by_orbax(tmp_path):
  state = states(params())['load']
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', jax.tree.map(jnp.zeros_like, state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_state_of_exported_function():
  pytest.importorskip('flatbuffers')
  tree, state = params(), states(params())['init_state']
  exported = export.export(jax.jit(opq_jax.apply_compression))(tree, state)
  again = export.deserialize(exported.serialize())
  expected = opq_jax.apply_compression(tree, state)
  jax.tree.map(np.testing.assert_array_equal, again.call(tree, state), expected)


def test_allocation_of_exported_function():
  pytest.importorskip('flatbuffers')
  tree = params()
  allocation = opq_jax.allocate(tree, compression_rate=12.0, corrected=False)
  exported = export.export(jax.jit(opq_jax.init_state))(tree, allocation)
  state = export.deserialize(exported.serialize()).call(tree, allocation)
  expected = opq_jax.init_state(tree, allocation)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


WRONG = [
  ({'w': jax.ShapeDtypeStruct((4, 4), np.float32)}, 'w: found a shape without values'),
  ({'w': np.ones((4, 4)), 'act': jax.nn.relu}, r'act: found relu, a function, .*eqx\.partition'),
  ({'layer': {'w': np.arange(16.0).reshape(4, 4)}}, 'layer/w: found float64, which JAX makes'),
]


@pytest.mark.parametrize(('tree', 'message'), WRONG, ids=[message[:12] for _, message in WRONG])
def test_allocate_refuses_leaves(tree, message):
  with pytest.raises(ValueError, match=message):
    opq_jax.allocate(tree)


def test_allocate_float64_where_jax_has_it():
  wide = {'w': np.random.default_rng(0).laplace(size=(16, 16)), 'b': np.ones(3)}
  with jax.enable_x64(True):
    state = opq_jax.init_state(wide, opq_jax.allocate(wide))
    assert opq_jax.apply_compression(wide, state)['w'].dtype == np.float64


def test_allocate_names_random_keys():
  tree = params() | {'rngs': {'dropout': jax.random.key(3)}}
  with pytest.warns(UserWarning, match='rngs/dropout: found keys of random numbers'):
    allocation = opq_jax.allocate(tree)
  state = opq_jax.init_state(tree, allocation)
  assert opq_jax.apply_compression(tree, state)['rngs']['dropout'] == tree['rngs']['dropout']
  assert trees.records(tree, state.tree, opq_jax.compression.LeafState).count(None) == 2
