"""Metadata are parsable keys, and the sentences of older files say the same."""

import dataclasses
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.cli.encoding import Encoding, ImageSet, channel_axis

FOLDER = pathlib.Path(__file__).parents[1] / 'golden' / 'sentences'  # by commit fe213c9

FULL = Encoding(
  targets={'file_rate': 9.0, 'bits_per_weight': 1 / 3},
  objective='squared_error',
  channel_axis='last',
  slices={'*/layers/*': 1, 'a=b/*': 2},
  encoder='layer_by_layer',
  first='trellis',
  trellis_version=2,
  moments='images',
  inputs='images',
  images=ImageSet(12, 'abe4'),
  batch_norm='images',
  inference_only=True,
)


@pytest.mark.parametrize('encoding', [Encoding(), FULL], ids=['default', 'full'])
def test_encoding_comes_back_from_metadata(encoding):
  metadata = encoding.metadata()
  assert all(isinstance(text, str) for text in metadata.values())
  assert Encoding.of({**metadata, 'opq_jax': '0.2.0', 'model': 'resnet20'}) == encoding


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('encoder', 'by hand'),
    ('first', 'layer_by_layer'),
    ('batch_norm', 'maybe'),
    ('bits_per_weight', 'few'),
    ('bits_per_weight', '-1'),
    ('compression_rate', 'nan'),
    ('compression_rate', '1e400'),
    ('images', '1.5'),
    ('trellis_version', 'new'),
  ],
)
def test_encoding_refuses_unknown_values(key, value):
  metadata = {**FULL.metadata(), 'opq_jax': '0.2.0', 'model': 'resnet20', key: value}
  with pytest.raises(ValueError, match=f"metadata: {key}: found '{value}', expected"):
    Encoding.of(metadata)


@pytest.mark.parametrize('text', ['*=0', '*', '=1', '*=10', 'a=1\n', '*=one'])
def test_encoding_refuses_unknown_slices(text):
  with pytest.raises(ValueError, match=r'metadata: slices: found .*, expected GLOB=N'):
    Encoding.of({'opq_jax': '0.2.0', 'slices': text})


@pytest.mark.parametrize(
  ('metadata', 'missing'),
  [
    ({'encoder': 'feedback'}, 'moments'),
    ({'encoder': 'layer_by_layer', 'inputs': 'synthetic', 'model': 'resnet20'}, 'first'),
    ({'encoder': 'layer_by_layer', 'first': 'trellis'}, 'inputs'),
    ({'encoder': 'trellis', 'moments': 'synthetic'}, 'model'),
    ({'batch_norm': 'images', 'model': 'resnet20'}, 'images'),
    ({'batch_norm': 'noise'}, 'model'),
    ({'inference_only': 'true'}, 'model'),
  ],
)
def test_encoding_refuses_half_claims(metadata, missing):
  with pytest.raises(ValueError, match=rf'metadata: found \S+ without {missing}, expected both'):
    Encoding.of({**metadata, 'opq_jax': '0.2.0'})


def test_encoding_ignores_metadata_of_others():
  metadata = {'encoder': 'ViT', 'bits': 'few', 'channel_axis': 'sideways'}
  assert Encoding.of(metadata) == Encoding()
  assert channel_axis(metadata)('fc', np.zeros((4, 3))) == -1


SENTENCES = {
  'trellis': Encoding(
    targets={'compression_rate': 16.0}, objective='balanced_error', encoder='trellis'
  ),
  'feedback': Encoding(
    targets={'compression_rate': 60.0},
    objective='balanced_error',
    channel_axis='last',
    encoder='feedback',
    moments='synthetic',
    batch_norm='synthetic',
    inference_only=True,
  ),
}


@pytest.mark.parametrize('name', SENTENCES)
def test_encoding_reads_files_with_sentences(name):
  with opq_jax.OpqFile(FOLDER / f'{name}.opq') as file:
    assert Encoding.of(file.metadata) == SENTENCES[name]


def test_encoding_reads_every_sentence():
  both = 'along a trellis, by error feedback, moments from synthetic images'
  old = {'opq_jax': '0.1.0', 'model': 'resnet20', 'codes': both}
  old['targets'] = 'file_rate=9 bits_per_weight=2.5'
  encoding = Encoding(
    targets={'file_rate': 9.0, 'bits_per_weight': 2.5}, encoder='trellis', moments='synthetic'
  )
  for sentence, name in (('not corrected', 'uncorrected'), ('corrected from noise', 'noise')):
    expected = dataclasses.replace(encoding, batch_norm=name)
    assert Encoding.of({**old, 'batch_norm': sentence}) == expected


def test_verify_repeats_files_with_sentences(tmp_path, capsys):
  rng = np.random.default_rng(7)
  weights = {
    'fc1.weight': rng.laplace(size=(96, 64)).astype(np.float32),
    'fc1.bias': rng.normal(size=96).astype(np.float32),
    'fc2.weight': rng.laplace(size=(10, 96)).astype(np.float32),
  }
  path = tmp_path / 'net.safetensors'
  safetensors.numpy.save_file(weights, path)
  command = ['verify', str(FOLDER / 'trellis.opq'), '--against', str(path)]
  assert cli.main(command) == 0
  assert 'every claim holds' in ' '.join(capsys.readouterr().out.split())
