"""Files of leaves whose outputs have scales."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.compression import CompressionState
from opq_jax.encoders import Trellis
from opq_jax.report.verification import verify
from tests.helpers import plain_reader
from tests.helpers.opq_files import (
  assert_contract,
  index_text,
  leaf_state,
  rebuilt,
  replaced,
  same_bits,
  version_of,
)
from tests.helpers.output_scales import scaled_state, scales_along, unlike

DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]


def one_leaf(shape=(48, 40), axis=1, dtype=np.float32, slices=0, **options):
  scales = scales_along(shape, axis, slices)
  weights = unlike(shape, scales, dtype=dtype)
  return {'w': weights}, CompressionState({'w': scaled_state(weights, scales, slices, **options)})


@pytest.mark.parametrize('dtype', DTYPES[:3], ids=str)
@pytest.mark.parametrize(
  ('shape', 'axis', 'slices'),
  [((48, 40), 0, 0), ((48, 40), 1, 0), ((3, 3, 12, 20), 3, 0), ((2, 30, 20), 1, 1)],
)
def test_round_trip(dtype, shape, axis, slices, tmp_path):
  params, state = one_leaf(shape, axis, dtype, slices)
  opq_jax.save(tmp_path / 'a.opq', params, state)
  loaded, loaded_state = opq_jax.load(tmp_path / 'a.opq')
  assert_contract(params, state, loaded, loaded_state)
  scales = state.tree['w'].output_scales
  assert same_bits(loaded_state.tree['w'].output_scales, scales)
  with opq_jax.OpqFile(tmp_path / 'a.opq') as file:
    assert same_bits(file.output_scales('w'), scales)
    assert file.sizes()['w'] == sum(file.payload_sizes('w')) + 12 * len(file.grids('w'))
  data = (tmp_path / 'a.opq').read_bytes()
  assert version_of(data) == '2' and f'scales={axis - slices},' in index_text(data)
  assert opq_jax.file.serialize(loaded, loaded_state) == data
  assert same_bits(plain_reader.read(tmp_path / 'a.opq')[0]['w'], loaded['w'])
  assert verify(data, params).holds


def test_without_scales_the_same_bytes():
  params, state = one_leaf()
  plain = CompressionState({'w': dataclasses.replace(state.tree['w'], output_scales=None)})
  assert b'scales' not in index_text(opq_jax.file.serialize(params, plain)).encode()


def test_verify_finds_codes_of_another_scale():
  params, state = one_leaf()
  scales = np.array(state.tree['w'].output_scales)
  scales[0, 3] *= 2
  other = dataclasses.replace(state.tree['w'], output_scales=jnp.asarray(scales))
  values = opq_jax.apply_compression(params, CompressionState({'w': other}))
  data = opq_jax.file.serialize(values, CompressionState({'w': other}))
  with opq_jax.OpqFile(data) as file:
    assert file['w'].shape == (48, 40)
  # a weight of another cell than its code says
  wrong = {'w': params['w'] * np.where(np.arange(40) == 3, 1.5, 1).astype(np.float32)}
  assert not verify(data, wrong).holds


def test_trellis_codes_of_outputs_by_inputs(tmp_path):
  scales = scales_along((64, 80), 0)
  params = {'w': unlike((64, 80), scales, outliers=0)}
  costs = {'w': 1 / scales**2}
  moments = {'w': opq_jax.network.InputMoments(np.eye(80, dtype=np.float32)[None], (1,))}
  network = opq_jax.compress(
    params, bits_per_weight=2.5, objective=costs, encoder=Trellis(moments), channel_axis=0
  )
  assert network.state.tree['w'].output_scales.shape == (64, 1)
  opq_jax.save(tmp_path / 'a.opq', network.params, network.state)
  with opq_jax.OpqFile(tmp_path / 'a.opq') as file:
    assert file.axes('w') == (1, 0)
  assert_contract(network.params, network.state, *opq_jax.load(tmp_path / 'a.opq'))
  assert same_bits(plain_reader.read(tmp_path / 'a.opq')[0]['w'], network.params['w'])


def test_transposed_leaf_is_tied():
  params, state = one_leaf()
  leaf = state.tree['w']
  turned = dataclasses.replace(leaf, kinds=leaf.kinds.T, output_scales=leaf.output_scales.T)
  both = {**params, 'z': params['w'].T.copy()}
  data = opq_jax.file.serialize(both, CompressionState({'w': leaf, 'z': turned}))
  assert 'transposed=0' in index_text(data)
  with opq_jax.OpqFile(data) as file:
    assert same_bits(file['z'], file['w'].T)
    assert same_bits(file.output_scales('z'), file.output_scales('w').T)
    assert same_bits(file.leaf_state('z').output_scales, turned.output_scales)
  assert_contract(both, CompressionState({'w': leaf, 'z': turned}), *opq_jax.load(data))


def test_leaf_of_other_scales_is_not_tied():
  weights = unlike((32, 32), np.float32(1), outliers=0)
  rows, columns = (leaf_state(weights, levels=20) for _ in range(2))
  scales = scales_along((32, 32), 0, spread=2)
  rows = dataclasses.replace(rows, output_scales=jnp.asarray(scales))
  columns = dataclasses.replace(columns, output_scales=jnp.asarray(scales.T))
  state = CompressionState({'a': rows, 'b': columns})
  data = opq_jax.file.serialize({'a': weights, 'b': weights}, state)
  assert 'same=' not in index_text(data)
  assert_contract({'a': weights, 'b': weights}, state, *opq_jax.load(data))


@pytest.mark.parametrize(
  'scales', ['scales=2,', 'scales=1,0', 'scales=1,9999', 'scales=1', 'scales=1,7,7', 'scales=-1,7']
)
def test_reader_refuses_scales_that_cannot_be(scales):
  data = opq_jax.file.serialize(*one_leaf())
  text = index_text(data)
  found = next(part for part in text.replace('"', ' ').split() if part.startswith('scales='))
  size = found.rpartition(',')[2]
  new = scales + size if scales.endswith(',') else scales
  with pytest.raises(ValueError, match='expected'):
    opq_jax.OpqFile(rebuilt(data, replaced(found, new)))


def test_reader_refuses_scales_of_the_other_axis():
  data = opq_jax.file.serialize(*one_leaf())
  found = next(p for p in index_text(data).replace('"', ' ').split() if p.startswith('scales='))
  turned = opq_jax.OpqFile(rebuilt(data, replaced(found, found.replace('=1,', '=0,'))))
  with turned as file, pytest.raises(ValueError, match='w: found'):
    file['w']


def test_reader_refuses_grid_whose_products_round():
  params, state = one_leaf()
  leaf, weights = state.tree['w'], params['w']
  with pytest.raises(ValueError, match='expected numbers of 20 significant bits'):
    threshold = jnp.nextafter(leaf.threshold, jnp.float32(0))
    broken = dataclasses.replace(leaf, threshold=threshold)
    opq_jax.file.serialize({'w': weights}, CompressionState({'w': broken}))


@pytest.mark.parametrize(
  ('scales', 'match'),
  [
    (np.full((1, 40), 1.3), 'found an output scale of'),
    (np.ones((1, 3)), 'output scales of shape'),
  ],
)
def test_writer_refuses_scales(scales, match):
  params, state = one_leaf()
  broken = dataclasses.replace(state.tree['w'], output_scales=jnp.asarray(scales, jnp.float32))
  with pytest.raises((ValueError, TypeError), match=match):
    opq_jax.file.serialize(params, CompressionState({'w': broken}))
