"""The JavaScript decoder reads what the Python reader reads, and refuses what it refuses."""

import json
import pathlib
import random
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from experiments.benchmarks.robustness import second_decoder
from experiments.benchmarks.robustness.mutated_bytes import resealed
from opq_jax.compression import CompressionState
from opq_jax.file import leaf_entries
from tests.helpers import hostile_parts, snippets
from tests.helpers.opq_files import escaping, laplace, rebuilt, small, state_of
from tests.helpers.output_scales import scaled_state, scales_along, unlike

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
DECODER = second_decoder.DECODER
PAGE = snippets.ROOT / 'docs' / 'guides' / 'javascript.md'

needs_node = pytest.mark.skipif(
  shutil.which('node') is None, reason='found no node, expected Node.js to run JavaScript'
)


def javascript(code, *arguments, cwd=DECODER.parent):
  """Runs a module, and returns what it prints."""
  command = ['node', '--input-type=module', '-e', code, *map(str, arguments)]
  run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
  assert run.returncode == 0, run.stderr
  return run.stdout


@needs_node
def test_decoder_reads_golden_files():
  files = [path.read_bytes() for path in sorted(GOLDEN.rglob('*.opq'))]
  assert len(files) >= 10
  assert [outcome for outcome, _ in second_decoder.outcomes(files)] == ['same'] * len(files)


@needs_node
def test_decoder_agrees_with_reader():
  """Random files, and damaged and resealed ones, three hundred together."""
  drawn, damaged, resealed = second_decoder.counted([*second_decoder.KINDS], 100)
  assert drawn['same'] == 100
  for found in (damaged, resealed):
    assert found['differ'] == found['hangs'] == 0 and found['refused'] > 50


@needs_node
def test_decoder_agrees_on_scales_of_outputs():
  """Files of scaled leaves, and as many under checksums that are right but damaged before."""
  files = []
  for number, (shape, axis, slices) in enumerate(
    [((24, 20), 0, 0), ((24, 20), 1, 0), ((3, 3, 6, 10), 2, 0), ((2, 15, 10), 1, 1)]
  ):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
      scales = scales_along(shape, axis, slices, seed=number)
      weights = unlike(shape, scales, number, dtype)
      state = CompressionState({'w': scaled_state(weights, scales, slices)})
      files.append(opq_jax.file.serialize({'w': weights}, state))
  damaged = [resealed(data, random.Random(i)) for i, data in enumerate(5 * files)]
  assert [outcome for outcome, _ in second_decoder.outcomes(files)] == ['same'] * len(files)
  found = [outcome for outcome, _ in second_decoder.outcomes(damaged)]
  assert set(found) <= {'same', 'refused'} and found.count('refused') > len(found) / 2


@needs_node
def test_decoder_finds_every_flip():
  params, state = escaping(shape=(5, 5))
  data = opq_jax.file.serialize(params, state, side_files={'config.json': b'{}'})
  flipped = []
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= 1 << i % 8
    flipped.append(bytes(damaged))
  lines = second_decoder.decoded([data, *flipped])
  assert 'digest' in lines[0]
  assert {line.get('type') for line in lines[1:]} == {'Error'}


@needs_node
def test_decoder_refuses_crafted_files():
  """Wrong indexes and grids under checksums that are right."""
  data = opq_jax.file.serialize(*small())
  crafted = {name: rebuilt(data, edit) for name, edit in hostile_parts.INDEXES.items()}
  for grid in hostile_parts.GRIDS:
    crafted[f'grid {grid}'] = hostile_parts.with_grids(data, [(0.5, 0.75, 0.5), grid])
  lines = second_decoder.decoded([data, *crafted.values()])
  assert 'digest' in lines[0]
  for name, line in zip(crafted, lines[1:], strict=True):
    assert line.get('type') == 'Error' and line['seconds'] < 5, (name, line)


def test_decoder_knows_dtypes():
  """Those of the format, all of them with every ml_dtypes from 0.6 on."""
  table = DECODER.read_text().split('const DTYPES = {')[1].split('};')[0]
  known = set(re.findall(r'^  (\w+):', table, re.MULTILINE))
  assert known >= leaf_entries.DTYPES.keys()
  assert not any(hasattr(ml_dtypes, name) for name in known - leaf_entries.DTYPES.keys())


