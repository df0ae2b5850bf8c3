"""Model folders of Hugging Face on the command line: into one file and back."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.file.side_files import packed_files
from opq_jax.weights import holds_folder, open_folder
from tests.helpers import tiny_resnet
from tests.helpers.model_folders import llama_tensors, write_folder, write_torch_folder
from tests.helpers.opq_files import rebuilt

INDEX = 'model.safetensors.index.json'


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A sharded folder with files of all kinds beside the weights."""
  monkeypatch.chdir(tmp_path)
  path = write_folder(tmp_path / 'llama', llama_tensors(), 3)
  (path / '1_Pooling').mkdir()
  (path / '1_Pooling' / 'config.json').write_text('{"pooling": true}')
  (path / 'tokenizer.model').write_bytes(bytes(range(256)))
  (path / 'empty.txt').write_bytes(b'')
  (path / 'tf_model.h5').write_bytes(b'other weights')
  (path / 'onnx').mkdir()
  (path / 'onnx' / 'config.json').write_text('{}')
  (path / 'onnx' / 'model.onnx').write_bytes(b'other weights')
  (path / '.gitattributes').write_text('*.bin lfs')
  return path


def run(*argv):
  return cli.main([str(word) for word in argv])


def contents(path):
  return {
    str(file.relative_to(path)): file.read_bytes() for file in path.rglob('*') if file.is_file()
  }


def test_compress_folder_and_back(folder, tmp_path, capsys):
  assert run('compress', folder, 'net.opq', '--bits-per-weight', 4) == 0
  captured = capsys.readouterr()
  notes = ' '.join(captured.err.split())
  assert 'left out .gitattributes, onnx/, tf_model.h5' in notes
  assert run('decompress', 'net.opq', 'back') == 0
  assert '3 files of weights, 6 others' in capsys.readouterr().out

  expected, found = contents(folder), contents(tmp_path / 'back')
  for name in ('.gitattributes', 'tf_model.h5', 'onnx/config.json', 'onnx/model.onnx'):
    del expected[name]
  assert set(found) == set(expected)
  for name, data in expected.items():
    if not name.endswith('.safetensors'):
      assert found[name] == data, name
      continue
    # names, dtypes, shapes, order and metadata of the tensors
    end = 8 + int.from_bytes(data[:8], 'little')
    assert found[name][:end] == data[:end] and len(found[name]) == len(data)
    with safetensors.safe_open(tmp_path / 'back' / name, 'np') as file:
      assert file.metadata() == {'format': 'pt'}

  tensors, again = llama_tensors(), open_folder(tmp_path / 'back')
  assert again.config == open_folder(folder).config
  with opq_jax.OpqFile('net.opq') as file:
    assert file.tied_to('model.embed_tokens.weight') == 'lm_head.weight'
    for name, tensor in tensors.items():
      assert again[name].dtype == tensor.dtype
      assert again[name].tobytes() == file[name].tobytes(), name
      if tensor.ndim == 1:
        assert again[name].tobytes() == tensor.tobytes(), name
        continue
      assert file.grid(name) is not None
      error = again[name].astype(np.float32) - tensor.astype(np.float32)
      assert np.square(error).mean() < 0.03 * np.square(tensor.astype(np.float32)).mean()

  assert run('verify', 'net.opq', '--against', folder) == 0
  # the folder that came back is another one in its weights alone
  (folder / 'tokenizer.model').write_bytes(b'changed')
  (folder / 'added.json').write_text('{}')
  assert run('verify', 'net.opq', '--against', folder) == 1
  err = ' '.join(capsys.readouterr().err.split())
  assert f'tokenizer.model: found other bytes than in {folder}' in err
  assert f'added.json: found in {folder}, not in the file' in err


def test_compress_folder_equals_one_file(folder, tmp_path):
  """One allocation over all shards: that of the same tensors in one file."""
  safetensors.numpy.save_file(llama_tensors(), tmp_path / 'one.safetensors')
  for source, output in ((folder, 'net.opq'), ('one.safetensors', 'one.opq')):
    assert run('compress', source, output, '--rate', 8, '--exclude', '*q_proj*') == 0
  with opq_jax.OpqFile('net.opq') as file, opq_jax.OpqFile('one.opq') as one:
    assert list(file) == list(one)
    for name in one:
      assert file[name].tobytes() == one[name].tobytes(), name
      assert (file.grid(name) is None) == ('q_proj' in name or one[name].ndim == 1), name


@pytest.mark.parametrize('options', [('--file-rate', 3), ('--trellis',)])
def test_compress_folder_reports_json(folder, capsys, options):
  assert run('compress', folder, 'net.opq', '--json', *options) == 0
  compressed = json.loads(capsys.readouterr().out)
  assert run('inspect', 'net.opq', '--json') == 0
  inspected = json.loads(capsys.readouterr().out)
  assert compressed['side_files'] == inspected['side_files']
  assert compressed['side_files']['tokenizer.model'] == 256
  assert compressed['totals']['file'] == inspected['totals']['file']
  assert compressed['metadata'] == inspected['metadata']
  assert inspected['totals']['side_files'] > 256
  if '--file-rate' in options:
    assert inspected['totals']['file_rate'] == pytest.approx(3, rel=0.02)
  assert run('inspect', 'net.opq') == 0
  out = ' '.join(capsys.readouterr().out.split())
  assert 'side file tokenizer.model: 256 bytes' in out
  assert 'header of weights model-00001-of-00003.safetensors' in out
  assert run('verify', 'net.opq', '--against', folder) == 0


