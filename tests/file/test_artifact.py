import base64
import collections
import dataclasses
import json
import os
import time
import tracemalloc
import zlib
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

from opq_jax.coding import escapes
from opq_jax.coding.payload import encode_codes, entropy
from opq_jax.compression import CompressionState, LeafState, apply_compression, encode
from opq_jax.compression.records import affine_codebook, exact_grid
from opq_jax.core import trees
from opq_jax.file import front as file_front
from opq_jax.file import index as file_index
from opq_jax.file import packing
from opq_jax.file.reader import OpqFile, load
from opq_jax.file.writer import save, serialize
from tests.helpers.opq_files import (
  escaping,
  laplace,
  leaf_state,
  network,
  parts,
  rebuilt,
  same_bits,
  small,
  state_of,
  version_of,
  with_escapes,
)


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for name, leaf in trees.named_leaves(first).items():
    assert same_bits(leaf, trees.named_leaves(second)[name]), name


def assert_contract(params, state, loaded, loaded_state):
  """What a file promises, leaf by leaf, so that no jit narrows a leaf of 64 bits."""
  states = trees.records(params, state.tree, LeafState)
  new_leaves = trees.named_leaves(loaded)
  new_states = trees.records(loaded, loaded_state.tree, LeafState)
  assert set(trees.named_leaves(params)) == set(new_leaves)
  new_states = dict(zip(new_leaves, new_states, strict=True))
  for (name, leaf), record in zip(trees.named_leaves(params).items(), states, strict=True):
    new, new_record = new_leaves[name], new_states[name]
    assert type(new) is np.ndarray
    if record is None:
      assert new_record is None and same_bits(leaf, new), name
      continue
    expected, kept = CompressionState(record), CompressionState(new_record)
    assert same_bits(apply_compression(leaf, expected), new), name
    assert same_bits(apply_compression(new, kept), new), name
    assert same_bits(encode(leaf, expected), encode(new, kept)), name
    assert record.dtype == new_record.dtype
    for field in ('codebook', 'threshold', 'step', 'levels', 'kinds'):
      assert same_bits(getattr(record, field), getattr(new_record, field)), (name, field)


def test_a_network_comes_back(tmp_path):
  params, path = network(), tmp_path / 'net.opq'
  state = state_of(params)
  save(path, params, state)
  loaded, loaded_state = load(path)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_contract(params, state, loaded, loaded_state)
  assert os.listdir(tmp_path) == ['net.opq']
  assert path.read_bytes() == serialize(params, state)


def test_a_loaded_network_is_saved_as_it_was():
  params = network()
  data = serialize(params, state_of(params))
  assert serialize(*load(data)) == data


def test_latent_weights_after_training_come_back():
  params, state = small()
  moved = {
    **params,
    'a': (params['a'] * -1.7).astype(np.float32),
    'b': [params['b'][0], np.zeros((4, 4), np.float32)],
  }
  moved['a'][0] = -0.0
  loaded, loaded_state = load(serialize(moved, state))
  assert_contract(moved, state, loaded, loaded_state)


def test_device_arrays_make_the_same_bytes():
  params, state = small()
  data = serialize(params, state)
  assert serialize(jax.tree.map(jnp.asarray, params), state) == data
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('device',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  assert serialize(jax.device_put(params, place), jax.device_put(state, place)) == data
  if 12 % len(jax.devices()) == 0:
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
    assert serialize({**params, 'a': jax.device_put(params['a'], split)}, state) == data


def test_the_order_of_keys_changes_nothing():
  params, _ = small()
  other = dict(reversed(params.items()))
  assert serialize(other, state_of(other)) == serialize(params, state_of(params))


DTYPES = list(file_index.DTYPES.values())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
  bits = np.random.default_rng(0).integers(0, 256, 60 * dtype.itemsize, np.uint8)
  if dtype == np.bool_:
    bits &= 1
  params = {'x': bits.view(dtype).reshape(3, 20), 'empty': np.zeros((0, 3), dtype)}
  params['scalar'] = params['x'][0, 0]
  loaded, _ = load(serialize(params, state_of(params, lambda leaf: False)))
  assert_same(params, loaded)


def test_signs_of_zeros_payloads_of_nans_and_byte_orders():
  nans = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 1], np.uint32).view(np.float32)
  params = {'nans': nans, 'big': np.arange(5, dtype='>i4'), 'strided': laplace(4, 6)[:, ::2]}
  loaded, _ = load(serialize(params, state_of(params, lambda leaf: False)))
  assert same_bits(loaded['nans'], nans)
  assert same_bits(loaded['big'], np.arange(5, dtype=np.int32))
  assert same_bits(loaded['strided'], params['strided'].copy())
  loaded['nans'][0] = 0  # arrays of one's own


