"""Leaves whose payload has the axes in another order: kernels of outputs by inputs."""

import numpy as np
import pytest

import opq_jax
from opq_jax.coding import axis_orders
from opq_jax.compression import CompressionState
from opq_jax.file import OpqFile, serialize
from opq_jax.report import verify
from tests.golden import make
from tests.helpers.opq_files import assert_contract, index_text, rebuilt, replaced, same_bits

AXES = {'linear': (1, 0), 'conv': (2, 3, 1, 0), 'heads': (1, 0, 2), 'layers': (1, 0)}


@pytest.fixture(scope='module')
def network():
  return make.axes()


def test_save_moves_axes(network):
  params, state = network
  data = serialize(params, state)
  loaded, loaded_state = opq_jax.load(data)
  assert_contract(params, state, loaded, loaded_state)
  assert serialize(loaded, loaded_state) == data
  with OpqFile(data) as file:
    assert {name: file.axes(name) for name in AXES} == AXES
    # the transpose of a leaf whose payload is transposed has its own order
    assert file.tied_to('turned') == 'linear' and file.axes('turned') == ()
    for name in (*AXES, 'turned'):
      assert same_bits(file.codes(name), opq_jax.encode(params, state)[name])
      assert same_bits(file[name], loaded[name])


@pytest.mark.parametrize('name', ['linear', 'conv', 'heads'])
def test_payload_is_that_of_moved_leaf(network, name):
  params, state = network
  axes, record = AXES[name], state.tree[name]
  moved = record.replace(kinds=np.ascontiguousarray(record.kinds.transpose(axes)))
  data = serialize({name: params[name]}, CompressionState({name: record}))
  other = serialize(
    {name: np.ascontiguousarray(params[name].transpose(axes))}, CompressionState({name: moved})
  )
  with OpqFile(data) as file, OpqFile(other) as expected:
    size = sum(file.payload_sizes(name))
    assert size == sum(expected.payload_sizes(name)) and file.axes(name)
  assert data[-size:] == other[-size:]


def test_verify_leaves_of_other_axes(network):
  params, state = network
  compressed = opq_jax.apply_compression(params, state)
  verified = verify(serialize(params, state), params, coded=compressed)
  assert [problem for problem in verified.problems if 'payload' in problem] == []
  assert {row.path for row in verified.compressed} >= {'linear', 'conv', 'heads', 'turned'}


def test_orders_by_chance_are_not_taken():
  """Hardly any codes but 0 follow the trellis in some order by chance."""
  codes = np.zeros((40, 30), np.int8)
  codes[0, 1] = 1
  assert axis_orders.of_trellis(codes) == (0, 1)
  follows = make.along_trellis((30, 40), 0)
  on_grid = np.where(follows == -128, np.int8(0), follows)
  assert axis_orders.of_trellis(on_grid.T) == (1, 0)
  on_grid[17, 3] += 1
  assert axis_orders.of_trellis(on_grid.T) == (0, 1)


HOSTILE = {
  'no list': ('axes=1,0', 'axes='),
  'one axis': ('axes=1,0', 'axes=0'),
  'too many': ('axes=1,0', 'axes=2,1,0'),
  'the own order': ('axes=1,0', 'axes=0,1'),
  'an axis twice': ('axes=1,0', 'axes=1,1'),
  'no axis': ('axes=1,0', 'axes=1,2'),
  'a negative one': ('axes=1,0', 'axes=1,-1'),
  'other digits': ('axes=1,0', 'axes=१,0'),
  'leading zeros': ('axes=1,0', 'axes=01,0'),
  'a huge number': ('axes=1,0', f'axes={"9" * 400},0'),
  'twice': ('axes=1,0', 'axes=1,0 axes=1,0'),
  'of an uncompressed leaf': ('"mean":"float32[16]"', '"mean":"float32[16] axes=0"'),
  'beside a tie': ('transposed=', 'axes=1,0 transposed='),
}


@pytest.mark.parametrize('edit', HOSTILE.values(), ids=HOSTILE)
def test_load_refuses_false_axes(network, edit):
  data = serialize(*network)
  assert edit[0] in index_text(data)
  with pytest.raises(ValueError, match='found'):
    opq_jax.load(rebuilt(data, replaced(*edit)))


def test_open_refuses_axes_in_version_1(network):
  data = serialize(*network)
  header, version = data[:400], b'"version":"2"'
  assert header.count(version) == 1
  with pytest.raises(ValueError, match='expected none in version 1'):
    OpqFile(data.replace(version, b'"version":"1"', 1))
