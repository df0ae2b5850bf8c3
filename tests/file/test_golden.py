"""Files load for ever, and the same network makes the same file everywhere."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.file import container
from tests.helpers import fresh_run

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
VERSIONS = sorted(path.stem for path in GOLDEN.glob('*.opq'))


def test_golden_file_of_every_version():
  names = ('version_1', 'version_1_contexts', 'version_2_escapes', 'version_2_slices')
  names += ('version_2_ties', 'version_2_axes', 'version_2_scales', 'version_2_rotated')
  names += ('version_3_side_files',)
  assert set(names) <= set(VERSIONS)
  assert {name.split('_')[1] for name in VERSIONS} == set(container.VERSIONS)


def test_load_golden_file_of_rotated_leaves():
  expected = safetensors.numpy.load_file(GOLDEN / 'version_2_rotated.safetensors')
  with opq_jax.OpqFile(GOLDEN / 'version_2_rotated.opq') as file:
    found = dict(file.items())
    found |= {f'{name}:codes': file.codes(name) for name in file}
  assert set(found) == set(expected) and len(found) == 8
  for name, leaf in found.items():
    assert_same_bits(leaf, expected[name], name)


@pytest.mark.parametrize('version', [name for name in VERSIONS if 'rotated' not in name])
def test_load_golden_files(version):
  expected = safetensors.numpy.load_file(GOLDEN / f'{version}.safetensors')
  with opq_jax.OpqFile(GOLDEN / f'{version}.opq') as file:
    assert file.metadata == {'weights': 'golden', 'é': '[{"'}
    expected_codes = [name for name in expected if name.endswith(':codes')]
    compressed = []
    for name, leaf in file.items():
      as_stored = leaf.view(np.uint8) if leaf.dtype.name.startswith('float8') else leaf
      assert_same_bits(as_stored, expected.pop(name), name)
      if (record := file.leaf_state(name)) is not None:
        compressed.append(name)
        assert_same_bits(file.codes(name), expected.pop(f'{name}:codes'), name)
        kinds = 'mask' if version.startswith('version_1') else 'kinds'
        scales = ('output_scales',) if record.output_scales is not None else ()
        for field in (kinds, 'codebook', 'threshold', 'step', 'levels', *scales):
          assert_same_bits(
            np.asarray(getattr(record, field)), expected.pop(f'{name}:{field}'), name
          )
    params, state = file.load()
    side_files = file.read_side_files()
  for name, data in side_files.items():
    assert data == expected.pop(f'side file {name}').tobytes()
  assert expected == {}
  assert sorted(f'{name}:codes' for name in compressed) == sorted(expected_codes)
  leaves = ['params/conv/kernel', 'params/dense/kernel', 'params/half/0', 'params/zeros']
  assert [name for name in compressed if name.startswith('params/')] == leaves
  half, numbers = params['params']['half'], params['params']['numbers']
  assert type(half) is list and half[1] is None and type(half[2]) is tuple
  assert set(numbers) == {7, -1} and set(numbers[-1]) == {':'}
  assert (
    opq_jax.file.serialize(
      params, state, file.metadata, contexts=version != 'version_1', side_files=side_files
    )
    == (GOLDEN / f'{version}.opq').read_bytes()
  )
  kernel = params['params']['conv']['kernel']
  again = opq_jax.apply_compression(
    {'x': jnp.asarray(kernel)},
    opq_jax.CompressionState({'x': state.tree['params']['conv']['kernel']}),
  )
  assert_same_bits(np.asarray(again['x']), kernel, 'conv')


@pytest.mark.slow
def test_serialize_equal_everywhere(tmp_path):
  # a process of one device, of another order of hashes, against this one of four, twice
  assert jax.device_count() == 4
  environment = {**os.environ, 'PYTHONHASHSEED': '12345'}
  command = [sys.executable, fresh_run.__file__, tmp_path / 'one.opq', '1']
  subprocess.run(command, check=True, env=environment)
  for name in ('four.opq', 'again.opq'):
    fresh_run.save(tmp_path / name)
  files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert len(files) == 3 and len(set(files.values())) == 1


def assert_same_bits(found, expected, name):
  assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
  assert found.tobytes() == expected.tobytes(), name
