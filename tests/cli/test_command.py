import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli, importers
from opq_jax.cli import digits
from opq_jax.core import trees
from opq_jax.importers import named_networks, networks
from opq_jax.weights import channel_axis
from tests.helpers import stacks, tiny_resnet


def tree():
  draw = np.random.default_rng(0).laplace
  return {
    'fc1.weight': draw(size=(96, 64)).astype(np.float32),
    'fc1.bias': draw(size=96).astype(np.float32),
    'fc2.weight': draw(size=(64, 96)).astype(np.float32),
    'steps': np.array([[3]], np.int32),
  }


@pytest.fixture
def net(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  safetensors.numpy.save_file(tree(), 'net.safetensors')
  return tmp_path


def run(*argv):
  return cli.main([str(word) for word in argv])


def files(folder):
  return sorted(path.name for path in folder.iterdir())


def test_compress_inspect_decompress(net, capsys):
  assert run('compress', 'net.safetensors', 'net.opq', '--rate', 12.8) == 0
  out = capsys.readouterr().out
  size = (net / 'net.opq').stat().st_size
  assert 'fc1.weight' in out
  assert f'{size:,}' in out
  assert '2.500 bits per weight with tables, 12.80 times fewer' in ' '.join(out.split())
  assert all(name in out for name in ('nominal', 'packed', 'entropy', 'file', 'bytes on disk'))

  assert run('inspect', 'net.opq', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert found['totals']['file'] == size
  payload = sum(leaf['file'] for leaf in found['compressed']) - 12 * len(found['compressed'])
  weights = found['totals']['weights']
  assert 4 * weights / payload == pytest.approx(12.8, rel=0.01)
  assert 12.8 < found['totals']['entropy_rate'] < 1.1 * 12.8
  assert [leaf['path'] for leaf in found['compressed']] == ['fc1.weight', 'fc2.weight']
  assert [leaf['path'] for leaf in found['uncompressed']] == ['fc1.bias', 'steps']
  assert found['metadata'] == {
    'weights': 'net.safetensors',
    'compression_rate': '12.8',
    'encoder': 'rounding',
    'objective': 'balanced_error',
    'channel_axis': 'auto',
    'opq_jax': opq_jax.__version__,
  }

  assert run('inspect', 'net.opq') == 0
  out = capsys.readouterr().out
  assert f'{size:,}' in out
  assert 'checksums hold' in out

  assert run('decompress', 'net.opq', 'out.safetensors') == 0
  decoded = safetensors.numpy.load_file('out.safetensors')
  expected = tree()
  assert set(decoded) == set(expected)
  for name in ('fc1.bias', 'steps'):
    assert decoded[name].tobytes() == expected[name].tobytes()
  for name in ('fc1.weight', 'fc2.weight'):
    assert np.mean((decoded[name] - expected[name]) ** 2) < 0.1 * np.mean(expected[name] ** 2)
  assert files(net) == ['net.opq', 'net.safetensors', 'out.safetensors']


@pytest.fixture
def resnet(net, monkeypatch):
  tiny_resnet.replace_resnet20(monkeypatch)
  safetensors.numpy.save_file(tiny_resnet.tensors(), 'resnet.safetensors')
  return tiny_resnet.variables()


def test_decompress_uses_source_names(resnet, capsys):
  command = 'compress', '--model', 'resnet20', 'resnet.safetensors', 'net.opq', '--rate', 8
  assert run(*command) == 0
  out = capsys.readouterr().out
  assert 'resnet20, 5 classes, by the names of akamaster; BatchNorm corrected from noise' in out
  assert run('inspect', 'net.opq', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert found['uncorrected'] is None
  metadata = found['metadata']
  assert metadata['channel_axis'] == 'last'
  network = {key: metadata[key] for key in named_networks.KEYS}
  assert network == {'model': 'resnet20', 'source': 'akamaster', 'num_classes': '5'}
  assert run('inspect', 'net.opq') == 0
  assert 'source: akamaster' in capsys.readouterr().out

  allocation = opq_jax.allocate(resnet, compression_rate=8.0)
  state = opq_jax.init_state(resnet, allocation)
  compressed = opq_jax.apply_compression(resnet, state)
  network = networks.load('resnet.safetensors', name='resnet20')
  expected = networks.correct_batch_norm(network, compressed)
  jax.tree.map(np.testing.assert_array_equal, networks.load('net.opq').variables, expected)

  # home, by the names that it came with; and by ours
  assert run('decompress', 'net.opq', 'home.safetensors') == 0
  home = importers.load('resnet20', 'home.safetensors', source='akamaster')
  jax.tree.map(np.testing.assert_array_equal, home.variables, expected)
  assert run('decompress', 'net.opq', 'flax.safetensors', '--to', 'flax') == 0
  flax = safetensors.numpy.load_file('flax.safetensors')
  assert flax.keys() == trees.named_leaves(resnet).keys()


@pytest.mark.parametrize('content', [None, {'format': 'pt', 'é': '[{"'}])
def test_metadata_of_safetensors_come_back(net, content):
  safetensors.numpy.save_file(tree(), 'net.safetensors', content)
  assert run('compress', 'net.safetensors', 'net.opq') == 0
  assert run('decompress', 'net.opq', 'back.safetensors') == 0
  with safetensors.safe_open('back.safetensors', 'np') as file:
    assert file.metadata() == content
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0


def test_decompress_writes_formats_by_suffix(net, capsys):
  assert run('compress', 'net.safetensors', 'net.opq') == 0
  for name in ('back.safetensors', 'back.npz'):
    assert run('decompress', 'net.opq', name) == 0
  arrays = np.load('back.npz')
  with opq_jax.OpqFile('net.opq') as file:
    assert sorted(arrays) == list(file)
    for path, leaf in file.items():
      np.testing.assert_array_equal(arrays[path], leaf)
  for name in ('out.pth', 'out.h5', 'out.v1'):
    capsys.readouterr()
    assert run('decompress', 'net.opq', name) == 2
    assert f'{name}: found suffix' in capsys.readouterr().err and name not in files(net)


def test_compress_keeps_network_of_file(resnet, capsys):
  assert run('compress', '--model', 'resnet20', 'resnet.safetensors', 'net.opq', '--rate', 6) == 0
  assert run('compress', 'net.opq', 'small.opq', '--rate', 7) == 0
  assert 'resnet20, 5 classes, by the names of akamaster' in capsys.readouterr().out
  assert networks.load('small.opq').model == networks.load('net.opq').model


def test_no_correction_keeps_batch_norm(resnet, capsys):
  command = 'compress', '--model', 'resnet20', 'resnet.safetensors', 'net.opq', '--no-correction'
  assert run(*command) == 0
  assert 'BatchNorm not corrected' in capsys.readouterr().out
  found = networks.load('net.opq').variables['batch_stats']
  jax.tree.map(np.testing.assert_array_equal, found, resnet['batch_stats'])


def test_inference_only_is_smaller(resnet):
  command = 'compress', '--model', 'resnet20', 'resnet.safetensors', '--rate', 12
  assert run(*command, 'net.opq') == 0
  assert run(*command, 'small.opq', '--inference-only') == 0
  sizes = [os.stat(name).st_size for name in ('net.opq', 'small.opq')]
  assert sizes[1] < 0.95 * sizes[0]
  whole, small = networks.load('net.opq'), networks.load('small.opq')
  images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  expected, found = (n.model.apply(n.variables, images) for n in (whole, small))
  np.testing.assert_allclose(found, expected, atol=0.05 * np.std(expected))


@pytest.mark.parametrize('options', [(), ('--model', 'resnet20')], ids=['streamed', 'network'])
def test_fast_is_larger_and_equal(resnet, options):
  tensors = safetensors.numpy.load_file('resnet.safetensors')
  for name, tensor in tensors.items():
    if tensor.ndim == 4:  # neighbours in the window are alike, as in a network that was trained
      tensors[name] = np.ascontiguousarray(np.cumsum(tensor, -1) / 2)
  safetensors.numpy.save_file(tensors, 'smooth.safetensors')
  assert run('compress', *options, 'smooth.safetensors', 'net.opq', '--rate', 12) == 0
  assert run('compress', *options, 'smooth.safetensors', 'fast.opq', '--rate', 12, '--fast') == 0
  assert os.stat('net.opq').st_size < 0.97 * os.stat('fast.opq').st_size
  with opq_jax.OpqFile('net.opq') as leaves, opq_jax.OpqFile('fast.opq') as fast:
    for name, leaf in leaves.items():
      np.testing.assert_array_equal(fast[name], leaf)


def test_to_source_needs_a_network(net, capsys):
  assert run('compress', 'net.safetensors', 'net.opq') == 0
  assert run('decompress', 'net.opq', 'out.safetensors', '--to', 'source') == 2
  assert '--to: found no name of a network in net.opq' in capsys.readouterr().err


def test_compress_equals_the_library(net):
  assert run('compress', 'net.safetensors', 'net.opq', '--sparsity', 0.5, '--bits', 3) == 0
  params = tree()
  allocation = opq_jax.allocate(params, sparsity=0.5, bits=3.0, channel_axis=channel_axis)
  state = opq_jax.init_state(params, allocation)
  expected = opq_jax.apply_compression(params, state)
  found, _ = opq_jax.load('net.opq')
  for name, leaf in trees.named_leaves(expected).items():
    np.testing.assert_array_equal(found[name], np.asarray(leaf))
  with opq_jax.OpqFile('net.opq') as file:
    assert {'sparsity': '0.5', 'bits': '3'}.items() <= file.metadata.items()


def test_compress_chooses_leaves_by_globs(net):
  assert run('compress', 'net.safetensors', 'net.opq', '--exclude', 'fc2*') == 0
  with opq_jax.OpqFile('net.opq') as file:
    assert file.metadata['compression_rate'] == '10'
    assert file.leaf_state('fc1.weight') is not None
    assert file.leaf_state('fc2.weight') is None
    assert file['fc2.weight'].tobytes() == tree()['fc2.weight'].tobytes()
  assert run('compress', 'net.safetensors', 'other.opq', '--include', 'fc1*', 'nothing*') == 2
  assert run('compress', 'net.safetensors', 'other.opq', '--include', 'fc1*') == 0
  with opq_jax.OpqFile('other.opq') as file:
    assert file.leaf_state('fc2.weight') is None


@pytest.mark.parametrize(
  ('glob', 'left'),
  [
    ('blocks[0].weight', {'blocks[0].weight'}),
    ('blocks[[]0].weight', {'blocks[0].weight'}),
    ('blocks[*].weight', {'blocks[0].weight', 'blocks[1].weight'}),
    ('re:blocks\\[.\\].*', {'blocks[0].weight', 'blocks[1].weight'}),
    ('head[12].weight', {'head1.weight'}),
    ('模型.é weight\n2', {'模型.é weight\n2'}),
  ],
)
def test_paths_match_as_they_are_shown(tmp_path, glob, left):
  names = 'blocks[0].weight', 'blocks[1].weight', 'head1.weight', '模型.é weight\n2'
  rng = np.random.default_rng(0)
  weights = {name: rng.laplace(size=(16, 16)).astype(np.float32) for name in names}
  safetensors.numpy.save_file(weights, tmp_path / 'net.safetensors')
  arguments = tmp_path / 'net.safetensors', tmp_path / 'net.opq', '--exclude', glob
  assert cli.main(['compress', *map(str, arguments)]) == 0
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    assert {name for name in names if not file.grids(name)} == left


def test_expressions_that_are_none(net, capsys):
  assert cli.main(['compress', 'net.safetensors', 'net.opq', '--exclude', 're:(']) == 2
  assert 're:(: found no regular expression' in capsys.readouterr().err
  # those of slices stand in the file, and are run by whoever reads it
  assert cli.main(['compress', 'net.safetensors', 'net.opq', '--slices', 're:.*=1']) == 2
  assert 'expected GLOB=N' in capsys.readouterr().err


def test_compress_slices_of_globs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  params = {f'{name}.weight': leaf for name, leaf in stacks.stacked().items()}
  safetensors.numpy.save_file(params, 'net.safetensors')
  # the first axis of a weight of PyTorch is its outputs: of a slice, the second of the leaf
  axis = lambda path, leaf: leaf.ndim - 2
  slices = lambda path, leaf: int(path == 'layer.weight')
  options = {'compression_rate': 12.0, 'channel_axis': axis, 'slices': slices}
  state = opq_jax.init_state(params, opq_jax.allocate(params, **options))
  command = 'compress', 'net.safetensors', 'net.opq', '--rate', 12
  assert run(*command, '--slices', 'layer*=1') == 0
  assert 'slices' in capsys.readouterr().out
  with opq_jax.OpqFile('net.opq') as file:
    assert file.metadata['slices'] == 'layer*=1' and file.slices('layer.weight') == 1
    expected = opq_jax.file.serialize(params, state, file.metadata)
  assert (tmp_path / 'net.opq').read_bytes() == expected
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0
  assert run('inspect', 'net.opq', '--json') == 0
  found = json.loads(capsys.readouterr().out.split('against net.safetensors')[1])
  assert [leaf['slices'] for leaf in found['compressed']] == [0, 4]
  # a file that says nothing of slices in its metadata
  opq_jax.save('plain.opq', params, state)
  assert run('inspect', 'plain.opq') == 0
  assert run('verify', 'plain.opq', '--against', 'net.safetensors') == 0
  capsys.readouterr()
  assert run(*command, '--slices', 'none*=1') == 2
  assert "--slices: found no compressed leaf that 'none*' matches" in capsys.readouterr().err
  assert run(*command, '--slices', 'layer*') == 2
  assert "--slices: found 'layer*', expected GLOB=N" in capsys.readouterr().err
  assert run(*command, '--slices', 'layer*=3') == 2
  assert 'layer.weight: found 3 axes of slices' in capsys.readouterr().err


def test_compress_narrows_float64(net):
  np.savez('wide.npz', **{name: leaf.astype(np.float64) for name, leaf in tree().items()})
  assert run('compress', 'wide.npz', 'wide.opq', '--exclude', 'steps') == 0
  with opq_jax.OpqFile('wide.opq') as file:
    assert file['fc1.weight'].dtype == np.float32
    assert file['fc1.bias'].dtype == np.float64


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['compress', 'no.safetensors', 'out.opq'], 'no.safetensors'),
    (['compress', 'net.safetensors', 'out.opq', '--rate', '.2'], 'compression_rate: found 0.2'),
    (['compress', 'net.safetensors', 'out.opq', '--bits', '3'], 'found bits alone'),
    (['compress', 'net.safetensors', 'out.opq', '--rate', '9', '--bits', '3'], 'together with'),
    (['compress', 'net.safetensors', 'out.opq', '--include', 'conv*'], "'conv*'"),
    (['compress', 'net.safetensors', 'out.opq', '--exclude', 'fc*'], 'no leaf to compress'),
    (['compress', 'nan.npz', 'out.opq'], 'w: found NaN'),
    (['compress', 'notes.txt', 'out.opq'], "found suffix '.txt'"),
    (['compress', 'net.safetensors', 'no/out.opq'], 'found no folder no'),
    (['compress', 'net.safetensors', '.'], 'found a folder'),
    (['compress', 'net.safetensors', 'net.safetensors'], 'the input itself'),
    *(
      (['compress', 'net.safetensors', 'out.opq', *option.split()], f'{option.split()[0]} needs')
      for option in (
        *('--source timm', '--no-correction', '--inference-only', '--feedback'),
        *('--layer-by-layer', '--images folder', '--num-classes 3', '--max-images 3'),
      )
    ),
    (
      [
        *('compress', 'net.safetensors', 'out.opq', '--model', 'vgg16', '--no-correction'),
        *('--images', 'folder'),
      ],
      '--images: found it together with --no-correction',
    ),
    (
      [
        *('compress', 'net.safetensors', 'out.opq', '--model', 'vgg16', '--layer-by-layer'),
        *('--sparsity', '.5', '--bits', '3'),
      ],
      '--layer-by-layer: found it together with --sparsity or --bits',
    ),
    (
      [
        'compress',
        'net.safetensors',
        'out.opq',
        '--model',
        'vgg16',
        '--feedback',
        '--sparsity',
        '.5',
        '--bits',
        '3',
      ],
      '--feedback: found it together with --sparsity or --bits',
    ),
    (
      ['compress', 'net.safetensors', 'out.opq', '--trellis', '--sparsity', '.5', '--bits', '3'],
      '--trellis: found it together with --sparsity or --bits',
    ),
    (['compress', 'net.safetensors', 'out.opq', '--trellis', '--fast'], 'together with --fast'),
    (['compress', 'net.safetensors', 'out.opq', '--model', 'vgg'], "name: found 'vgg'"),
    (['compress', 'net.safetensors', 'out.opq', '--model', 'resnet20'], 'found tensors fc1.bias'),
    (
      ['compress', 'net.safetensors', 'out.opq', '--model', 'vgg16', '--channel-axis', 'first'],
      '--channel-axis: found first',
    ),
    (['inspect', 'notes.txt'], 'no .opq file'),
    (['inspect', 'no.opq'], 'no.opq: No such file'),
    (['decompress', 'notes.txt', 'out.safetensors'], 'no .opq file'),
  ],
)
def test_errors_are_one_line(net, capsys, argv, message):
  (net / 'notes.txt').write_text('no weights')
  np.savez('nan.npz', w=np.full((96, 64), np.nan, np.float32))
  before = {name: (net / name).read_bytes() for name in files(net)}
  assert run(*argv) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  (line,) = captured.err.splitlines()
  assert line.startswith('opq: ')
  assert message in line
  assert {name: (net / name).read_bytes() for name in files(net)} == before