def test_python_scalars_become_arrays():
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
def test_any_tree_comes_back(params):
  floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim != 1
  state = state_of(params, floating)
  loaded, loaded_state = load(serialize(params, state))
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_contract(params, state, loaded, loaded_state)


# ---- escaped weights ----


@pytest.mark.parametrize(
  'dtype', ['float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2']
)
@pytest.mark.parametrize('step', [0.5, 0.013])
def test_escaped_weights_come_back(dtype, step):
  dtype = file_index.DTYPES[dtype]
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


def test_a_leaf_may_be_all_escaped_or_without_levels():
  for weights in (laplace(5, 4), laplace(1, 1)):
    record = with_escapes(leaf_state(weights, levels=0), np.ones(weights.shape, bool))
    loaded, loaded_state = load(serialize({'w': weights}, CompressionState({'w': record})))
    assert same_bits(loaded['w'], weights)
    assert_contract({'w': weights}, CompressionState({'w': record}), loaded, loaded_state)


def test_what_needs_no_field_is_of_version_1():
  params, state = escaping()
  plain = state_of(params)
  assert version_of(serialize(params, plain)) == '1'
  assert version_of(serialize(params, state)) == '2'


def test_values_beyond_the_dtype_are_its_largest():
  # the value of the last level, 70000, is beyond float16
  weights = np.array([[3e4, -6.5e4, 6.55e4]]).astype(np.float16)
  record = leaf_state(weights, threshold=1e4, step=2e4, levels=4, offset=0.0)
  loaded, loaded_state = load(serialize({'w': weights}, CompressionState({'w': record})))
  assert np.isfinite(loaded['w']).all()
  assert_contract({'w': weights}, CompressionState({'w': record}), loaded, loaded_state)


FIELDS = {
  'of a newer version': (
    ' escapes=5,',
    ' palette=7 escapes=5,',
    'field palette, which a newer opq_',
  ),
  'of an uncompressed leaf': ('"float32[3]"', '"float32[3] same=w"', 'field same, which a newer'),
  'escapes of no codes': ('"float32[3]"', '"float32[3] escapes=1,9"', 'fields of compressed'),
  'twice': (' escapes=5,', ' escapes=5,9 escapes=5,', 'expected every name once'),
  'without a count': (' escapes=5,', ' escapes=', r'expected escapes=COUNT,BYTES'),
  'of none': (' escapes=5,', ' escapes=0,', r'expected escapes=COUNT,BYTES'),
  'of too many': (' escapes=5,', ' escapes=601,', r'expected escapes=COUNT,BYTES'),
  'of too many bytes': (' escapes=5,', ' escapes=5,9', r'expected escapes=COUNT,BYTES'),
  'of no bytes': ('escapes=5,', 'escapes=5,0 escapes=5,', r'expected every name once'),
  'of other counts': (' escapes=5,', ' escapes=4,', r'^w: found'),
  'of other bytes': (' escapes=5,', ' escapes=5,0', r'expected|^w: found'),
}


@pytest.mark.parametrize('name', FIELDS)
def test_fields_that_cannot_be_are_refused(name):
  old, new, message = FIELDS[name]
  if name == 'of other bytes':
    new = old + '1'
  data = rebuilt(serialize(*escaping()), replaced(old, new))
  with pytest.raises(ValueError, match=message):
    load(data)


