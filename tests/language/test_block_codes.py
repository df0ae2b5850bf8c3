"""Codes chosen block after block: what they give the network, and runs that are killed."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import language
from opq_jax.encoders import Feedback, Trellis, trellis_leaves
from opq_jax.encoders.rotated_inputs import RotatableMoments
from opq_jax.importers import language_models
from opq_jax.language.block_codes import BlockEncoder
from opq_jax.weights.work_folder import Work
from tests.helpers.language_models import network


def encoder_of(name, encoder, bits=3.0, change=lambda tensors: tensors, **options):
  model, tensors = network(name)
  tensors = change(tensors)
  # more tokens than inputs, half of them of few kinds: inputs of layers go together
  tokens = language.at_random(40, 2048, 16).tokens % np.where(np.arange(128) % 2, 40, 7)[:, None]
  stored = language.stored_network(model, tensors)
  chosen = {key: bits for key, tensor in tensors.items() if tensor.ndim > 1}
  return BlockEncoder(stored, tokens, chosen, encoder, **options)


def coded_by(blocks, output, told=lambda share: None):
  """Returns the codes of a run, by name of the tensor."""
  with Work(output) as own:
    work = own.open({'bits': blocks.bits})
    blocks.run(work, told)
    return {name: coded for name in blocks.network.tensors if (coded := blocks.coded(work)(name))}


def run(blocks, output, told=lambda share: None):
  """Returns the tensors of a run, with their codes' values in their places."""
  coded = coded_by(blocks, output, told)
  return {**blocks.network.tensors, **{name: part.values() for name, part in coded.items()}}


def error_of(blocks, values):
  """Squared error of the answers, over their energy."""
  model, tokens = blocks.network.model, jnp.asarray(blocks.tokens[:32])
  answers = [
    model.apply(language_models.from_tensors(model, tensors).variables, tokens)
    for tensors in (blocks.network.tensors, values)
  ]
  return float(jnp.square(answers[1] - answers[0]).sum() / jnp.square(answers[0]).sum())


@pytest.fixture(scope='module')
def by_feedback(tmp_path_factory):
  """A run with error feedback, its codes, and its tensors."""
  blocks = encoder_of('llama_biases', Feedback({}))
  coded = coded_by(blocks, tmp_path_factory.mktemp('work') / 'net.opq')
  values = {name: part.values() for name, part in coded.items()}
  return blocks, coded, {**blocks.network.tensors, **values}


@pytest.mark.slow
def test_block_codes_beat_rounding(by_feedback, tmp_path):
  blocks, _, values = by_feedback
  rounded = {}
  for name, tensor in blocks.network.tensors.items():
    rounded[name] = tensor
    if name in blocks.bits:
      own = opq_jax.compress({name: tensor}, bits_per_weight=3.0, compressible=lambda *_: True)
      rounded[name] = own.params[name]
  assert error_of(blocks, values) < 0.8 * error_of(blocks, rounded)


@pytest.mark.slow
def test_block_codes_along_trellis_of_kernels_inputs_first(tmp_path):
  errors = []
  for encoder in (Feedback({}), Trellis()):
    blocks = encoder_of('gpt2', encoder)
    errors.append(error_of(blocks, run(blocks, tmp_path / type(encoder).__name__)))
  assert errors[1] < 0.9 * errors[0]


def test_block_codes_have_the_bits_and_layout_of_the_tensors(by_feedback):
  blocks, coded, values = by_feedback
  bits, weights = 0.0, 0
  for name in blocks.bits:
    assert values[name].shape == blocks.network.tensors[name].shape
    _, counts = np.unique(coded[name].codes, return_counts=True)
    bits -= (counts * np.log2(counts / values[name].size)).sum()
    weights += values[name].size
  assert bits / weights == pytest.approx(3.0, rel=0.02)
  np.testing.assert_array_equal(
    values['model.norm.weight'], blocks.network.tensors['model.norm.weight']
  )


def with_massive_activations(tensors, down=1.0):
  """One input of every `down` is 40 times as large; its weights are multiplied too."""
  tensors, factor = dict(tensors), np.ones(48, np.float32)
  factor[5] = 40
  for name, tensor in tensors.items():
    if 'up_proj.weight' in name:
      tensors[name] = tensor * factor[:, None]
    if 'down_proj.weight' in name:
      tensors[name] = tensor * np.where(factor > 1, down, 1).astype(np.float32)
  return tensors


@pytest.mark.slow
def test_inputs_are_rotated_where_that_leaves_less_error(tmp_path, monkeypatch):
  blocks = encoder_of('llama_biases', Feedback({}), change=with_massive_activations)
  blocks = dataclasses.replace(blocks, bits={name: 3.0 for name in blocks.bits if 'down' in name})
  coded = coded_by(blocks, tmp_path / 'rotated')
  values = {name: part.values() for name, part in coded.items()}
  assert len(coded) == 2 and all(part.rotation == (1, np.float32) for part in coded.values())
  with monkeypatch.context() as patch:
    patch.setattr(RotatableMoments, 'rotated_weights', lambda *_: None)
    others = run(blocks, tmp_path / 'plain')
  errors = [error_of(blocks, {**blocks.network.tensors, **found}) for found in (values, others)]
  assert errors[0] < 0.5 * errors[1]


def test_inputs_of_small_weights_are_not_rotated(tmp_path):
  """Massive activations do no harm where their weights are as small."""
  change = functools.partial(with_massive_activations, down=1 / 40)
  blocks = encoder_of('llama_biases', Feedback({}), change=change)
  coded = coded_by(blocks, tmp_path / 'net.opq')
  assert not any(part.rotation for name, part in coded.items() if 'down_proj' in name)


def test_tensors_with_plain_codes_are_named_also_after_a_kill(tmp_path, monkeypatch):
  monkeypatch.setattr(trellis_leaves, '_has_too_many_beyond', lambda *_: True)
  blocks = encoder_of('gpt2', Trellis())

  def killed(share):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(blocks, tmp_path / 'net.opq', killed)
  with pytest.warns(UserWarning, match='does not serve') as notes:
    run(blocks, tmp_path / 'net.opq')
  (text,) = [str(note.message) for note in notes if 'does not serve' in str(note.message)]
  # the table was coded before the kill
  assert text.startswith('wte.weight, ') or 'wte.weight,' in text.partition(':')[0]


@pytest.mark.parametrize('done', [1, 3])
def test_killed_run_goes_on_bit_for_bit(done, by_feedback, tmp_path):
  blocks, _, expected = by_feedback
  shares = []

  def killed(share):
    shares.append(share)
    if len(shares) == done:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(blocks, tmp_path / 'net.opq', killed)
  with Work(tmp_path / 'net.opq') as own:
    assert own.open({'bits': blocks.bits}).done == done
  left = []
  found = run(blocks, tmp_path / 'net.opq', left.append)
  assert len(left) == blocks.blocks - done
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor)