def test_failure_keeps_old_file(net):
  (net / 'net.opq').write_bytes(b'old')
  assert run('compress', 'net.safetensors', 'net.opq', '--rate', 0.2) == 2
  assert (net / 'net.opq').read_bytes() == b'old'
  assert run('compress', 'net.safetensors', 'net.opq') == 0
  assert (net / 'net.opq').read_bytes() != b'old'
  assert files(net) == ['net.opq', 'net.safetensors']


def test_inspect_finds_a_flipped_bit(net, capsys):
  params = tree()
  state = opq_jax.CompressionState(jax.tree.map(lambda _: None, params))
  opq_jax.save('net.opq', params, state)
  data = bytearray((net / 'net.opq').read_bytes())
  data[-100] ^= 1
  (net / 'net.opq').write_bytes(data)
  assert run('inspect', 'net.opq') == 2
  assert 'CRC' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['', 'compress', 'inspect', 'decompress', 'demo'])
def test_help_teaches_by_examples(capsys, command):
  assert run(*command.split(), '--help') == 0
  out = capsys.readouterr().out
  assert 'examples:' in out
  assert f'opq {command}' in out
  assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize('argv', [[], ['shrink'], ['compress', 'one'], ['inspect', 'a', '--no']])
def test_usage_errors_exit_with_2(capsys, argv):
  assert run(*argv) == 2
  assert 'usage: opq' in capsys.readouterr().err