def test_escapes_in_a_file_of_version_1_are_refused():
  data = serialize(*escaping())
  with pytest.raises(ValueError, match='w: found escapes, expected none in version 1'):
    OpqFile(data.replace(b'"version":"2"', b'"version":"1"'))


@pytest.mark.parametrize(
  'places, values, message',
  [
    ([0, 1], [1, np.inf], r'^w: found 1 escaped weights that are NaN or infinite'),
    ([0, 1], [np.nan, 1], r'^w: found 1 escaped weights that are NaN or infinite'),
    ([0, 3], [1, 1], r'^w: found 1 escaped weights that have codes as well'),
  ],
)
def test_escapes_that_no_writer_makes_are_refused(monkeypatch, places, values, message):
  weights = np.array([[9, 9, 0, 1, 0, 0]], np.float32)
  record = with_escapes(leaf_state(weights), weights == 9)
  section = escapes.encode(np.array(places), np.array(values, np.float32))
  monkeypatch.setattr(escapes, 'encode', lambda *_: section)
  data = serialize({'w': weights}, CompressionState({'w': record}))
  with pytest.raises(ValueError, match=message):
    load(data)


@pytest.mark.parametrize('mask', [0x01, 0xFF])
def test_every_flipped_byte_of_escapes_is_found(mask):
  data = serialize(*escaping(shape=(5, 5)))
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      load(bytes(damaged))


@pytest.mark.parametrize('dtype', ['float4_e2m1fn', 'float6_e2m3fn', 'float8_e8m0fnu'])
def test_floats_that_cannot_be_compressed_are_named(dtype):
  weights = np.ones((4, 4), file_index.DTYPES[dtype])
  with pytest.raises(ValueError, match=rf'^w: found dtype {dtype}, expected floats of whole bytes'):
    serialize({'w': weights}, CompressionState({'w': leaf_state(weights)}))
  data = rebuilt(serialize(*small()), replaced('"float32[12,5] 4', f'"{dtype}[12,5] 4'))
  with pytest.raises(ValueError, match='expected floats of whole bytes'):
    load(data)


@pytest.mark.parametrize(
  'dtype', [d for d in DTYPES if file_index.can_be_compressed(d) and d.itemsize < 8], ids=str
)
def test_every_float_is_compressed(dtype):
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


def test_other_containers_come_back_as_dicts_or_like_themselves():
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


def test_like_lists_all_that_differs():
  params, state = small()
  like = {'a': np.zeros((12, 6)), 'b': [np.zeros(7)], 'c': np.zeros(()), 'd': np.zeros(2)}
  with pytest.raises(ValueError) as error:
    load(serialize(params, state), like=like)
  for line in (
    'a: found (12, 6), expected (12, 5)',
    'b/1: found nothing, expected (4, 4)',
    'd: found (2,), expected nothing',
  ):
    assert line in str(error.value)
  assert 'b/0' not in str(error.value) and 'c:' not in str(error.value)


def test_a_file_of_nothing():
  for params in ({}, None, [], {'a': [None, {}]}, np.float32(1)):
    loaded, state = load(serialize(params, state_of(params)))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert jax.tree.leaves(state) == []


def test_all_weights_pruned():
  params = {'w': laplace(4, 5)}
  state = CompressionState({'w': leaf_state(params['w'], threshold=100.0, levels=0)})
  loaded, loaded_state = load(serialize(params, state))
  assert_contract(params, state, loaded, loaded_state)
  assert not loaded['w'].any() and not loaded_state.tree['w'].mask.any()


def test_leaves_across_blocks(monkeypatch):
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


# ---- reading one leaf at a time ----


def test_the_mapping():
  params, state = small()
  with OpqFile(serialize(params, state, {'network': 'small', 'é': ''})) as file:
    assert list(file) == list(trees.named_leaves(params)) == ['a', 'b/0', 'b/1', 'c']
    assert len(file) == 4 and 'b/1' in file and 'b' not in file
    assert same_bits(file['b/0'], params['b'][0])
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    assert same_bits(file.codes('a'), encode(params, state)['a'])
    assert same_bits(file.leaf_state('a').mask, state.tree['a'].mask)
    assert file.leaf_state('c') is None
    assert file.metadata == {'network': 'small', 'é': ''}
    with pytest.raises(KeyError, match='nothing'):
      file['nothing']
    with pytest.raises(ValueError, match='c: found a leaf that is not compressed'):
      file.codes('c')
  with pytest.raises(ValueError, match='closed'):
    file['a']


