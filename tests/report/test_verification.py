import dataclasses
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.compression import CompressionState, encode
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.file import writer, written_leaves
from opq_jax.file.leaf_entries import SliceEntry
from opq_jax.report import cell_checks, sizes
from opq_jax.report.verification import verify
from tests.helpers.opq_files import escaping, leaf_state, small, state_of


def changed(params, path, index, value):
  """The tree with one weight of another value."""
  flat, structure = jax.tree.flatten(params)
  leaves = dict(zip(opq_jax.core.trees.named_leaves(params), flat, strict=True))
  leaves[path] = np.array(leaves[path])
  leaves[path][index] = value
  return jax.tree.unflatten(structure, leaves.values())


def test_verify_holds_for_own_weights(tmp_path):
  params, state = small()
  opq_jax.save(tmp_path / 'net.opq', params, state)
  found = verify(tmp_path / 'net.opq', params)
  assert found.holds and found.problems == () and (found.exact, found.corrected) == (2, 0)
  assert found.report == sizes.size_report(params, state)
  values = opq_jax.apply_compression(params, state)
  for row, (path, leaf, value) in zip(
    found.compressed,
    [('a', params['a'], values['a']), ('b/1', params['b'][1], values['b'][1])],
    strict=True,
  ):
    codes = np.asarray(encode({'x': leaf}, CompressionState({'x': leaf_state(leaf)}))['x'])
    assert (row.path, row.weights, row.levels, row.problems) == (path, leaf.size, 4, ())
    assert row.sparsity == pytest.approx(np.mean(codes == 0))
    error = float(np.sum((leaf - np.asarray(value)) ** 2) / np.sum(leaf**2))
    assert row.error == pytest.approx(error, rel=1e-5)
    # levels end at 0.5 + 4 * 0.5
    assert row.clipped == np.count_nonzero(np.abs(leaf) >= 2.5)
    assert 0.4 < row.worst <= 0.5
  assert 'a ' in str(found) and 'yes' in str(found)


@pytest.mark.parametrize(
  ('path', 'index', 'value', 'problem'),
  [
    ('a', (0, 0), 0.75, 'a: found 1 pruned weights above the threshold 0.5'),
    ('a', (0, 1), 0.1, 'a: found 1 survivors that the threshold 0.5 prunes'),
    ('a', (0, 1), +0.6, 'a: found 1 survivors of the other sign'),
    ('a', (0, 1), -1.1, 'a: found 1 survivors outside of their cells'),
    ('a', (0, 1), np.nan, 'a: found 1 survivors that'),
    ('a', (0, 0), np.nan, 'a: found 1 pruned weights above'),
    ('b/0', 3, 1.0, 'b/0: found 1 values that are not the original ones'),
    ('c', (), 4, 'c: found 1 values'),
  ],
)
def test_verify_finds_one_changed_weight(path, index, value, problem):
  params, _ = small()
  params['a'][0, 0], params['a'][0, 1] = 0.25, -0.6
  data = writer.serialize(params, state_of(params))
  assert verify(data, params).holds
  found = verify(data, changed(params, path, index, value))
  assert not found.holds and len(found.problems) >= 1
  assert found.problems[0].startswith(problem)


def test_verify_finds_another_tree():
  params, state = small()
  data = writer.serialize(params, state)
  other = {**params, 'd': np.zeros(2), 'a': params['a'].T, 'c': np.int16(3)}
  del other['b']
  found = verify(data, other)
  assert found.report is None
  assert found.problems == (
    'a: found float32[12, 5], expected float32[5, 12]',
    'b/0: found in the file, not in the weights',
    'b/1: found in the file, not in the weights',
    'c: found int8[], expected int16[]',
    'd: found in the weights, not in the file',
  )


def test_verify_accepts_float64_as_float32():
  params = {'w': np.random.default_rng(0).laplace(size=(6, 5)), 'b': np.ones(3)}
  narrow = {**params, 'w': params['w'].astype(np.float32)}
  data = writer.serialize(narrow, state_of(narrow))
  assert verify(data, params).holds
  assert verify(data, {**params, 'b': np.ones(3, np.float32)}).problems == (
    'b: found float64[3], expected float32[3]',
  )


@pytest.mark.filterwarnings('ignore:.*Laplace density')
def test_verify_narrow_dtypes_and_zeros():
  params = {
    'brain': np.random.default_rng(0).laplace(size=(30, 20)).astype(ml_dtypes.bfloat16),
    'half': np.random.default_rng(1).laplace(size=(30, 20)).astype(np.float16),
    'zeros': np.zeros((4, 4), np.float32),
    'signs': np.sign(np.random.default_rng(2).normal(size=(8, 8))).astype(np.float32),
  }
  allocation = opq_jax.allocate(params, compression_rate=12.0, corrected=False)
  state = opq_jax.init_state(params, allocation)
  found = verify(writer.serialize(params, state), params)
  assert found.holds, found.problems
  assert [row.error for row in found.compressed if row.path == 'zeros'] == [0.0]


