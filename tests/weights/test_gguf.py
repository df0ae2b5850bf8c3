"""GGUF files of llama.cpp as weights."""

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import cli
from opq_jax.weights import is_streamable, open_weights, read_weights

gguf = pytest.importorskip('gguf')


def tensors():
  draw = np.random.default_rng(0).laplace
  return {
    'token_embd.weight': ('Q8_0', draw(size=(96, 64)).astype(np.float32)),
    'blk.0.attn_q.weight': ('Q4_0', draw(size=(64, 64)).astype(np.float32)),
    'blk.0.ffn_up.weight': ('Q4_1', draw(size=(128, 64)).astype(np.float32)),
    'blk.0.half.weight': ('F16', draw(size=(32, 64)).astype(np.float16)),
    'blk.0.brain.weight': ('BF16', draw(size=(32, 64)).astype(ml_dtypes.bfloat16)),
    'blk.0.attn_norm.weight': ('F32', draw(size=64).astype(np.float32)),
  }


def write(path, content):
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_name('a test')
  for name, (kind, array) in content.items():
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name in ('F16', 'F32'):
      writer.add_tensor(name, array)
      continue
    stored = gguf.quants.quantize(np.asarray(array, np.float32), kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_gguf_is_read_as_it_is_stored(tmp_path):
  write(tmp_path / 'net.gguf', tensors())
  line = r'llama a test that are quantized already \(1 Q8_0, 1 Q4_0, 1 Q4_1 of 6 tensors\)'
  assert is_streamable(tmp_path / 'net.gguf')
  with pytest.warns(UserWarning, match=line):
    leaves = open_weights(tmp_path / 'net.gguf')
  # steps of a block of 32 weights, of which the largest has 127, 8 and 15 of them
  steps = {'Q8_0': 1 / 127, 'Q4_0': 1 / 8, 'Q4_1': 2 / 15}
  for name, (kind, array) in tensors().items():
    found = leaves[name].read()
    assert (found.shape, leaves[name].shape) == (array.shape, array.shape)
    np.testing.assert_array_equal(leaves[name].first(), found[:1] if found.ndim > 1 else found)
    if kind not in steps:
      assert found.dtype == array.dtype and found.tobytes() == array.tobytes(), name
      continue
    assert found.dtype == np.float32
    bound = np.abs(array.reshape(-1, 32)).max(-1, keepdims=True) * steps[kind] * 1.01
    assert (np.abs(found - array).reshape(-1, 32) <= bound).all(), name


def test_gguf_pieces_are_the_whole(tmp_path, monkeypatch):
  write(tmp_path / 'net.gguf', tensors())
  with pytest.warns(UserWarning, match='quantized already'):
    whole = read_weights(tmp_path / 'net.gguf')
  monkeypatch.setattr('opq_jax.weights.gguf._PIECE', 5 * 64)
  with pytest.warns(UserWarning, match='quantized already'):
    pieces = read_weights(tmp_path / 'net.gguf')
  for name, array in whole.items():
    assert pieces[name].tobytes() == array.tobytes(), name


def test_compress_gguf(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  write('net.gguf', tensors())
  assert cli.main(['compress', 'net.gguf', 'net.opq']) == 0
  assert 'quantized already' in capsys.readouterr().err
  assert cli.main(['verify', 'net.opq', '--against', 'net.gguf']) == 0
  with opq_jax.OpqFile('net.opq') as file:
    assert set(file) == set(tensors())
    assert [name for name in file if file.grid(name) is None] == ['blk.0.attn_norm.weight']


def test_gguf_types_without_a_decoder(tmp_path, monkeypatch):
  write(tmp_path / 'net.gguf', tensors())
  traits = dict(gguf.quants._type_traits)
  del traits[gguf.GGMLQuantizationType.Q4_1]
  monkeypatch.setattr(gguf.quants, '_type_traits', traits)
  with pytest.raises(ValueError, match=r'net.gguf: blk.0.ffn_up.weight: found type Q4_1, expected'):
    open_weights(tmp_path / 'net.gguf')


def test_gguf_damage(tmp_path):
  path = tmp_path / 'net.gguf'
  write(path, tensors())
  data = path.read_bytes()
  for size in (0, 3, 20, 100, 400, len(data) - 100):
    path.write_bytes(data[:size])
    for read in (open_weights, read_weights):
      with pytest.raises(ValueError, match=r'net.gguf: expected a GGUF file, found this'):
        read(path)