def test_the_sizes_of_the_leaves_and_of_the_rest_make_the_file():
  params = network()
  data = serialize(params, state_of(params))
  with OpqFile(data) as file:
    sizes = file.sizes()
  assert list(sizes) == list(trees.named_leaves(params))
  codes = encode(params['params']['conv'], state_of(params['params']['conv']))['kernel']
  assert sizes['params/conv/kernel'] == len(encode_codes(np.asarray(codes))) + 12
  header, index = parts(data)
  assert sum(sizes.values()) == len(data) - len(header) - index['index'][1] + index['index'][0]
  # of one byte, and of none
  data = serialize({'a': np.int8(1)}, CompressionState({'a': None}))
  with OpqFile(data) as file:
    assert file.sizes() == {'a': int(np.diff(parts(data)[1]['uncompressed'])[0])}
  with OpqFile(serialize({'a': np.ones(0)}, CompressionState({'a': None}))) as file:
    assert file.sizes() == {'a': 0}


def test_damage_to_a_leaf_is_damage_to_it_alone():
  params, state = small()
  data = bytearray(serialize(params, state))
  header, offsets = parts(data)
  data[len(header) + offsets['codes'][1] - 2] ^= 1  # of b/1, the last compressed leaf
  with OpqFile(bytes(data)) as file:
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    assert same_bits(file['b/0'], params['b'][0])
    with pytest.raises(ValueError, match=r'^b/1: '):
      file['b/1']
  with pytest.raises(ValueError, match=r'^b/1: '):
    load(bytes(data))

  data = bytearray(serialize(params, state))
  data[-3] ^= 1
  with OpqFile(bytes(data)) as file:
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    with pytest.raises(ValueError, match=r'^b/0: found CRC-32 .*, expected'):
      file['b/0']


def test_it_is_a_safetensors_file(tmp_path):
  params, state = small()
  save(tmp_path / 'x.opq', params, state)
  with safetensors.safe_open(tmp_path / 'x.opq', 'np') as file:
    assert set(file.keys()) == {'grids', 'index', 'codes', 'uncompressed'}
    assert file.metadata()['format'] == 'opq' and file.metadata()['version'] == '1'
    grids = file.get_tensor('grids')
  assert grids.dtype == np.float32
  assert grids.tolist() == [[0.5, 0.75, 0.5]] * 2
  safetensors.deserialize(serialize({}, state_of({})))


def test_the_format_does_not_move():
  # a file of version 1 as it was written once: every later version must read it
  loaded, state = load(base64.b64decode(VERSION_1))
  assert_same(
    loaded,
    {
      'bias': np.array([0.5, -1.25], np.float32),
      'kernel': np.array([[0.75, 0, -0.75], [0, 1.25, 0]], np.float32),
      'list': [None, (np.array(7, np.int32),)],
    },
  )
  assert state.tree['kernel'].mask.tolist() == [[True, False, True], [False, True, False]]
  assert [float(state.tree['kernel'].codebook[i]) for i in (0, 1, 2, -1)] == [0, 0.75, 1.25, -0.75]


def test_the_container_is_small():
  params = {
    f'layer_{i}': {
      'conv': {'kernel': laplace(3, 3, 16, 16, seed=i)},
      'norm': {name: laplace(16, seed=i) for name in ('bias', 'mean', 'scale', 'var')},
    }
    for i in range(20)
  }
  state = state_of(params)
  data = serialize(params, state)
  bits = sum(
    entropy(np.asarray(code)) * code.size
    for code in jax.tree.leaves(encode(params, state))
    if code.dtype == jnp.int8
  )
  others = 20 * 4 * 16 * 4
  assert len(data) <= bits / 8 + 0.95 * others + 20 * 35 + 700


# ---- what `save` refuses ----


