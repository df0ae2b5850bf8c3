"""Descriptions of files have the numbers of the report, and the counts of the codes."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.report import file_description, file_report

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.mark.parametrize('name', ['version_1', 'version_2_escapes', 'version_2_slices'])
def test_description_has_report_and_counts(name):
  """Sizes of `file_report`, and counts of the codes that the test vectors list."""
  path = GOLDEN / f'{name}.opq'
  found = file_description(path)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  report, vectors = file_report(path), safetensors.numpy.load_file(path.with_suffix('.safetensors'))
  assert (found['name'], found['bytes']) == (path.name, path.stat().st_size)
  assert (found['original'], found['asFloat32']) == (report.original, report.as_float32)
  assert found['bytes'] - found['headers'] - found['sideBytes'] == sum(
    leaf['bytes'] for leaf in found['leaves']
  )
  rows = {row.path: row for row in report.compressed}
  assert {leaf['path'] for leaf in found['leaves'] if leaf['codes']} == set(rows)
  with opq_jax.OpqFile(path) as file:
    assert [leaf['path'] for leaf in found['leaves']] == list(file)
    assert dict(found['metadata']) == file.metadata
  for leaf in found['leaves']:
    if (codes := leaf['codes']) is None:
      continue
    row, expected = rows[leaf['path']], vectors[f'{leaf["path"]}:codes']
    assert (codes['survivors'], codes['packed']) == (row.survivors, row.packed)
    assert codes['entropy'] == pytest.approx(row.entropy, abs=0.06)
    assert (codes['deadChannels'], codes['deadRows']) == (row.dead_channels, row.dead_rows)
    assert codes['escaped'] == (expected == -128).sum() == row.escaped
    on_grid = expected[expected != -128].astype(int)
    most = np.abs(on_grid).max(initial=0)
    assert codes['counts'] == [int((on_grid == code).sum()) for code in range(-most, most + 1)]
    steps = vectors[f'{leaf["path"]}:step']
    assert codes['grids']['step'] == pytest.approx([steps.min(), steps.max()], rel=1e-6)


def test_description_refuses_damage():
  data = bytearray((GOLDEN / 'version_1.opq').read_bytes())
  data[-100] ^= 1
  with pytest.raises(ValueError, match='found'):
    file_description(bytes(data))
