import collections
import dataclasses
import os
from pathlib import Path

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opq_jax.compression import CompressionState, encode
from opq_jax.compression.records import affine_codebook, exact_grid
from opq_jax.file import leaf_entries, packing
from opq_jax.file.reader import OpqFile, load
from opq_jax.file.writer import save, serialize
from tests.helpers.opq_files import (
  assert_contract,
  assert_same,
  escaping,
  index_text,
  laplace,
  leaf_state,
  network,
  same_bits,
  small,
  state_of,
  version_of,
  with_escapes,
)


def test_save_then_load(tmp_path):
  params, path = network(), tmp_path / 'net.opq'
  state = state_of(params)
  save(path, params, state)
  loaded, loaded_state = load(path)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_contract(params, state, loaded, loaded_state)
  assert os.listdir(tmp_path) == ['net.opq']
  assert path.read_bytes() == serialize(params, state)


def test_save_of_loaded_is_same():
  params = network()
  data = serialize(params, state_of(params))
  assert serialize(*load(data)) == data


def test_save_of_latent_weights():
  params, state = small()
  moved = {
    **params,
    'a': (params['a'] * -1.7).astype(np.float32),
    'b': [params['b'][0], np.zeros((4, 4), np.float32)],
  }
  moved['a'][0] = -0.0
  loaded, loaded_state = load(serialize(moved, state))
  assert_contract(moved, state, loaded, loaded_state)


def test_serialize_device_arrays():
  params, state = small()
  data = serialize(params, state)
  assert serialize(jax.tree.map(jnp.asarray, params), state) == data
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('device',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  assert serialize(jax.device_put(params, place), jax.device_put(state, place)) == data
  if 12 % len(jax.devices()) == 0:
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
    assert serialize({**params, 'a': jax.device_put(params['a'], split)}, state) == data


def test_serialize_any_key_order():
  params, _ = small()
  other = dict(reversed(params.items()))
  assert serialize(other, state_of(other)) == serialize(params, state_of(params))


DTYPES = list(leaf_entries.DTYPES.values())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_load_every_dtype(dtype):
  bits = np.random.default_rng(0).integers(0, 256, 60 * dtype.itemsize, np.uint8)
  if dtype == np.bool_:
    bits &= 1
  params = {'x': bits.view(dtype).reshape(3, 20), 'empty': np.zeros((0, 3), dtype)}
  params['scalar'] = params['x'][0, 0]
  loaded, _ = load(serialize(params, state_of(params, lambda leaf: False)))
  assert_same(params, loaded)


def test_load_odd_bits():
  nans = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 1], np.uint32).view(np.float32)
  params = {'nans': nans, 'big': np.arange(5, dtype='>i4'), 'strided': laplace(4, 6)[:, ::2]}
  loaded, _ = load(serialize(params, state_of(params, lambda leaf: False)))
  assert same_bits(loaded['nans'], nans)
  assert same_bits(loaded['big'], np.arange(5, dtype=np.int32))
  assert same_bits(loaded['strided'], params['strided'].copy())
  loaded['nans'][0] = 0  # arrays of one's own


def test_load_python_scalars():
  params = {'i': 3, 'f': 0.1, 'b': True, 'c': 1j}
  loaded, _ = load(serialize(params, state_of(params)))
  assert_same(loaded, jax.tree.map(np.asarray, params))


LEAVES = st.builds(
  lambda bits, dtype: (bits % 7).astype(np.float32).astype(dtype),
  hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)),
  st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_]),
)


TREES = st.recursive(
  st.one_of(LEAVES, st.none()),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.text('ab:é"\0', max_size=2), inner, max_size=3),
    st.dictionaries(st.integers(-3, 12), inner, max_size=3),
  ),
  max_leaves=6,
)


@given(TREES)
@settings(deadline=None, max_examples=60)
def test_load_any_tree(params):
  floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim != 1
  state = state_of(params, floating)
  loaded, loaded_state = load(serialize(params, state))
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_contract(params, state, loaded, loaded_state)


@pytest.mark.parametrize(
  'dtype', ['float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2']
)
@pytest.mark.parametrize('step', [0.5, 0.013])
def test_load_escaped_weights(dtype, step):
  dtype = leaf_entries.DTYPES[dtype]
  params, state = escaping(dtype, step=step, levels=4 if step == 0.5 else 127)
  book = state.tree['w']
  if step == 0.013:
    step, first = exact_grid(jnp.float32(step), jnp.float32(0.5056), jnp.int32(127))
    book = dataclasses.replace(
      book, step=step, codebook=affine_codebook(first, step, jnp.int32(127))
    )
  state = CompressionState({**state.tree, 'w': book})
  data = serialize(params, state)
  assert version_of(data) == '2' and f'30,20] {int(book.levels)} ' in index_text(data)
  loaded, loaded_state = load(data)
  assert_contract(params, state, loaded, loaded_state)
  assert serialize(loaded, loaded_state) == data
  with OpqFile(data) as file:
    codes, kinds = file.codes('w'), file.leaf_state('w').kinds
    assert same_bits(codes, encode(params, state)['w'])
    assert np.count_nonzero(codes == -128) == np.count_nonzero(kinds == 2) == 5
    assert same_bits(file['w'][0, :3], params['w'][0, :3])
    assert sum(file.sizes().values()) < len(data)


def test_load_all_escaped_or_pruned():
  for weights in (laplace(5, 4), laplace(1, 1)):
    record = with_escapes(leaf_state(weights, levels=0), np.ones(weights.shape, bool))
    loaded, loaded_state = load(serialize({'w': weights}, CompressionState({'w': record})))
    assert same_bits(loaded['w'], weights)
    assert_contract({'w': weights}, CompressionState({'w': record}), loaded, loaded_state)