@pytest.mark.parametrize(
  'leaf', ['text', object(), np.array(['a']), np.array([object()]), np.longdouble(1), 1 << 70]
)
def test_leaves_that_are_no_numbers_are_named(leaf):
  params = {'good': laplace(3), 'bad': [leaf]}
  with pytest.raises(ValueError, match=r'^bad/0: found '):
    serialize(params, CompressionState({'good': None, 'bad': [None]}))


def test_random_keys_are_named():
  with pytest.raises(ValueError, match=r'^rng: found .*, expected an array'):
    serialize({'rng': jax.random.key(0)}, CompressionState({'rng': None}))


@pytest.mark.parametrize('key', [1.5, True, (1, 2), b'x', None])
def test_keys_that_are_neither_str_nor_int_are_named(key):
  params = {'a': {key: laplace(3)}}
  with pytest.raises(ValueError, match=r'^a/.*: found a key of type .*, expected str or int'):
    serialize(params, state_of(params))


def test_two_leaves_of_one_name_are_refused():
  params = {'a/b': laplace(3), 'a': {'b': laplace(3)}}
  with pytest.raises(ValueError, match='a/b: two leaves'):
    serialize(params, state_of(params))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value):
  params, state = small()
  params['b'][1][0, 0] = value
  with pytest.raises(ValueError, match=r'^b/1: found 1 weights that are NaN or infinite'):
    serialize(params, state)


def test_states_of_other_trees_are_named():
  params, state = small()
  with pytest.raises(ValueError, match='d: not found in the tree, expected by the state'):
    serialize(params, CompressionState({**state.tree, 'd': None}))
  with pytest.raises(ValueError, match=r'^a: found shape \(12, 4\), expected \(12, 5\)'):
    serialize({**params, 'a': laplace(12, 4)}, state)
  with pytest.raises(ValueError, match=r'^a: found dtype float16, expected float32'):
    serialize({**params, 'a': laplace(12, 5, dtype=np.float16)}, state)


def test_codebooks_that_the_file_cannot_say_are_named():
  params, state = small()
  bad = state.tree['a'].replace(codebook=state.tree['a'].codebook.at[3].mul(jnp.float32(1.01)))
  with pytest.raises(ValueError, match=r'^a: found another codebook'):
    serialize(params, CompressionState({**state.tree, 'a': bad}))
  bad = state.tree['a'].replace(levels=jnp.int32(200))
  with pytest.raises(ValueError, match=r'^a: found 200 levels, expected 0 to 127'):
    serialize(params, CompressionState({**state.tree, 'a': bad}))
  bad = leaf_state(params['a'], levels=0)
  with pytest.raises(ValueError, match=r'^a: found code 1, expected at most 0'):
    serialize(params, CompressionState({**state.tree, 'a': bad}))


