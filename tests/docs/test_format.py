"""docs/format.md suffices to read a file: an independent reader finds the same arrays."""

import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.file import leaf_entries
from tests.helpers import plain_reader, snippets

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
PAGE = snippets.ROOT / 'docs' / 'format.md'


def assert_same(path):
  arrays, metadata = plain_reader.read(path)
  with opq_jax.OpqFile(path) as file:
    assert metadata == file.metadata and list(arrays) == list(file)
    for name, array in file.items():
      assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
      assert arrays[name].tobytes() == array.tobytes(), name


def network():
  """Kernels of several arrangements, outliers, narrow dtypes, and leaves that pass through."""
  rng = np.random.default_rng(0)
  scale = rng.gamma(2, size=8).astype(np.float32)
  kernel = (scale * rng.laplace(size=(3, 3, 4, 8))).astype(np.float32)
  outlier = rng.laplace(size=(24, 16)).astype(np.float32)
  outlier[3, 4], outlier[20, 2] = 4000, -3000
  return {
    'conv': {'kernel': kernel, 'bias': np.arange(8, dtype=np.float32)},
    'torch': {'weight': rng.laplace(size=(12, 3, 3, 3)).astype(np.float32)},
    'heads': {'kernel': rng.laplace(size=(6, 4, 5)).astype(np.float32)},
    'dense': [{'kernel': outlier}, ({'kernel': jnp.asarray(outlier, jnp.bfloat16)}, None)],
    'half': rng.laplace(size=(20, 10)).astype(np.float16),
    ':odd': {3: np.array(7, np.int32)},
  }


@pytest.mark.parametrize('rate', [8.0, 16.0])
@pytest.mark.parametrize('contexts', [True, False])
def test_reader_plain_codes(tmp_path, rate, contexts):
  params = network()
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=rate))
  opq_jax.save(tmp_path / 'a.opq', params, state, {'made': 'here'}, contexts=contexts)
  assert_same(tmp_path / 'a.opq')


def test_reader_trellis_codes(tmp_path):
  params = {'kernel': jax.random.laplace(jax.random.key(0), (3, 3, 8, 16))}
  network = opq_jax.compress(params, compression_rate=12.0, encoder=opq_jax.encoders.Trellis())
  opq_jax.save(tmp_path / 'a.opq', network.params, network.state)
  assert_same(tmp_path / 'a.opq')


def test_reader_side_files(tmp_path):
  params, files = network(), {'config.json': b'{"a": 1}', 'b/c.txt': b'text', 'empty': b''}
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  opq_jax.save(tmp_path / 'a.opq', params, state, side_files=files)
  assert_same(tmp_path / 'a.opq')
  assert plain_reader.read_side_files(tmp_path / 'a.opq') == files


@pytest.mark.parametrize('path', sorted(GOLDEN.rglob('*.opq')), ids=lambda path: path.stem)
def test_reader_golden_files(path):
  assert_same(path)


def test_page_lists_dtypes():
  """With their bytes, and whether a leaf of it can be compressed; older ml_dtypes have fewer."""
  listed = {}
  table = PAGE.read_text().split('### Dtypes')[1].split('The names')[0]
  for row in re.findall(r'^\| (`.*)\|$', table, re.MULTILINE):
    names, sizes, compressed, _ = row.split('|')
    names, sizes = re.findall(r'`(\w+)`', names), [int(size) for size in sizes.split(',')]
    sizes = sizes if len(sizes) == len(names) else sizes * len(names)
    listed |= {n: (s, 'yes' in compressed) for n, s in zip(names, sizes, strict=True)}
  known = {
    name: (dtype.itemsize, leaf_entries.can_be_compressed(dtype))
    for name, dtype in leaf_entries.DTYPES.items()
  }
  assert known.items() <= listed.items()
  assert not any(hasattr(ml_dtypes, name) for name in listed.keys() - known.keys())
