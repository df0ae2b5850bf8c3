import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import artifact, sizes
from opq_jax.compression import CompressionState, LeafState, affine_codebook, encode


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


def test_nominal_packed_and_entropy_are_what_numpy_counts():
  params, state = network()
  leaf = row(opq_jax.sizes.size_report(params, state), 'conv/kernel')
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


def test_file_is_the_length_of_the_file(tmp_path):
  params, state = network()
  metadata = {'source': 'a test'}
  report = sizes.size_report(params, state, metadata=metadata)
  opq_jax.save(tmp_path / 'net.opq', params, state, metadata)
  assert (tmp_path / 'net.opq').stat().st_size == report.file
  parts = sum(leaf.file for leaf in (*report.compressed, *report.uncompressed))
  assert parts + report.headers == report.file
  assert report.headers > 300


def test_totals_are_sums_and_rates_name_their_baseline():
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


def test_a_file_tells_the_same_sizes_without_the_weights(tmp_path):
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


def test_channels_are_those_of_the_axis():
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


def test_a_leaf_that_is_pruned_entirely_costs_its_mask():
  weights = np.full((8, 8), 0.25, np.float32)
  state = CompressionState({'w': leaf_state(weights, levels=0)})
  report = sizes.size_report({'w': weights}, state)
  assert (report.nominal, report.packed, report.entropy, report.survivors) == (0, 8, 0, 0)
  assert report.nominal_rate == np.inf
  assert report.sparsity == 1


def test_more_range_than_levels_counts_127_of_them():
  weights = np.array([[1000.0, 1.0]], np.float32)
  state = CompressionState({'w': leaf_state(weights, levels=127)})
  report = sizes.size_report({'w': weights}, state)
  assert report.nominal == pytest.approx((1 + np.log2(127) + 1 + np.log2(2)) / 8)


def test_a_report_prints_its_four_sizes():
  params, state = network()
  report = sizes.size_report(params, state)
  text = str(report)
  assert 'conv/kernel' in text
  assert f'{report.file:,}' in text
  assert all(name in text for name in ('nominal', 'packed', 'entropy', 'file'))


def test_bytes_that_exist_are_not_made_again():
  params, state = network()
  data = artifact.serialize(params, state)
  assert sizes.payload_report(data, params, state) == sizes.size_report(params, state)