def test_values_are_rounded_inside_of_their_cells():
  # bfloat16 has a number every 1/16 here, each where a cell begins; the value of a cell lies near
  # its end, and the nearest number to it is that of the next cell
  weights = np.linspace(8, 11, 49, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(7, 7)
  params = {'w': weights}
  state = CompressionState({'w': leaf_state(weights, 7.99, step=1 / 16, levels=127, offset=0.9)})
  loaded, loaded_state = load(serialize(params, state))
  assert_contract(params, state, loaded, loaded_state)
  assert same_bits(loaded['w'], weights)


def test_a_weight_that_training_moves_into_a_cell_without_a_number_has_another_cell():
  # no number of bfloat16 lies in the first cell, into which training brought a weight
  weights = np.array([[8.25, 9.0]], np.float32).astype(ml_dtypes.bfloat16)
  fine = leaf_state(weights, threshold=8.01, step=1 / 64, levels=127)
  weights[0, 0] = 0
  state = CompressionState({'w': fine})
  loaded, loaded_state = load(serialize({'w': weights}, state))
  assert loaded['w'].astype(np.float32).tolist() == [[8.0625, 9.0]]
  assert_contract({'w': weights}, state, loaded, loaded_state)


def test_the_last_cell_has_no_end():
  # its value is rounded to 8.0625, beyond threshold + step
  weights = np.array([[8, -9]], np.float32).astype(ml_dtypes.bfloat16)
  state = CompressionState(
    {'w': leaf_state(weights, threshold=7.99, step=1 / 16, levels=1, offset=0.9)}
  )
  loaded, loaded_state = load(serialize({'w': weights}, state))
  assert loaded['w'].astype(np.float32).tolist() == [[8.0625, -8.0625]]
  assert_contract({'w': weights}, state, loaded, loaded_state)


@pytest.mark.parametrize('metadata', [{'a': 1}, {1: 'a'}, {'a': None}])
def test_metadata_that_are_no_strings_are_refused(metadata):
  with pytest.raises(ValueError, match='metadata: found'):
    serialize({}, state_of({}), metadata)


def test_what_no_reader_would_take_is_not_written(tmp_path):
  path = tmp_path / 'net.opq'
  params, state = small()
  longest = file_index.MAX_INDEX - index_size(serialize(params, state, {'notes': ''}))
  with OpqFile(serialize(params, state, {'notes': 'x' * longest})) as file:
    assert len(file.metadata['notes']) == longest
  with pytest.raises(ValueError, match=r'found an index of \d+ bytes, expected at most'):
    save(path, params, state, {'notes': 'x' * (longest + 1)})
  many = {'k' * 100_000: {str(i): np.zeros(0, bool) for i in range(1000)}}
  with pytest.raises(ValueError, match=r'found path names of \d+ characters, expected at most'):
    save(path, many, state_of(many))
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, call):
  params, state = small()
  path = tmp_path / 'net.opq'
  save(path, {'old': laplace(3)}, CompressionState({'old': None}))
  before = path.read_bytes()

  def crash(*_):
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(os, call, crash)
    with pytest.raises(OSError, match='no space left'):
      save(path, params, state)
  assert path.read_bytes() == before and os.listdir(tmp_path) == ['net.opq']
  with pytest.raises(ValueError):
    save(path, {'a': 'text'}, CompressionState({'a': None}))
  assert path.read_bytes() == before and os.listdir(tmp_path) == ['net.opq']
  save(path, params, state)
  assert path.read_bytes() == serialize(params, state) and os.listdir(tmp_path) == ['net.opq']


# ---- damaged and hostile files ----


def index_text(data):
  header, offsets = parts(data)
  index = data[len(header) :][slice(*offsets['index'])]
  return packing.unpack(index, file_index.MAX_INDEX).decode()


def index_size(data):
  """Bytes of the index once it is unpacked."""
  return len(index_text(data))


def edited(**changes):
  return lambda text: json.dumps({**json.loads(text), **changes})


def replaced(old, new):
  def edit(text):
    assert old in text
    return text.replace(old, new, 1)

  return edit


@pytest.mark.parametrize('mask', [0x01, 0x20, 0xFF])
def test_every_flipped_byte_is_found(mask):
  data = serialize(*small(), {'user': 'text'})
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      load(bytes(damaged))


def test_every_truncation_and_every_tail_is_found(tmp_path):
  data = serialize(*small())
  for length in range(len(data)):
    with pytest.raises(ValueError):
      OpqFile(data[:length])
  for tail in (b'\0', b' ', data):
    with pytest.raises(ValueError, match=r'found .* bytes, expected'):
      OpqFile(data + tail)
  (tmp_path / 'cut.opq').write_bytes(data[:-1])
  with pytest.raises(ValueError, match=r'cut.opq: found \d+ bytes, expected \d+'):
    load(tmp_path / 'cut.opq')


def test_a_file_that_is_cut_while_it_is_open_is_named(tmp_path):
  path = tmp_path / 'net.opq'
  params = {'a': laplace(12, 5), 'b': laplace(20_000)}  # more than what is read ahead
  save(path, params, state_of(params))
  with OpqFile(path) as file:
    os.truncate(path, path.stat().st_size - 1)
    assert file['a'].shape == (12, 5)
    with pytest.raises(ValueError, match=r'net.opq: found \d+ bytes at \d+, expected'):
      file['b']