def test_demo_passes_given_options(monkeypatch):
  calls = []
  monkeypatch.setattr(digits, 'run', lambda **options: calls.append(options))
  assert run('demo') == 0
  assert run('demo', '--seed', 3, '--rate', 16, '--output', 'net.opq') == 0
  assert [sorted(call) for call in calls] == [[], ['output', 'rate', 'seed']]
  assert calls[1]['seed'] == 3


def test_cli_runs_as_a_module():
  command = [sys.executable, '-m', 'opq_jax.cli', '--version']
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 0
  assert result.stdout == f'opq_jax {opq_jax.__version__}\n'


def test_targets_agree(net, capsys):
  assert run('compress', 'net.safetensors', 'rate.opq', '--rate', 16) == 0
  assert run('compress', 'net.safetensors', 'bits.opq', '--bits-per-weight', 2) == 0
  same = [opq_jax.load(name)[0]['fc1.weight'] for name in ('rate.opq', 'bits.opq')]
  np.testing.assert_array_equal(*same)
  original = sum(leaf.nbytes for leaf in tree().values())
  capsys.readouterr()
  # leaf by leaf from disk, and all in memory
  np.savez('net.npz', **tree())
  for source in ('net.safetensors', 'net.npz'):
    assert run('compress', source, 'file.opq', '--file-rate', 9) == 0
    assert 8.99 <= original / (net / 'file.opq').stat().st_size <= 9.06
  out = capsys.readouterr().out
  assert 'times smaller than in float32' in ' '.join(out.split())
  assert files(net) == ['bits.opq', 'file.opq', 'net.npz', 'net.safetensors', 'rate.opq']
  assert run('verify', 'file.opq', '--against', 'net.npz') == 0
  assert run('inspect', 'file.opq', '--json') == 0
  found = json.loads(capsys.readouterr().out.partition('{')[2].join(['{', '']))
  totals = found['totals']
  assert totals['rates_are_against']['file_rate'] == 'all leaves as they came'
  assert totals['bits_per_weight'] < 32 / 9
  assert found['metadata']['file_rate'] == '9'


