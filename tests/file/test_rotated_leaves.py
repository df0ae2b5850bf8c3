"""Files of leaves whose codes are those of rotated weights."""

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.report.sizes import file_report
from opq_jax.report.verification import verify
from tests.helpers import plain_reader
from tests.helpers.opq_files import index_text, rebuilt, replaced, same_bits, version_of
from tests.helpers.rotated_files import dense_rotation, file_of, rotated_parts

DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)]


def laplace(shape, dtype=np.float32, seed=0):
  return np.random.default_rng(seed).laplace(size=shape).astype(dtype)


def one_leaf(shape=(48, 40), axis=0, dtype=np.float32, slices=0, bits=3.0):
  weights = laplace(shape, dtype)
  return weights, file_of({'w': (rotated_parts(weights, axis, slices, bits), slices)})


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
  ('shape', 'axis', 'slices'),
  [((48, 40), 0, 0), ((48, 40), 1, 0), ((3, 3, 12, 20), 2, 0), ((2, 30, 20), 0, 1)],
)
def test_round_trip(dtype, shape, axis, slices, tmp_path):
  weights, data = one_leaf(shape, axis, dtype, slices)
  (tmp_path / 'a.opq').write_bytes(data)
  with opq_jax.OpqFile(data) as file:
    found, turned = file['w'], file.coded_values('w')
    assert file.rotated_axis('w') == slices + axis and file.leaf_state('w') is None
    assert file.sizes()['w'] == sum(file.payload_sizes('w')) + 12 * len(file.grids('w'))
  assert (found.dtype, turned.dtype) == (weights.dtype, np.float32)
  matrix = dense_rotation(shape[slices + axis])
  expected = np.moveaxis(np.tensordot(matrix, turned, (1, slices + axis)), 0, slices + axis)
  precision = float(ml_dtypes.finfo(dtype).eps)
  np.testing.assert_allclose(found.astype(np.float64), expected, atol=1e-5, rtol=precision)
  # three bits: about a fiftieth of the energy
  error = np.square(found.astype(np.float64) - weights.astype(np.float64)).sum()
  assert error < 0.03 * np.square(weights.astype(np.float64)).sum()
  assert version_of(data) == '2' and f'rotated={axis}' in index_text(data)
  assert same_bits(plain_reader.read(tmp_path / 'a.opq')[0]['w'], found)


def test_load_says_what_has_no_state():
  _, data = one_leaf()
  with pytest.warns(UserWarning, match='^w: found codes of rotated weights'):
    params, state = opq_jax.load(data)
  assert state.tree['w'] is None
  again = opq_jax.file.serialize(params, state)
  with opq_jax.OpqFile(again) as file, opq_jax.OpqFile(data) as first:
    assert same_bits(file['w'], first['w']) and file.grids('w') == ()


@pytest.mark.parametrize('dtype', DTYPES[:2], ids=str)
def test_verify_finds_other_weights(dtype):
  weights, data = one_leaf(dtype=dtype)
  verified = verify(data, {'w': weights})
  assert verified.holds, verified.problems
  with opq_jax.OpqFile(data) as file:
    decoded = file['w'].astype(np.float64)
  original = weights.astype(np.float64)
  error = np.square(decoded - original).sum() / np.square(original).sum()
  assert verified.compressed[0].error == pytest.approx(error, rel=0.02)
  other = np.array(weights)
  other[3] *= -1
  assert not verify(data, {'w': other}).holds


def test_verify_takes_values_of_an_encoder():
  weights, data = one_leaf(bits=2.0)
  with opq_jax.OpqFile(data) as file:
    coded = {'w': file['w']}
  other = {'w': weights + np.float32(1e-2)}
  assert not verify(data, other).holds
  assert verify(data, other, coded=coded).holds
  assert not verify(data, other, coded={'w': coded['w'] + np.float32(0.5)}).holds


def test_sizes_are_those_of_the_dtype():
  weights, data = one_leaf(dtype=ml_dtypes.bfloat16)
  report = file_report(data)
  (leaf,) = report.compressed
  assert (leaf.dtype, leaf.original) == ('bfloat16', 2 * weights.size)
  assert leaf.is_rotated and '1 of 1 compressed leaves have rotated inputs' in str(report)
  assert report.file == len(data) and 2.8 < 8 * leaf.entropy / weights.size < 3.1


def test_escaped_weights_are_those_of_the_rotation():
  (part,) = rotated_parts(laplace((64, 8)), 0)
  codes, escaped = part.codes.copy(), np.array([7.5, -3], np.float32)
  codes[[2, 9], [1, 5]] = -128
  data = file_of({'w': (([part._replace(codes=codes, escaped=escaped)]), 0)})
  with opq_jax.OpqFile(data) as file:
    assert file.coded_values('w')[[2, 9], [1, 5]].tolist() == [7.5, -3]
    found = dense_rotation(64).T @ file['w'].astype(np.float64)
  np.testing.assert_allclose(found[[2, 9], [1, 5]], [7.5, -3], atol=1e-5)


def test_transposed_leaf_is_tied():
  _, data = one_leaf((32, 20))
  both = rebuilt(data, replaced('rotated=0"', 'rotated=0","z":"float32[20,32] transposed=0"'))
  with opq_jax.OpqFile(both) as file:
    assert same_bits(file['z'], np.ascontiguousarray(file['w'].T))
    assert (file.rotated_axis('w'), file.rotated_axis('z')) == (0, 1)


@pytest.mark.parametrize('axis', ['2', '-1', '00', '0,1', '', '0.0', '1' * 20])
def test_reader_refuses_axis_that_cannot_be(axis):
  _, data = one_leaf()
  with pytest.raises(ValueError, match='expected'):
    opq_jax.OpqFile(rebuilt(data, replaced('rotated=0', f'rotated={axis}')))


def test_reader_refuses_sums_that_overflow():
  (part,) = rotated_parts(laplace((64, 8)), 0)
  codes = part.codes.copy()
  codes[0, 0] = -128
  for value, fits in ((1e34, True), (1e35, False)):
    coded = CodedSlice(codes, np.array([value], np.float32), part.grids, part.rotation)
    with opq_jax.OpqFile(file_of({'w': ([coded], 0)})) as file:
      if fits:
        assert np.isfinite(file['w']).all()
      else:
        with pytest.raises(ValueError, match=r'^w: found rotated weights of 1e'):
          file['w']


def test_narrow_dtype_takes_its_largest_number():
  """Sums beyond the largest float16 become this number, as values of a grid do."""
  (part,) = rotated_parts(laplace((64, 8), np.float16), 0)
  codes = part.codes.copy()
  codes[:, 0] = -128
  escaped = np.full(64, 60000, np.float32)
  coded = part._replace(codes=codes, escaped=escaped)
  with opq_jax.OpqFile(file_of({'w': ([coded], 0)})) as file:
    assert np.abs(file['w'][:, 0]).max() == np.finfo(np.float16).max
