import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.compression import CompressionState, LeafState, encode
from opq_jax.compression.records import affine_codebook
from opq_jax.file import writer
from opq_jax.report import leaf_sizes, sizes


def leaf_state(weights, threshold=0.5, step=0.25, levels=6):
  """A state as `init_state` makes it; with powers of two every value is exact in any dtype."""
  return LeafState(
    kinds=(jnp.abs(jnp.asarray(weights, jnp.float32)) > threshold).astype(jnp.uint8),
    codebook=affine_codebook(
      jnp.float32(threshold + step / 2), jnp.float32(step), jnp.int32(levels)
    ),
    threshold=jnp.float32(threshold),
    step=jnp.float32(step),
    levels=jnp.int32(levels),
    dtype=weights.dtype,
  )


def network():
  draw = np.random.default_rng(0).laplace
  params = {
    'conv': {'kernel': draw(size=(3, 3, 8, 16)).astype(np.float32), 'bias': np.zeros(16, 'f4')},
    'head': {'kernel': draw(size=(16, 10)).astype(ml_dtypes.bfloat16), 'bias': np.ones(10, 'f4')},
    'step': np.int32(7),
  }
  tree = jax.tree.map(lambda leaf: leaf_state(leaf) if np.ndim(leaf) > 1 else None, params)
  return params, CompressionState(tree)


def row(report, path):
  return next(leaf for leaf in report.compressed if leaf.path == path)


def test_size_report_equals_numpys_counts():
  params, state = network()
  leaf = row(opq_jax.report.sizes.size_report(params, state), 'conv/kernel')
  weights = np.abs(params['conv']['kernel'])
  codes = np.asarray(encode(params, state)['conv']['kernel'])
  is_kept = weights > 0.5
  nominal = 0.0
  for j in range(16):
    survivors = weights[..., j][is_kept[..., j]]
    nominal += len(survivors) * (1 + np.log2(max(1, (survivors.max() - 0.5) / 0.25)))
  counts = np.unique(codes, return_counts=True)[1]
  shares = counts / codes.size
  assert leaf.weights == codes.size == 1152
  assert leaf.survivors == is_kept.sum() == np.count_nonzero(codes)
  assert leaf.nominal == pytest.approx(nominal / 8, rel=1e-6)
  # 6 levels: 1 bit of sign and 3 of magnitude
  assert leaf.packed == np.ceil(is_kept.sum() * 4 / 8) + 1152 / 8 + 6 * 4
  assert leaf.entropy == pytest.approx(-np.sum(counts * np.log2(shares)) / 8)
  assert leaf.original == 4 * 1152
  assert leaf.entropy_bits == pytest.approx(8 * leaf.entropy / 1152)
  assert leaf.entropy <= leaf.file <= leaf.entropy + 60


def test_size_report_file_is_its_length(tmp_path):
  params, state = network()
  metadata = {'source': 'a test'}
  report = sizes.size_report(params, state, metadata=metadata)
  opq_jax.save(tmp_path / 'net.opq', params, state, metadata)
  assert (tmp_path / 'net.opq').stat().st_size == report.file
  parts = sum(leaf.file for leaf in (*report.compressed, *report.uncompressed))
  assert parts + report.headers == report.file
  assert report.headers > 300


def test_size_report_totals_and_rates():
  params, state = network()
  report = sizes.size_report(params, state)
  assert [leaf.path for leaf in report.compressed] == ['conv/kernel', 'head/kernel']
  assert [leaf.path for leaf in report.uncompressed] == ['conv/bias', 'head/bias', 'step']
  assert report.weights == 1152 + 160
  # the head is bfloat16: its own bytes count for the file, float32 for the other rates
  assert report.original == 4 * 1152 + 2 * 160 + 4 * (16 + 10 + 1)
  for name in ('nominal', 'packed', 'entropy'):
    total = sum(getattr(leaf, name) for leaf in report.compressed)
    assert getattr(report, name) == pytest.approx(total)
    assert getattr(report, f'{name}_rate') == pytest.approx(4 * 1312 / total)
  assert report.file_rate == pytest.approx(report.original / report.file)


