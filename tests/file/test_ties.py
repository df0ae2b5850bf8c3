"""Leaves that are earlier ones again: written once, read as what they are, and hostile claims."""

import collections
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import opq_jax
from opq_jax import cli
from opq_jax.compression import CompressionState
from opq_jax.file import container, serialize
from opq_jax.report import file_report, verify
from opq_jax.weights import compress_stored, open_weights
from tests.helpers import plain_reader
from tests.helpers.opq_files import (
  laplace,
  leaf_state,
  parts,
  rebuilt,
  replaced,
  same_bits,
  state_of,
  version_of,
  with_escapes,
)


def tied_network(dtype=np.float32):
  """A kernel, the same again, its transpose, a stack of three axes twice, and another kernel."""
  kernel, stack = laplace(24, 10, dtype=dtype), laplace(2, 6, 5, seed=1, dtype=dtype)
  other = laplace(24, 10, seed=2, dtype=dtype)
  params = {'a': kernel, 'b': kernel.copy(), 'c': np.ascontiguousarray(kernel.T), 'd': other}
  return params | {'e': stack, 'f': stack.copy(), 'g': np.ones(3, dtype)}


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize('contexts', [True, False])
@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'float16', 'bfloat16'])
def test_save_ties_once(dtype, contexts):
  params = tied_network(dtype)
  state = state_of(params)
  data = serialize(params, state, contexts=contexts)
  single = {name: params[name] for name in 'adeg'}
  size = len(serialize(single, state_of(single), contexts=contexts))
  assert len(data) <= size + 80 and version_of(data) == '2'
  with opq_jax.OpqFile(data) as file:
    assert [file.tied_to(name) for name in 'abcdefg'] == [None, 'a', 'a', None, None, 'e', None]
    sizes = file.sizes()
    assert [name for name in file if sizes[name] == 0] == ['b', 'c', 'f']
    compressed = opq_jax.apply_compression(params, state)
    for name in params:
      assert same_bits(file[name], compressed[name])
    assert same_bits(file.codes('c'), file.codes('a').T)
  loaded, states = opq_jax.load(data)
  assert all(same_bits(leaf, compressed[name]) for name, leaf in loaded.items())
  assert same_bits(states.tree['c'].kinds, np.asarray(states.tree['a'].kinds).T)
  assert serialize(loaded, states, contexts=contexts) == data
  # arrays of their own: a change of one is none of the other
  loaded['b'][:] = 0
  assert loaded['a'].any()


@pytest.mark.parametrize('is_transposed', [False, True])
def test_save_ties_with_escapes(is_transposed):
  weights = laplace(9, 7)
  weights[[0, 3, 8], [6, 0, 2]] = 500, -700, 900
  places = np.abs(weights) > 100
  again = weights.T.copy() if is_transposed else weights.copy()
  params = {'one': weights, 'other': again}
  records = {
    name: with_escapes(leaf_state(leaf), np.abs(leaf) > 100) for name, leaf in params.items()
  }
  state = CompressionState(records)
  data = serialize(params, state)
  loaded, states = opq_jax.load(data)
  assert places.sum() == 3
  for name, leaf in opq_jax.apply_compression(params, state).items():
    assert same_bits(loaded[name], leaf)
    assert same_bits(states.tree[name].kinds, records[name].kinds)
  with opq_jax.OpqFile(data) as file:
    assert file.tied_to('other') == 'one'


def test_save_tells_masks_apart():
  """Equal weights of other masks or grids are no tied leaves."""
  kernel = laplace(8, 6)
  params = {'a': kernel, 'b': kernel.copy(), 'c': kernel.copy()}
  state = state_of(params)
  pruned = np.asarray(state.tree['a'].kinds).copy()
  pruned[pruned.nonzero()[0][0], pruned.nonzero()[1][0]] = 0
  state.tree['b'] = dataclasses.replace(state.tree['b'], kinds=pruned)
  state.tree['c'] = leaf_state(kernel, step=0.25)
  data = serialize(params, state)
  assert version_of(data) == '1'
  for name, leaf in opq_jax.apply_compression(params, state).items():
    assert same_bits(opq_jax.load(data)[0][name], leaf)


def test_load_ties_in_other_order():
  """A tree whose own order has the later leaf first."""
  params = tied_network()
  data = serialize(params, state_of(params))
  backwards = collections.namedtuple('Net', 'g f e d c b a')(**params)
  loaded, _ = opq_jax.load(data, like=backwards)
  compressed = opq_jax.apply_compression(params, state_of(params))
  assert all(same_bits(getattr(loaded, name), compressed[name]) for name in params)


