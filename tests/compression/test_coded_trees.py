"""Parameters that stay coded in memory: exact, small, and nodes of a tree as any other."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from opq_jax.compression import CodedLeaf, CompressionState
from tests.helpers.opq_files import escaping, leaf_state, same_bits
from tests.helpers.output_scales import scaled_state, scales_along, unlike

DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16)]


def stack(levels, dtype=np.float32, shape=(3, 10, 14)):
  """Layers of different scales, with outliers in one of them, and their state."""
  weights = np.random.default_rng(0).normal(size=shape) * np.array([1, 4, 0.25])[:, None, None]
  weights[1, 2, 3], weights[1, 9, 13] = 1000, -2000
  params = {'w': weights.astype(dtype), 'b': np.ones(3, np.float32)}
  allocation = opq_jax.allocate(
    params, bits_per_weight=2.5 if levels == 'few' else 5.0, slices=lambda path, leaf: leaf.ndim > 2
  )
  return params, opq_jax.init_state(params, allocation)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('levels', ['few', 'many'])
def test_slices_come_back_exact(levels, dtype):
  params, state = stack(levels, dtype)
  tree = opq_jax.coded(params, state)
  expected = opq_jax.apply_compression(params, state)
  assert same_bits(opq_jax.decoded(tree)['w'], expected['w'])
  assert same_bits(jax.jit(opq_jax.decoded)(tree)['w'], expected['w'])
  assert tree['b'] is params['b']
  leaf = tree['w']
  assert (leaf.shape, leaf.dtype) == ((3, 10, 14), dtype)
  assert leaf.codes.nbytes == (210 if levels == 'few' else 420)
  # one layer after the other, as a scanned network has them
  _, layers = jax.lax.scan(lambda carry, layer: (carry, layer.decode()), 0, leaf)
  assert same_bits(layers, expected['w'])
  assert same_bits(jax.vmap(CodedLeaf.decode)(leaf), expected['w'])


@hypothesis.given(
  shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
  levels=st.integers(0, 20),
  seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=15)
def test_any_shape_comes_back_exact(shape, levels, seed):
  weights = np.random.default_rng(seed).laplace(size=shape).astype(np.float32) * 3
  state = CompressionState({'w': leaf_state(weights, levels=levels)})
  tree = opq_jax.coded({'w': weights}, state)
  expected = opq_jax.apply_compression({'w': weights}, state)['w']
  assert same_bits(opq_jax.decoded(tree)['w'], expected)
  largest = np.abs(np.asarray(opq_jax.encode({'w': weights}, state)['w'], int)).max()
  assert (tree['w'].width is None) == (7 < largest < 128)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_escaped_weights_and_scales_come_back_exact(dtype):
  params, state = escaping()
  scales = scales_along((24, 20), 1)
  weights = unlike((24, 20), scales, dtype=dtype)
  params = {**params, 'scaled': weights}
  state = CompressionState({**state.tree, 'scaled': scaled_state(weights, scales)})
  found = opq_jax.decoded(opq_jax.coded(params, state))
  expected = opq_jax.apply_compression(params, state)
  assert np.any(np.asarray(state.tree['scaled'].escaped))
  for name, leaf in expected.items():
    assert same_bits(found[name], leaf), name


def test_a_network_is_a_quarter_and_an_eighth_in_memory():
  weights = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
  for bits, share in ((5.0, 4), (2.0, 8)):
    state = opq_jax.init_state(
      {'w': weights}, opq_jax.allocate({'w': weights}, bits_per_weight=bits)
    )
    leaf = opq_jax.coded({'w': weights}, state)['w']
    rest = leaf.nbytes - leaf.codes.nbytes
    assert leaf.codes.nbytes == weights.nbytes // share and rest < 4000


def test_decoding_in_a_scan_holds_one_layer():
  """Memory that XLA plans: floats of one layer, not of all."""
  shape = (16, 128, 128)
  weights = {'w': np.random.default_rng(0).laplace(size=shape).astype(np.float32)}
  allocation = opq_jax.allocate(weights, bits_per_weight=4.0, slices=lambda path, leaf: 1)
  leaf = opq_jax.coded(weights, opq_jax.init_state(weights, allocation))['w']
  step = lambda x, layer: (x @ layer.decode(), None)
  run = jax.jit(lambda leaf, x: jax.lax.scan(step, x, leaf)[0])
  planned = run.lower(leaf, jnp.ones((4, 128))).compile().memory_analysis()
  assert planned.argument_size_in_bytes < 1.2 * leaf.codes.nbytes + 16 * 2048
  assert planned.temp_size_in_bytes < 4 * weights['w'].nbytes // 16


def test_coded_leaves_shard_as_their_codes():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  weights = np.random.default_rng(0).laplace(size=(64, 32)).astype(np.float32)
  state = opq_jax.init_state({'w': weights}, opq_jax.allocate({'w': weights}, bits_per_weight=2.0))
  leaf = opq_jax.coded({'w': weights}, state)['w']
  codes = jax.device_put(leaf.codes, NamedSharding(mesh, P('data')))
  laid = dataclasses.replace(leaf, codes=codes)
  values = jax.jit(CodedLeaf.decode)(laid)
  assert same_bits(values, leaf.decode())
  assert {shard.data.shape for shard in values.addressable_shards} == {(16, 32)}


def test_exported_functions_take_coded_leaves():
  pytest.importorskip('flatbuffers')
  params, state = stack('few')
  tree = opq_jax.coded(params, state)
  function = jax.jit(lambda tree: opq_jax.decoded(tree)['w'].sum())
  again = export.deserialize(export.export(function)(tree).serialize())
  assert float(again.call(tree)) == float(function(tree))


def test_coded_names_leaf_of_another_tree():
  params, state = stack('few')
  with pytest.raises(ValueError, match='w: found shape'):
    opq_jax.coded({**params, 'w': params['w'][:2]}, state)