def test_file_report_equals_size_report(tmp_path):
  params, state = network()
  report = sizes.size_report(params, state)
  opq_jax.save(tmp_path / 'net.opq', params, state)
  found = sizes.file_report(tmp_path / 'net.opq')
  for leaf, again in zip(report.compressed, found.compressed, strict=True):
    assert again.nominal <= leaf.nominal
    assert dataclasses.replace(again, nominal=leaf.nominal) == leaf
  assert found.uncompressed == report.uncompressed
  assert found.file == report.file
  assert sizes.file_report((tmp_path / 'net.opq').read_bytes()) == found


def test_size_report_channel_axis():
  weights = np.zeros((2, 64), np.float32)
  weights[0], weights[1] = 0.6, 2.0
  state = CompressionState({'w': leaf_state(weights)})
  last = sizes.size_report({'w': weights}, state)
  first = sizes.size_report({'w': weights}, state, channel_axis=lambda path, leaf: 0)
  assert last.nominal == pytest.approx(128 * (1 + np.log2(6)) / 8)
  # the channel of .6 reaches less than a step: 1 bit
  assert first.nominal == pytest.approx(64 * (1 + 1 + np.log2(6)) / 8)
  with pytest.raises(ValueError, match='w: found channel_axis 2, expected an axis'):
    sizes.size_report({'w': weights}, state, channel_axis=2)


def test_size_report_of_a_pruned_leaf():
  weights = np.full((8, 8), 0.25, np.float32)
  state = CompressionState({'w': leaf_state(weights, levels=0)})
  report = sizes.size_report({'w': weights}, state)
  assert (report.nominal, report.packed, report.entropy, report.survivors) == (0, 8, 0, 0)
  assert report.nominal_rate == np.inf
  assert report.sparsity == 1


def test_nominal_is_at_most_127_levels():
  weights = np.array([[1000.0, 1.0]], np.float32)
  state = CompressionState({'w': leaf_state(weights, levels=127)})
  report = sizes.size_report({'w': weights}, state)
  assert report.nominal == pytest.approx((1 + np.log2(127) + 1 + np.log2(2)) / 8)


def with_escapes(params, state, path, places):
  """The state with these weights stored as they are."""
  name, kernel = path.split('/')
  kinds = np.array(state.tree[name][kernel].kinds)
  kinds[places] = 2
  record = dataclasses.replace(state.tree[name][kernel], kinds=jnp.asarray(kinds))
  return CompressionState({**state.tree, name: {**state.tree[name], kernel: record}})


def test_size_report_counts_escaped_weights():
  params, state = network()
  params['conv']['kernel'][0, 0, 0, :3] = 100, -300, 0.75
  escaped = with_escapes(params, state, 'conv/kernel', np.s_[0, 0, 0, :3])
  leaf = row(sizes.size_report(params, escaped), 'conv/kernel')
  weights = np.abs(params['conv']['kernel'])
  codes = np.asarray(encode(params, escaped)['conv']['kernel'])
  is_on_grid = (weights > 0.5) & (codes != -128)
  nominal = 0.0
  for j in range(16):
    reach = weights[..., j][is_on_grid[..., j]]
    nominal += len(reach) * (1 + np.log2(max(1, (reach.max() - 0.5) / 0.25)))
  counts = np.unique(codes, return_counts=True)[1]
  assert leaf.escaped == 3 and leaf.survivors == np.count_nonzero(codes) == is_on_grid.sum() + 3
  assert leaf.nominal == pytest.approx(nominal / 8 + 3 * 4, rel=1e-6)
  # 6 levels of two signs and the escape: 13 symbols
  assert leaf.packed == np.ceil(leaf.survivors * 4 / 8) + 1152 / 8 + 6 * 4 + 3 * 4
  entropy = -np.sum(counts * np.log2(counts / codes.size)) / 8
  assert leaf.entropy == pytest.approx(entropy + 3 * 4)
  assert leaf.entropy <= leaf.file <= leaf.entropy + 90

  data = writer.serialize(params, escaped)
  again = row(sizes.file_report(data), 'conv/kernel')
  assert dataclasses.replace(again, nominal=leaf.nominal) == leaf
  assert again.nominal <= leaf.nominal
  text = str(sizes.file_report(data))
  assert 'escaped' in text and 'escaped' not in str(sizes.size_report(params, state))
  assert all(len(line) <= 100 for line in text.splitlines())