def test_verify_and_report_ties():
  kernel = laplace(64, 32)
  params = {'a': kernel, 'b': kernel.T.copy(), 'c': laplace(32, 32, seed=1)}
  network = opq_jax.compress(params, compression_rate=8.0)
  data = serialize(network.params, network.state)
  verified = verify(data, params)
  assert verified.holds and len(verified.compressed) == 3
  report = file_report(data)
  assert [row.file > 0 for row in report.compressed] == [True, False, True]
  assert report.original == sum(leaf.nbytes for leaf in params.values())
  wrong = params | {'b': laplace(32, 64, seed=5)}
  assert any(problem.startswith('b: ') for problem in verify(data, wrong).problems)


def excluded_network():
  table = laplace(1024, 300)
  return {
    'embed': table,
    'fc': laplace(48, 48, seed=1),
    'head': table.copy(),
    'other': np.where(table == table[5, 5], 0, table),
    'small': laplace(48, seed=2),
    'small again': laplace(48, seed=2),
    'turned': table.T.copy(),
  }


def test_save_large_uncompressed_leaves_once(tmp_path):
  params = excluded_network()
  chosen = lambda path, _: path == 'fc'
  state = opq_jax.init_state(params, opq_jax.allocate(params, compressible=chosen))
  data = serialize(params, state)
  assert version_of(data) == '2'
  with opq_jax.OpqFile(data) as file:
    tied = {name: file.tied_to(name) for name in file}
    assert {name: first for name, first in tied.items() if first} == {'head': 'embed'}
    assert [name for name, size in file.sizes().items() if size == 0] == ['head']
    assert same_bits(file['head'], params['embed']) and file.leaf_state('head') is None
  loaded, _ = opq_jax.load(data)
  assert all(same_bits(loaded[name], leaf) for name, leaf in params.items() if name != 'fc')
  loaded['head'][:] = 0  # an array of its own
  assert loaded['embed'].any()
  (tmp_path / 'net.opq').write_bytes(data)
  arrays, _ = plain_reader.read(tmp_path / 'net.opq')
  assert same_bits(arrays['head'], params['head'])
  assert verify(data, params).holds
  assert file_report(data).original == sum(leaf.nbytes for leaf in params.values())
  # and leaf by leaf
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  stored = open_weights(tmp_path / 'net.safetensors')
  compress_stored(stored, tmp_path / 'stored.opq', compressible=chosen, compression_rate=10.0)
  assert (tmp_path / 'stored.opq').read_bytes() == data
  old = data.replace(b'"version":"2"', b'"version":"1"', 1)
  with pytest.raises(ValueError, match='head: found a leaf that is an earlier one again'):
    opq_jax.OpqFile(old)


@pytest.mark.parametrize('targets', [{'compression_rate': 12.0}, {'sparsity': 0.5, 'bits': 3.0}])
def test_compress_stored_ties_equal_save(tmp_path, targets):
  table = laplace(120, 48)
  params = {
    'embed.weight': table,
    'fc.weight': laplace(48, 48, seed=1),
    'head.weight': table.copy(),
    'turned': table.T.copy(),
  }
  axis = lambda path, _: 0 if path == 'head.weight' else -1
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  done = compress_stored(
    open_weights(tmp_path / 'net.safetensors'), tmp_path / 'net.opq', channel_axis=axis, **targets
  )
  state = opq_jax.init_state(params, opq_jax.allocate(params, channel_axis=axis, **targets))
  opq_jax.save(tmp_path / 'expected.opq', params, state)
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert done.report == opq_jax.size_report(params, state, channel_axis=axis)
  loaded, _ = opq_jax.load(tmp_path / 'net.opq')
  assert same_bits(loaded['embed.weight'], loaded['head.weight'])
  assert same_bits(loaded['embed.weight'].T, loaded['turned'])


@pytest.mark.parametrize('flags', [[], ['--trellis'], ['--fast'], ['--channel-axis', 'last']])
def test_command_keeps_shared_storages(tmp_path, monkeypatch, flags):
  """Tied parameters of PyTorch share a storage, and a state dict names both."""
  monkeypatch.chdir(tmp_path)
  embed = torch.nn.Embedding(200, 32)
  head = torch.nn.Linear(32, 200, bias=False)
  head.weight = embed.weight
  torch.save({'embed_tokens.weight': embed.weight, 'lm_head.weight': head.weight}, 'net.pt')
  assert cli.main(['compress', 'net.pt', 'net.opq', *flags]) == 0
  loaded, _ = opq_jax.load('net.opq')
  assert same_bits(loaded['embed_tokens.weight'], loaded['lm_head.weight'])
  with opq_jax.OpqFile('net.opq') as file:
    assert file.tied_to('lm_head.weight') == 'embed_tokens.weight'
  assert cli.main(['verify', 'net.opq', '--against', 'net.pt']) == 0