@pytest.mark.parametrize('options', [[], ['--file-rate', 12]], ids=str)
@pytest.mark.parametrize('source', ['net.safetensors', 'net.npz'])
def test_palettes_have_few_values_and_verify(net, capsys, source, options):
  # leaf by leaf from disk, and all in memory
  np.savez('net.npz', **tree())
  assert run('compress', source, 'net.opq', '--palette-bits', 3, *options) == 0
  assert 'clipped' in capsys.readouterr().out
  params, state = opq_jax.load('net.opq')
  for name in ('fc1.weight', 'fc2.weight'):
    assert len(np.unique(params[name])) <= 7 and not np.asarray(state.tree[name].escaped).any()
  assert run('verify', 'net.opq', '--against', source) == 0
  assert run('inspect', 'net.opq', '--json') == 0
  assert (
    json.loads(capsys.readouterr().out.partition('{')[2].join(['{', '']))['metadata'][
      'palette_bits'
    ]
    == '3'
  )


@pytest.mark.parametrize('option', ['--trellis', '--layer-by-layer', '--calibration=self'])
def test_palettes_exclude_encoders_with_grids_of_their_own(net, capsys, option):
  known = ['--model', 'resnet20'] if option == '--layer-by-layer' else []
  arguments = 'net.safetensors', 'net.opq', '--palette-bits', 4, option, *known
  assert run('compress', *arguments) == 2
  assert 'found it together with --palette-bits' in capsys.readouterr().err