def test_size_report_escaped_bfloat16():
  weights = np.full((8, 8), 0.25, ml_dtypes.bfloat16)
  record = dataclasses.replace(leaf_state(weights, levels=0), kinds=jnp.full((8, 8), 2, jnp.uint8))
  report = sizes.size_report({'w': weights}, CompressionState({'w': record}))
  assert (report.nominal, report.entropy, report.escaped) == (128, 128, 64)
  # nothing but an escape is to be told from a pruned weight
  assert report.packed == 128 + 8


@pytest.mark.parametrize('levels', [1, 2, 4, 8, 64, 127])
def test_packed_width_with_escapes(levels):
  weights = np.full((8, 8), 0.6, np.float32)
  record = leaf_state(weights, levels=levels)
  plain = sizes.size_report({'w': weights}, CompressionState({'w': record}))
  kinds = np.array(record.kinds)
  kinds[0, 0] = 2
  record = dataclasses.replace(record, kinds=jnp.asarray(kinds))
  escaped = sizes.size_report({'w': weights}, CompressionState({'w': record}))
  width = np.ceil(np.log2(2 * levels + 1))
  assert plain.packed == 8 * (1 + np.ceil(np.log2(levels))) + 8 + 4 * levels
  assert escaped.packed == 8 * width + 8 + 4 * levels + 4


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_largest_on_grid_in_pieces(monkeypatch, axis):
  rng = np.random.default_rng(0)
  weights = rng.laplace(size=(7, 5, 6)).astype(ml_dtypes.bfloat16)
  codes = rng.integers(-1, 2, weights.shape).astype(np.int8)
  codes[rng.random(codes.shape) < 0.1] = -128
  others = tuple(i for i in range(3) if i != axis)
  magnitude = np.abs(weights.astype(np.float32))
  expected = np.max(magnitude, others, where=abs(codes) == 1, initial=0)
  for piece in (1, 4, 11, 40, 1000):
    monkeypatch.setattr(leaf_sizes, '_PIECE', piece)
    np.testing.assert_array_equal(leaf_sizes.largest_on_grid(weights, codes, axis), expected)
  found = leaf_sizes.largest_on_grid(weights[:, 0, 0], codes[:, 0, 0], 0)
  assert found == magnitude[:, 0, 0][abs(codes[:, 0, 0]) == 1].max()


def test_size_report_counts_dead_channels():
  params, state = network()
  params['conv']['kernel'][..., [2, 5, 7]] = 0
  params['conv']['kernel'][1] = 0
  params['head']['kernel'][:] = 0
  state = CompressionState(
    jax.tree.map(lambda leaf: leaf_state(leaf) if np.ndim(leaf) > 1 else None, params)
  )
  report = sizes.file_report(writer.serialize(params, state))
  conv, head = report.compressed
  assert (conv.dead_channels, conv.dead_rows) == (3, 1)
  assert (head.dead_channels, head.dead_rows) == (10, 16)
  assert (report.dead_channels, report.dead_rows, report.dead_leaves) == (13, 17, ('head/kernel',))
  text = str(report)
  assert ' dead ' in text and ' 3/1 ' in text and ' 13/17 ' in text
  assert 'all codes are 0: head/kernel' in text
  assert all(len(line) <= 100 for line in text.splitlines())
  first = sizes.file_report(writer.serialize(params, state), channel_axis=0)
  assert [leaf.dead_channels for leaf in first.compressed] == [1, 16]
  assert 'dead' not in str(sizes.size_report(*network()))


def test_size_report_of_a_vector():
  for weights, dead in ((np.zeros(9, np.float32), 1), (np.ones(9, np.float32), 0)):
    report = sizes.size_report({'w': weights}, CompressionState({'w': leaf_state(weights)}))
    assert (report.dead_channels, report.dead_rows) == (dead, 0)


def test_size_report_prints_four_sizes():
  params, state = network()
  report = sizes.size_report(params, state)
  text = str(report)
  assert 'conv/kernel' in text
  assert f'{report.file:,}' in text
  assert all(name in text for name in ('nominal', 'packed', 'entropy', 'file'))


def test_payload_report_equals_size_report():
  params, state = network()
  data = writer.serialize(params, state)
  assert sizes.payload_report(data, params) == sizes.size_report(params, state)
