"""Which leaves `opq compress` compresses: names, globs, and what is said of the others."""

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.cli.leaves import chosen_paths, names_note
from tests.helpers.opq_files import laplace


def network():
  return {
    'layers.kernel': laplace(3, 16, 16),
    'layers.bias': laplace(3, 16, seed=1),
    'attn.relative_attention_bias.weight': laplace(32, 8, seed=2),
    'attn.mask': np.tril(np.ones((16, 16), np.float32)),
    'linear.w': laplace(4, 8, 8, seed=3),
    'linear.b': laplace(4, 8, seed=4),
    'mu.kernel': laplace(8, 8, seed=5),
    'vector': laplace(1, 1, 64),
    'optimizer.mu.kernel': laplace(8, 8, seed=6),
  }


DEFAULT = {'layers.kernel', 'linear.w', 'mu.kernel'}

CHOICES = [
  ([], [], DEFAULT),
  ([], ['*mu*'], DEFAULT - {'mu.kernel'}),
  ([], ['*mask', '*bias*'], DEFAULT),  # of leaves that are left alone anyway
  (['l*'], [], {'layers.kernel', 'linear.w'}),  # no stacked bias
  (['*relative*'], [], {'attn.relative_attention_bias.weight'}),
  (['*', '*relative*'], [], DEFAULT | {'attn.relative_attention_bias.weight'}),
  (
    ['*', '*relative*', 'linear.b'],
    ['mu*'],
    {'layers.kernel', 'linear.w', 'linear.b', 'attn.relative_attention_bias.weight'},
  ),
]


@pytest.mark.parametrize(('include', 'exclude', 'expected'), CHOICES)
def test_chosen_paths(include, exclude, expected):
  assert chosen_paths(network(), include, exclude) == expected


@pytest.mark.parametrize('glob', ['nothing*', 'vector', 'optimizer*'])
def test_chosen_paths_include_what_can_be(glob):
  with pytest.raises(ValueError, match='--include: found no leaf that'):
    chosen_paths(network(), [glob], [])
  with pytest.raises(ValueError, match="--exclude: found no leaf that 'x"):
    chosen_paths(network(), [], ['x' + glob])


def test_names_note():
  tree = network()
  text = names_note(tree, DEFAULT, [])
  assert text.startswith('4 leaves of two axes or more stored bit for bit, by name: masks (')
  for said in ('biases (layers.bias)', 'tables of attention biases (attn.rel', 'masks (attn.mask)'):
    assert said in text
  assert names_note(tree, DEFAULT, ['*bias*', '*.b']).startswith('1 leaf of two axes or more')
  assert names_note({'w': tree['linear.w'], 'b': laplace(8)}, {'w'}, []) == ''


@pytest.mark.parametrize('suffix', ['safetensors', 'npz'])
def test_compress_says_names(tmp_path, monkeypatch, capsys, suffix):
  monkeypatch.chdir(tmp_path)
  tree = {name: leaf for name, leaf in network().items() if not name.startswith('optimizer')}
  write = safetensors.numpy.save_file if suffix == 'safetensors' else _save_npz
  write(tree, f'net.{suffix}')
  assert cli.main(['compress', f'net.{suffix}', 'net.opq']) == 0
  assert 'stored bit for bit, by name: ' in capsys.readouterr().err
  with opq_jax.OpqFile('net.opq') as file:
    assert {name for name in file if file.grid(name) is not None} == DEFAULT
    assert file['attn.mask'].tobytes() == tree['attn.mask'].tobytes()
  assert cli.main(['verify', 'net.opq', '--against', f'net.{suffix}']) == 0


def _save_npz(tree, path):
  np.savez(path, **tree)