@needs_node
def test_as_float32_reads_every_number(tmp_path):
  """All numbers of 8 and 16 bits have the values that NumPy and ml_dtypes know."""
  floats = [dtype for dtype in leaf_entries.DTYPES.values() if dtype.itemsize <= 2]
  floats = [dtype for dtype in floats if leaf_entries.can_be_compressed(dtype)]
  assert {dtype.name for dtype in floats} >= {'float16', 'bfloat16', 'float8_e4m3fn'}
  params = {
    dtype.name: np.arange(1 << 8 * dtype.itemsize).astype(f'u{dtype.itemsize}').view(dtype)
    for dtype in floats
  }
  params |= {'count': np.array([-5, 1 << 24]), 'flag': np.array([True, False])}
  opq_jax.save(tmp_path / 'net.opq', params, state_of(params, lambda leaf: False))
  javascript(
    """
    import {readFileSync, writeFileSync} from 'node:fs';
    import {asFloat32, openOpq} from './opq.mjs';
    const [path, folder] = process.argv.slice(1);
    const file = openOpq(readFileSync(path));
    for (const name of file.names) {
      writeFileSync(`${folder}/${name}`, new Uint8Array(asFloat32(file.leaf(name)).buffer));
    }
    """,
    tmp_path / 'net.opq',
    tmp_path,
  )
  for name, leaf in params.items():
    found = np.fromfile(tmp_path / name, np.float32)
    expected = leaf.astype(np.float32)
    np.testing.assert_array_equal(found, expected, name)
    is_number = ~np.isnan(expected)
    assert (np.signbit(found) == np.signbit(expected))[is_number].all(), name


@needs_node
def test_decoder_bounds_claims():
  """A run of zeros that claims more than is admitted is refused, and read where it is admitted."""
  params = {'w': np.zeros((64, 64), np.float32), 'x': laplace(3, 4)}
  data = opq_jax.file.serialize(params, state_of(params))
  code = """
    import {openOpq} from './opq.mjs';
    const data = Buffer.from(process.argv[1], 'hex');
    console.log(openOpq(data, {mostBytes: 16432}).leaf('w').values.length);
    try {
      openOpq(data, {mostBytes: 16431});
    } catch (error) {
      console.log(error.message);
    }
    """
  first, second = javascript(code, data.hex()).splitlines()
  assert first == '4096'
  assert second.startswith('found leaves of 16432 bytes, expected at most 16431')


@needs_node
def test_guide_runs(tmp_path):
  """The snippets of the guide, one after the other, beside a file of that name."""
  kernel = laplace(6, 5).astype(ml_dtypes.bfloat16)
  params = {'layer': {'bias': np.zeros(5, np.float32), 'kernel': kernel}}
  opq_jax.save(tmp_path / 'network.opq', params, state_of(params))
  shutil.copy(DECODER, tmp_path)
  code = re.findall(r'^```js\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
  assert len(code) == 3
  output = javascript('\n'.join(code), cwd=tmp_path).splitlines()
  assert output[0] == 'layer/bias [ 5 ] float32 5'
  assert output[1] == 'layer/kernel [ 6, 5 ] bfloat16 30'
  assert output[2].startswith('found no .opq file')


def test_guide_names_members():
  """The table of the guide and the types have the names of the module."""
  code = DECODER.read_text()
  types = DECODER.with_suffix('.d.mts').read_text()
  exported = re.findall(r'^export function (\w+)', code, re.MULTILINE)
  assert exported == re.findall(r'^export function (\w+)', types, re.MULTILINE)
  members = re.findall(r'^  (?:readonly )?(\w+)(?=[:(])', types, re.MULTILINE)
  page = PAGE.read_text()
  for name in [*exported, 'names', 'metadata', 'sideFiles', 'entry', 'leaf', 'verify']:
    assert f'{name}' in page
    assert name in exported or name in members
    assert re.search(rf'^  (this\.)?{name}\b|^export function {name}\(|this\.{name} =', code, re.M)


def test_package_has_release():
  """The npm package has the version of the Python package, in npm's notation, and its files."""
  content = json.loads((DECODER.parent / 'package.json').read_text())
  assert content['version'].replace('-dev.', '.dev') == opq_jax.__version__
  for name in [*content['files'], content['exports']['.']['default']]:
    assert (DECODER.parent / name).exists()