@pytest.mark.parametrize('shape', ['[-1]', '[1.0]', '[true]', '[]', '"1"', 'null'])
def test_sizes_that_are_none_are_refused(shape):
  data = serialize(*small())
  text = parts(data)[0][8:].decode().replace('"shape":[2,3]', f'"shape":{shape}')
  damaged = len(text).to_bytes(8, 'little') + text.encode() + data[len(parts(data)[0]) :]
  with pytest.raises(ValueError, match=r'found a damaged header: '):
    OpqFile(damaged)


def test_other_files_are_refused(tmp_path):
  for data in (b'', b'{}', bytes(100), b'\xff' * 100, safetensors.numpy.save({'a': np.ones(3)})):
    with pytest.raises(ValueError, match=r'found no .opq file'):
      OpqFile(data)
  with pytest.raises(FileNotFoundError):
    load(tmp_path / 'none.opq')


def test_other_versions_are_refused():
  data = serialize(*small())
  assert data.count(b'"version":"1"') == 1
  with pytest.raises(ValueError, match="found version '3', expected '1' or '2'"):
    load(data.replace(b'"version":"1"', b'"version":"3"'))


def nested(begin, end, depth):
  return f'{{"blocks":[],"metadata":{{}},"tree":{begin * depth}null{end * depth}}}'


LEAF_A, LEAF_B0 = '"a":"float32[12,5] 4 ', '"float32[7]"'

HOSTILE = {
  'no JSON': lambda text: text[:-1],
  'no object': lambda text: '[]',
  'NaN': edited(blocks=[float('nan'), 1]),
  'no tree': lambda text: text.replace('"tree"', '"tee"'),
  'key twice': replaced('"c":', '"a":'),
  'name twice': replaced('"c":', '"b/0":'),
  'huge leaf': replaced(LEAF_A, '"a":"float32[999999999999,5] 4 '),
  'overflow': replaced(LEAF_A, f'"a":"float32[{",".join(["4294967296"] * 3)}] 4 '),
  'huge integer': replaced(LEAF_A, f'"a":"float32[{"9" * 5000}] 4 '),
  'negative dimension': replaced(LEAF_A, '"a":"float32[-12,-5] 4 '),
  'too many dimensions': replaced(LEAF_A, f'"a":"float32[{"1," * 69}60] 4 '),
  'other shape': replaced(LEAF_A, '"a":"float32[12,6] 4 '),
  'no weights': replaced(LEAF_A, '"a":"float32[0] 4 '),
  'other digits': replaced(LEAF_A, '"a":"float32[١٢,5] 4 '),
  'levels below codes': replaced(LEAF_A, '"a":"float32[12,5] 2 '),
  'too many levels': replaced(LEAF_A, '"a":"float32[12,5] 128 '),
  'integers compressed': replaced(LEAF_A, '"a":"int32[12,5] 4 '),
  'more bytes': replaced(LEAF_A, '"a":"float32[12,5] 4 9'),
  'no levels': replaced(LEAF_A, '"a":"float32[12,5] '),
  'objects': replaced(LEAF_B0, '"object[7]"'),
  'unknown dtype': replaced(LEAF_B0, '"float33[7]"'),
  'longer leaf': replaced(LEAF_B0, '"float32[8]"'),
  'very long leaf': replaced(LEAF_B0, '"float32[99999999999999]"'),
  'longest leaf': replaced(LEAF_B0, '"float64[999999999999999999]"'),
  'more rows': replaced(LEAF_B0, '"float32[7] 4 1"'),
  'number for a leaf': replaced(LEAF_B0, '7'),
  'unknown container': replaced('["list"', '["set"'),
  'empty container': replaced('["list"', '[["list"]'),
  'bad key': replaced('"c":', '":c":'),
  'key with zeros': replaced('"c":', '":03":'),
  'no blocks': edited(blocks=[]),
  'half a block': edited(blocks=[30]),
  'negative block': edited(blocks=[-5, 0]),
  'many blocks': edited(blocks=[0, 0] * 5),
  'true': edited(blocks=[True, 0]),
  'metadata': edited(metadata={'a': 1}),
  'deep lists': lambda text: nested('["list",', ']', 9000),
  'deep dicts': lambda text: nested('{"a":', '}', 9000),
}