def test_load_beyond_largest_number():
  # the value of the last level, 70000, is beyond float16
  weights = np.array([[3e4, -6.5e4, 6.55e4]]).astype(np.float16)
  record = leaf_state(weights, threshold=1e4, step=2e4, levels=4, offset=0.0)
  loaded, loaded_state = load(serialize({'w': weights}, CompressionState({'w': record})))
  assert np.isfinite(loaded['w']).all()
  assert_contract({'w': weights}, CompressionState({'w': record}), loaded, loaded_state)


@pytest.mark.parametrize(
  'dtype', [d for d in DTYPES if leaf_entries.can_be_compressed(d) and d.itemsize < 8], ids=str
)
def test_load_every_float(dtype):
  params, state = escaping(dtype, levels=3)
  finite = {**params, 'w': np.where(np.isfinite(params['w']), params['w'], 1).astype(dtype)}
  loaded, loaded_state = load(serialize(finite, state))
  assert_contract(finite, state, loaded, loaded_state)


Point = collections.namedtuple('Point', ['y', 'x'])


@flax.struct.dataclass
class Record:
  kernel: object
  bias: object
  name: str = flax.struct.field(pytree_node=False, default='')


def test_load_other_containers():
  params = {
    'frozen': flax.core.freeze({'w': laplace(3, 4)}),
    'point': Point(laplace(2), laplace(2, 5, seed=1)),
    'record': Record(laplace(4, 4, seed=2), None, 'kept'),
    'ordered': collections.OrderedDict(b=laplace(1), a=laplace(2)),
  }
  state = state_of(params)
  data = serialize(params, state)
  loaded, loaded_state = load(data)
  assert_contract(params, state, loaded, loaded_state)
  assert type(loaded['frozen']) is dict
  assert set(loaded['point']) == {'x', 'y'} and set(loaded['record']) == {'kernel', 'bias'}

  like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
  loaded, loaded_state = load(data, like=like)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert isinstance(loaded['point'], Point) and loaded['record'].name == 'kept'
  assert_contract(params, state, loaded, loaded_state)


def test_load_empty_tree():
  for params in ({}, None, [], {'a': [None, {}]}, np.float32(1)):
    loaded, state = load(serialize(params, state_of(params)))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert jax.tree.leaves(state) == []


def test_load_all_pruned():
  params = {'w': laplace(4, 5)}
  state = CompressionState({'w': leaf_state(params['w'], threshold=100.0, levels=0)})
  loaded, loaded_state = load(serialize(params, state))
  assert_contract(params, state, loaded, loaded_state)
  assert not loaded['w'].any() and not loaded_state.tree['w'].mask.any()


def test_load_across_blocks(monkeypatch):
  monkeypatch.setattr(packing, 'BLOCK', 1 << 12)
  params = {
    'a': laplace(3000),
    'b': np.int8(1),
    'c': laplace(5, seed=1),
    'd': laplace(3000, seed=2),
  }
  data = serialize(params, state_of(params))
  assert_same(load(data)[0], params)
  with OpqFile(data) as file:
    assert same_bits(file['d'], params['d']) and same_bits(file['b'], params['b'])


def test_load_values_in_cells():
  # bfloat16 has a number every 1/16 here, each where a cell begins; the value of a cell lies near
  # its end, and the nearest number to it is that of the next cell
  weights = np.linspace(8, 11, 49, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(7, 7)
  params = {'w': weights}
  state = CompressionState({'w': leaf_state(weights, 7.99, step=1 / 16, levels=127, offset=0.9)})
  loaded, loaded_state = load(serialize(params, state))
  assert_contract(params, state, loaded, loaded_state)
  assert same_bits(loaded['w'], weights)


def test_load_settled_cells():
  # no number of bfloat16 lies in the first cell, into which training brought a weight
  weights = np.array([[8.25, 9.0]], np.float32).astype(ml_dtypes.bfloat16)
  fine = leaf_state(weights, threshold=8.01, step=1 / 64, levels=127)
  weights[0, 0] = 0
  state = CompressionState({'w': fine})
  loaded, loaded_state = load(serialize({'w': weights}, state))
  assert loaded['w'].astype(np.float32).tolist() == [[8.0625, 9.0]]
  assert_contract({'w': weights}, state, loaded, loaded_state)


def test_load_beyond_last_cell():
  # its value is rounded to 8.0625, beyond threshold + step
  weights = np.array([[8, -9]], np.float32).astype(ml_dtypes.bfloat16)
  state = CompressionState(
    {'w': leaf_state(weights, threshold=7.99, step=1 / 16, levels=1, offset=0.9)}
  )
  loaded, loaded_state = load(serialize({'w': weights}, state))
  assert loaded['w'].astype(np.float32).tolist() == [[8.0625, -8.0625]]
  assert_contract({'w': weights}, state, loaded, loaded_state)


@pytest.mark.slow
@pytest.mark.skipif('OPQ_TEST_ASSETS' not in os.environ, reason='OPQ_TEST_ASSETS is not set')
def test_load_real_network():
  path = Path(os.environ['OPQ_TEST_ASSETS']) / 'weights' / 'resnet20_cifar10.safetensors'
  if not path.exists():
    pytest.skip('no ResNet-20 in OPQ_TEST_ASSETS')
  params = safetensors.numpy.load_file(path)

  def real_state(weights):
    scale = float(np.exp2(np.round(np.log2(np.abs(weights).mean()))))
    return leaf_state(weights, 0.75 * scale, scale, 127)

  state = CompressionState({k: real_state(v) if v.ndim >= 2 else None for k, v in params.items()})
  loaded, loaded_state = load(serialize(params, state))
  assert_contract(params, state, loaded, loaded_state)
