import base64
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from opq_jax.coding.payload import entropy
from opq_jax.compression import CompressionState, encode
from opq_jax.file import index as file_index
from opq_jax.file import leaf_entries
from opq_jax.file.reader import OpqFile, load
from opq_jax.file.writer import save, serialize
from tests.helpers.opq_files import (
  assert_same,
  escaping,
  index_size,
  laplace,
  leaf_state,
  rebuilt,
  replaced,
  small,
  state_of,
  version_of,
)

DTYPES = list(leaf_entries.DTYPES.values())


def test_serialize_version_1():
  params, state = escaping()
  plain = state_of(params)
  assert version_of(serialize(params, plain)) == '1'
  assert version_of(serialize(params, state)) == '2'


@pytest.mark.parametrize('dtype', ['float4_e2m1fn', 'float6_e2m3fn', 'float8_e8m0fnu'])
def test_save_refuses_odd_floats(dtype):
  weights = np.ones((4, 4), leaf_entries.DTYPES[dtype])
  with pytest.raises(ValueError, match=rf'^w: found dtype {dtype}, expected floats of whole bytes'):
    serialize({'w': weights}, CompressionState({'w': leaf_state(weights)}))
  data = rebuilt(serialize(*small()), replaced('"float32[12,5] 4', f'"{dtype}[12,5] 4'))
  with pytest.raises(ValueError, match='expected floats of whole bytes'):
    load(data)


def test_save_is_safetensors(tmp_path):
  params, state = small()
  save(tmp_path / 'x.opq', params, state)
  with safetensors.safe_open(tmp_path / 'x.opq', 'np') as file:
    assert set(file.keys()) == {'grids', 'index', 'codes', 'uncompressed'}
    assert file.metadata()['format'] == 'opq' and file.metadata()['version'] == '1'
    grids = file.get_tensor('grids')
  assert grids.dtype == np.float32
  assert grids.tolist() == [[0.5, 0.75, 0.5]] * 2
  safetensors.deserialize(serialize({}, state_of({})))


def test_serialize_golden_bytes():
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


def test_serialize_small_container():
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


@pytest.mark.parametrize(
  'leaf', ['text', object(), np.array(['a']), np.array([object()]), np.longdouble(1), 1 << 70]
)
def test_save_names_other_leaves(leaf):
  params = {'good': laplace(3), 'bad': [leaf]}
  with pytest.raises(ValueError, match=r'^bad/0: found '):
    serialize(params, CompressionState({'good': None, 'bad': [None]}))


def test_save_names_dtypes_of_no_format():
  """What newer releases of ml_dtypes add is refused when it is written, not when it is read."""
  scalars = [t for t in vars(ml_dtypes).values() if isinstance(t, type)]
  known = {np.dtype(t) for t in scalars if issubclass(t, np.generic)}
  # longdouble is float64 on some machines
  for dtype in (known | {np.dtype(np.longdouble)}) - set(DTYPES):
    with pytest.raises(ValueError, match=rf'^w: found ndarray of dtype {dtype}, .*float8_e4m3fn'):
      serialize({'w': np.ones((4, 4), dtype)}, CompressionState({'w': None}))


def test_save_names_random_keys():
  with pytest.raises(ValueError, match=r'^rng: found .*, expected an array'):
    serialize({'rng': jax.random.key(0)}, CompressionState({'rng': None}))


@pytest.mark.parametrize('key', [1.5, True, (1, 2), b'x', None])
def test_save_names_other_keys(key):
  params = {'a': {key: laplace(3)}}
  with pytest.raises(ValueError, match=r'^a/.*: found a key of type .*, expected str or int'):
    serialize(params, state_of(params))


def test_save_refuses_equal_names():
  params = {'a/b': laplace(3), 'a': {'b': laplace(3)}}
  with pytest.raises(ValueError, match='a/b: found two leaves'):
    serialize(params, state_of(params))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_save_names_not_finite(value):
  params, state = small()
  params['b'][1][0, 0] = value
  with pytest.raises(ValueError, match=r'^b/1: found 1 weights that are NaN or infinite'):
    serialize(params, state)


def test_save_names_other_trees():
  params, state = small()
  with pytest.raises(ValueError, match='d: not found in the tree, expected by the state'):
    serialize(params, CompressionState({**state.tree, 'd': None}))
  with pytest.raises(ValueError, match=r'^a: found shape \(12, 4\), expected \(12, 5\)'):
    serialize({**params, 'a': laplace(12, 4)}, state)
  with pytest.raises(ValueError, match=r'^a: found dtype float16, expected float32'):
    serialize({**params, 'a': laplace(12, 5, dtype=np.float16)}, state)


def test_save_names_codebooks():
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


@pytest.mark.parametrize('metadata', [{'a': 1}, {1: 'a'}, {'a': None}])
def test_save_refuses_metadata(metadata):
  with pytest.raises(ValueError, match='metadata: found'):
    serialize({}, state_of({}), metadata)


def test_save_refuses_long_index(tmp_path):
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
def test_save_crash_keeps_old_file(tmp_path, monkeypatch, call):
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