@pytest.mark.parametrize('edit', HOSTILE.values(), ids=HOSTILE)
def test_an_index_that_lies_is_refused_at_once(edit):
  data = rebuilt(serialize(*small()), edit)
  tracemalloc.start()
  began = time.process_time()
  with pytest.raises(ValueError):
    load(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < 2 and peak < 20 << 20


def test_an_index_that_unpacks_for_ever_is_refused():
  data = rebuilt(serialize(*small()), lambda text: text + ' ' * file_index.MAX_INDEX)
  assert len(data) < 10_000
  tracemalloc.start()
  with pytest.raises(ValueError, match='do not end within'):
    OpqFile(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 * file_index.MAX_INDEX


def test_a_block_that_unpacks_to_more_than_its_leaves_is_refused():
  params = {'a': laplace(7)}
  data = serialize(params, state_of(params))
  bomb = packing.pack(bytes(1 << 24), packing.FLOAT_PERIOD)
  header, offsets = parts(data)
  data = data[: len(header) + offsets['codes'][1]] + bomb
  data = rebuilt_sizes(data, len(bomb))
  data = rebuilt(data, edited(blocks=[len(bomb), zlib.crc32(bomb)]))
  with pytest.raises(ValueError, match='do not end within 28 bytes'):
    load(data)


def rebuilt_sizes(data, blocks_size):
  header, offsets = parts(data)
  checksum = int(json.loads(header[8:])['__metadata__']['crc32'], 16)
  index, codes = (offsets[name][1] - offsets[name][0] for name in ('index', 'codes'))
  rows = (offsets['grids'][1] - offsets['grids'][0]) // 12
  sizes = rows, index, codes, blocks_size
  return file_front.header(sizes, checksum, version_of(data)) + data[len(header) :]


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_noise_for_an_index_is_refused(noise):
  table = b''
  header = file_front.header((0, len(noise), 0, 0), zlib.crc32(noise, zlib.crc32(table)), '1')
  with pytest.raises(ValueError):
    OpqFile(header + noise)


@given(st.text(max_size=300))
@settings(deadline=None)
def test_noise_for_a_header_is_refused(noise):
  text = noise.encode()
  with pytest.raises(ValueError):
    OpqFile(len(text).to_bytes(8, 'little') + text)


@pytest.mark.skipif('OPQ_TEST_ASSETS' not in os.environ, reason='OPQ_TEST_ASSETS is not set')
def test_a_real_network_comes_back():
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


VERSION_1 = (
  'QAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJvcHEiLCJ2ZXJzaW9uIjoiMSIsImNyYzMyIjoiOTcwMz'
  'cyNTkifSwiZ3JpZHMiOnsiZHR5cGUiOiJGMzIiLCJzaGFwZSI6WzEsM10sImRhdGFfb2Zmc2V0cyI6WzAsMTJdfSwi'
  'aW5kZXgiOnsiZHR5cGUiOiJVOCIsInNoYXBlIjpbMTE5XSwiZGF0YV9vZmZzZXRzIjpbMTIsMTMxXX0sImNvZGVzIj'
  'p7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzldLCJkYXRhX29mZnNldHMiOlsxMzEsMTQwXX0sInVuY29tcHJlc3NlZCI6'
  'eyJkdHlwZSI6IlU4Iiwic2hhcGUiOlsyMF0sImRhdGFfb2Zmc2V0cyI6WzE0MCwxNjBdfX0gICAgIAAAAD8AAEA/AA'
  'AAPwA9iMvpyaeUTbNhPB8JqILEhGj96P8wLl9/PnmSnfYjYXAL35wXv3Xr8zccIMVHjKZPmmpEDNE5UJaHMPJpHK7s'
  'PoJ8WkPb3NqfGjjgLd4LL4Hvy+wOJB7bWL0egHwHIZHSgd3UMMWEJZNMoomcxQm01v/yDCwALVpAQE6O3bQEAABozb'
  'zJdpQI/QkrPkx//+unQAA='
)