def test_file_rate_along_trellis_verifies(net):
  arguments = '--trellis', '--file-rate', 12
  assert run('compress', 'net.safetensors', 'net.opq', *arguments) == 0
  original = sum(leaf.nbytes for leaf in tree().values())
  assert 12 <= original / (net / 'net.opq').stat().st_size <= 12.2
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0


@pytest.mark.parametrize('options', [['--rate', 9], ['--bits', 3, '--sparsity', 0.5]])
def test_file_rate_excludes_other_targets(net, capsys, options):
  assert run('compress', 'net.safetensors', 'net.opq', '--file-rate', 9, *options) == 2
  assert 'found file_rate together with another target' in capsys.readouterr().err


def test_compress_notes_what_is_lost(net, capsys):
  params = tree()
  params['fc1.weight'][3] *= 1e-6
  params['fc2.weight'][5, 7] = 5e4
  params['lora_B.weight'] = np.zeros((8, 4), np.float32)
  safetensors.numpy.save_file(params, 'odd.safetensors')
  assert run('compress', 'odd.safetensors', 'odd.opq') == 0
  out, err = (' '.join(text.split()) for text in capsys.readouterr())
  assert 'note: all weights are pruned of fc1.weight (1 of 96 along its first axis' in err or (
    'fc1.weight (1 of 96 output channels)' in err
  )
  assert 'lora_B.weight: all weights are zero, and the leaf is left as it is' in err
  assert 'escaped' in out and 'all weights pruned of 1 output channels' in out
  assert run('inspect', 'odd.opq') == 0
  assert 'escaped' in capsys.readouterr().out
  loaded, _ = opq_jax.load('odd.opq')
  assert loaded['fc2.weight'][5, 7] == 5e4
  assert run('verify', 'odd.opq', '--against', 'odd.safetensors') == 0
  # more than there is
  assert run('compress', 'net.safetensors', 'exact.opq', '--rate', 0.8) == 0
  assert 'all values are exact' in ' '.join(capsys.readouterr().err.split())
  np.testing.assert_array_equal(opq_jax.load('exact.opq')[0]['fc1.weight'], tree()['fc1.weight'])