@pytest.mark.parametrize('shards', [1, 2])
def test_compress_torch_folder_and_back(tmp_path, monkeypatch, capsys, shards):
  pytest.importorskip('torch')
  monkeypatch.chdir(tmp_path)
  folder = write_torch_folder(tmp_path / 'llama', llama_tensors(), shards)
  assert run('compress', folder, 'net.opq') == 0
  assert 'pytorch_model' in capsys.readouterr().err
  assert run('decompress', 'net.opq', 'back') == 0
  again = open_folder('back')
  assert again.index == (INDEX if shards > 1 else None)
  assert set(again) == set(llama_tensors())
  norm = 'model.norm.weight'
  assert again[norm].tobytes() == llama_tensors()[norm].tobytes()
  assert run('verify', 'net.opq', '--against', folder) == 0


def test_decompress_folder_as_one_file(folder, tmp_path):
  assert run('compress', folder, 'net.opq') == 0
  assert run('decompress', 'net.opq', 'one.safetensors') == 0
  assert set(safetensors.numpy.load_file('one.safetensors')) == set(llama_tensors())


def test_decompress_keeps_folders(folder, tmp_path, capsys):
  assert run('compress', folder, 'net.opq') == 0
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'mine.txt').write_text('mine')
  (tmp_path / 'empty').mkdir()
  before = contents(tmp_path / 'full')
  assert run('decompress', 'net.opq', 'full') == 2
  assert (
    "full: found a folder that holds ['mine.txt'], expected an empty" in capsys.readouterr().err
  )
  assert contents(tmp_path / 'full') == before
  assert run('decompress', 'net.opq', 'full/mine.txt') == 2
  assert 'full/mine.txt: found a file, expected an empty folder' in capsys.readouterr().err
  assert run('decompress', 'net.opq', 'none/back') == 2
  assert run('decompress', 'net.opq', 'empty') == 0
  assert open_folder('empty').config
  assert not list(tmp_path.glob('.opq-*'))


def renamed_shard(text):
  """Another name of a tensor in the header of a shard."""
  return text.replace(b'model.norm.weight', b'model.mean.weight')


def without_tensor(text):
  content = json.loads(text[8:])
  del content['model.norm.weight']
  return as_header(content)


def moved(text):
  content = json.loads(text[8:])
  content['model.norm.weight']['data_offsets'][0] += 2
  return as_header(content)


def wider(text):
  content = json.loads(text[8:])
  content['model.norm.weight']['dtype'] = 'F32'
  return as_header(content)


def as_header(content):
  text = json.dumps(content).encode()
  return len(text).to_bytes(8, 'little') + text


@pytest.mark.parametrize(
  ('edit', 'line'),
  [
    (renamed_shard, 'model.mean.weight: found no such tensor'),
    (without_tensor, 'model.norm.weight: found in 0 files of weights, expected one'),
    (moved, 'found an offset of'),
    (wider, 'model.norm.weight: found float32(32,), expected bfloat16(32,)'),
    (lambda text: text[:-3], 'bytes, expected'),
    (lambda text: b'', 'found 0 bytes, expected 8'),
    (lambda text: as_header([]), 'expected a header of safetensors'),
    (lambda text: as_header({'a': {}}), 'expected a header of safetensors'),
    (lambda text: as_header({}), 'found in 0 files of weights, expected one'),
  ],
)
def test_decompress_refuses_headers(tmp_path, monkeypatch, capsys, edit, line):
  monkeypatch.chdir(tmp_path)
  folder = write_folder(tmp_path / 'llama', llama_tensors(1))
  params = dict(open_folder(folder))
  state = opq_jax.CompressionState(dict.fromkeys(params))
  header = (folder / 'model.safetensors').read_bytes()
  header = header[: 8 + int.from_bytes(header[:8], 'little')]
  opq_jax.save('net.opq', params, state, side_files={'model.safetensors': edit(header)})
  with opq_jax.OpqFile('net.opq') as file:
    assert holds_folder(file)
  assert run('decompress', 'net.opq', 'back') == 2
  assert line in ' '.join(capsys.readouterr().err.split())
  assert sorted(path.name for path in tmp_path.iterdir()) == ['llama', 'net.opq']


def test_decompress_refuses_names_of_other_places(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  params = {'w': np.ones((4, 4), np.float32)}
  files = {'config.json': b'{}'}
  data = opq_jax.file.serialize(params, opq_jax.CompressionState({'w': None}), side_files=files)
  entry, _ = packed_files(files)
  renamed = lambda text: text.replace('config.json', '../owned.sh')
  assert entry.sizes == {'config.json': 2}
  (tmp_path / 'net.opq').write_bytes(rebuilt(data, renamed))
  assert run('decompress', 'net.opq', 'back') == 2
  assert "found a side file '../owned.sh', expected a relative path" in capsys.readouterr().err


def test_compress_names_damaged_folders(folder, capsys):
  (folder / 'model-00002-of-00003.safetensors').unlink()
  assert run('compress', folder, 'net.opq') == 2
  err = ' '.join(capsys.readouterr().err.split())
  assert "found file 'model-00002-of-00003.safetensors', which is not in the folder" in err


def test_compress_known_network_of_a_folder(tmp_path, monkeypatch, capsys):
  """A known network has Flax's names in the file, of which no folder can be made."""
  monkeypatch.chdir(tmp_path)
  tiny_resnet.replace_resnet20(monkeypatch)
  folder = write_folder(tmp_path / 'resnet', tiny_resnet.tensors())
  assert run('compress', folder, 'net.opq', '--model', 'resnet20', '--no-correction') == 0
  assert 'left out all but the weights, with --model' in ' '.join(capsys.readouterr().err.split())
  assert run('verify', 'net.opq', '--against', folder) == 0
  assert run('decompress', 'net.opq', 'net.safetensors') == 0
  assert set(safetensors.numpy.load_file('net.safetensors')) == set(tiny_resnet.tensors())