def test_verify_corrected_leaves():
  params, state = small()
  corrected = changed(params, 'b/0', 2, 7.0)
  stored = changed(params, 'b/0', 2, np.float32(7.0) * (1 + 1e-5))
  data = writer.serialize(stored, state)
  assert not verify(data, params).holds
  found = verify(data, params, corrected=corrected)
  assert found.holds and (found.exact, found.corrected) == (1, 1)
  assert not verify(data, params, corrected=changed(params, 'b/0', 2, 7.1)).holds


def test_verify_codes_of_feedback():
  rng = np.random.default_rng(0)
  inputs = (rng.normal(size=(256, 48)) @ rng.normal(size=(48, 48))).astype(np.float32)
  params = {'w': rng.laplace(size=(48, 32)).astype(np.float32), 'bias': np.ones(3, np.float32)}
  moments = {'w': (inputs.T @ inputs / 256)[None], 'bias': None}
  encoder = opq_jax.encoders.Feedback(moments)
  coded, state, _ = opq_jax.compress(params, compression_rate=12.0, encoder=encoder)
  data = writer.serialize(coded, state)
  assert not verify(data, params).holds
  found = verify(data, params, coded=coded)
  assert found.holds, found.problems
  # errors are against the weights all the same
  error = np.sum((params['w'] - np.asarray(coded['w'])) ** 2) / np.sum(params['w'] ** 2)
  assert found.compressed[0].error == pytest.approx(error, rel=1e-4)
  flipped = {**coded, 'w': -np.asarray(coded['w'])}
  assert any('of the other sign' in text for text in verify(data, params, coded=flipped).problems)


def test_verify_finds_a_longer_payload(monkeypatch):
  params, state = small()
  data = writer.serialize(params, state)
  short = written_leaves.WrittenSlice(b'short', SliceEntry(4, 5), '1')
  monkeypatch.setattr(cell_checks, 'written_slice', lambda *_, contexts, axes: short)
  problems = verify(data, params).problems
  assert len(problems) == 2 and problems[0].startswith('a: found a payload of ')


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_verify_counts_escaped_weights(dtype):
  params, state = escaping(dtype)
  found = verify(writer.serialize(params, state), params)
  assert found.holds, found.problems
  (row,) = found.compressed
  assert row.escaped == 5 and row.worst <= 0.5 and 'escaped' in str(found)
  # weights beyond the last cell that do not escape are clipped
  assert row.clipped == np.count_nonzero(np.abs(params['w'].astype(np.float32)) >= 2.5) - 4


def test_verify_compares_escaped_weights():
  params, state = escaping()
  data = writer.serialize(params, state)
  other = changed(params, 'w', (0, 0), np.nextafter(np.float32(40), np.float32(41)))
  assert verify(data, other).problems == (
    'w: found 1 escaped weights that are not the original ones, expected none',
  )
  assert not verify(data, params, coded=other).holds
  assert verify(data, other, coded=params).holds


def test_verify_counts_clipped_weights():
  params, _ = escaping()
  (row,) = verify(writer.serialize(params, state_of(params)), params).compressed
  assert row.escaped == 0
  assert row.clipped == np.count_nonzero(np.abs(params['w']) >= 2.5)


def test_verify_takes_any_byte_order():
  params, state = escaping()
  data = writer.serialize(params, state)
  swapped = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder('>')), params)
  found = verify(data, swapped, coded=swapped, corrected=swapped)
  assert found.holds and found.exact == 1 and found.report is not None


def test_verification_is_frozen():
  params, state = small()
  found = verify(writer.serialize(params, state), params)
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.problems = ()


def test_verify_holds_one_leaf_of_many():
  """Stored leaves are read when they are compared, and dropped before the next one is read."""
  rng = np.random.default_rng(0)
  params = {f'{i}/kernel': rng.laplace(size=(32, 8 + i)).astype(np.float32) for i in range(6)}
  network = opq_jax.compress(params, compression_rate=8.0)
  read: list[weakref.ref[np.ndarray]] = []

  def fetch(name):
    assert not any(array() is not None for array in read)
    array = params[name].copy()
    read.append(weakref.ref(array))
    return array

  stored = {
    name: StoredLeaf('net', name, leaf.shape, leaf.dtype, fetch) for name, leaf in params.items()
  }
  data, done = writer.serialize(network.params, network.state), []
  found = verify(data, stored, told=lambda *both: done.append(both))
  assert found == verify(data, params) and found.holds and len(read) == len(params)
  sizes_of_leaves = [leaf.nbytes for leaf in params.values()]
  total = sum(sizes_of_leaves)
  assert done == [(int(n), total) for n in np.cumsum(sizes_of_leaves)]