B, C, F, G = (
  '"float32[24,10] same=0"',
  '"float32[10,24] transposed=0"',
  '"float32[2,6,5] same=4"',
  '"float32[3]"',
)
HOSTILE = {
  'itself': replaced(B, '"float32[24,10] same=1"'),
  'a later leaf': replaced(B, '"float32[24,10] same=3"'),
  'a tied leaf': replaced(C, '"float32[10,24] transposed=1"'),
  'a circle': replaced(B, '"float32[24,10] same=2"'),
  'no leaf': replaced(B, '"float32[24,10] same=7"'),
  'a number beyond all': replaced(B, '"float32[24,10] same=999999999999999999"'),
  'a huge number': replaced(B, f'"float32[24,10] same={"9" * 400}"'),
  'a negative number': replaced(B, '"float32[24,10] same=-1"'),
  'a name': replaced(B, '"float32[24,10] same=a"'),
  'other digits': replaced(B, '"float32[24,10] same=२"'),
  'the uncompressed leaf itself': replaced(G, '"float32[3] same=6"'),
  'transposed of it': replaced(F, '"float32[3] transposed=6"'),
  'another shape': replaced(B, '"float32[10,24] same=0"'),
  'as many weights': replaced(B, '"float32[12,20] same=0"'),
  'not transposed': replaced(C, '"float32[24,10] transposed=0"'),
  'another dtype': replaced(B, '"float16[24,10] same=0"'),
  'an integer': replaced(B, '"int32[24,10] same=0"'),
  'three axes': replaced(F, '"float32[5,6,2] transposed=4"'),
  'both fields': replaced(B, '"float32[24,10] same=0 transposed=0"'),
  'twice': replaced(B, '"float32[24,10] same=0 same=0"'),
  'with escapes': replaced(B, '"float32[24,10] escapes=1,9 same=0"'),
  'with a payload': replaced(B, '"float32[24,10] 4 100 same=0"'),
  'an unknown field': replaced(B, '"float32[24,10] equal=0"'),
  'more rows': replaced(G, '"float32[2,6,5] same=4"'),
  'a larger claim': replaced(G, '"float32[99999999,99999999] same=0"'),
}


@pytest.mark.parametrize('edit', HOSTILE.values(), ids=HOSTILE)
def test_open_refuses_false_ties(edit):
  params = tied_network()
  data = rebuilt(serialize(params, state_of(params)), edit)
  with pytest.raises(ValueError, match='found'):
    opq_jax.load(data)


def test_open_refuses_ties_in_version_1():
  params = {'a': laplace(8, 6), 'b': laplace(8, 6)}
  data = serialize(params, state_of(params))
  assert version_of(data) == '2'
  header, offsets = parts(data)
  sizes = [offsets[name][1] - offsets[name][0] for name in container.TENSORS]
  sizes[0] //= container.GRID_BYTES
  checksum = int(json.loads(header[8:])['__metadata__']['crc32'], 16)
  old = container.header(sizes, checksum, '1') + data[len(header) :]
  with pytest.raises(
    ValueError, match='b: found a leaf that is an earlier one again, expected none'
  ):
    opq_jax.OpqFile(old)


def test_claims_of_ties_are_bounded():
  """A file of a thousand leaves that are one large leaf again is refused by its claim."""
  zeros = np.zeros((3000, 1000), np.float32)
  params = {f'{i:04}': zeros for i in range(200)}
  record = leaf_state(zeros)
  state = CompressionState(dict.fromkeys(params, record))
  data = serialize(params, state, contexts=False)
  with pytest.raises(ValueError, match='a greater most_bytes admits them'):
    opq_jax.OpqFile(data)


@pytest.mark.parametrize('sliced', ['ef', 'e', ''])
def test_ties_of_slices(sliced):
  """Stacks that are one array are tied where both have slices, or neither."""
  params = tied_network()
  axes = lambda name, leaf: int(name in sliced)
  allocation = opq_jax.allocate(params, compression_rate=6.0, slices=axes)
  assert allocation.tree['f'].tied_to == ('' if sliced == 'e' else 'e')
  state = opq_jax.init_state(params, allocation)
  loaded, states = opq_jax.load(serialize(params, state))
  for name, leaf in opq_jax.apply_compression(params, state).items():
    assert same_bits(loaded[name], leaf)
  assert states.tree['f'].threshold.shape == ((2,) if sliced == 'ef' else ())
  with opq_jax.OpqFile(serialize(params, state)) as file:
    assert file.tied_to('f') == (None if sliced == 'e' else 'e')
