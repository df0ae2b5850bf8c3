"""The loss against its formula, and against optax where optax has it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opq_jax.finetuning import losses

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
BATCH = {
  'label': jnp.asarray(RNG.integers(0, 5, 6), jnp.int32),
  'teacher_logits': jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32),
}


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_smoothed_cross_entropy_equals_optax(smoothing):
  targets = optax.smooth_labels(jax.nn.one_hot(BATCH['label'], 5), smoothing)
  expected = optax.softmax_cross_entropy(LOGITS, targets)
  found = losses.classification_loss(label_smoothing=smoothing)(LOGITS, BATCH)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_distillation_is_share_of_divergence():
  share, temperature = 0.3, 3.0
  q, p = (
    np.asarray(jax.nn.softmax(x / temperature), float) for x in (BATCH['teacher_logits'], LOGITS)
  )
  divergence = temperature**2 * np.sum(q * np.log(q / p), axis=-1)
  plain = np.asarray(losses.classification_loss()(LOGITS, BATCH), float)
  found = losses.classification_loss(distillation=share, temperature=temperature)(LOGITS, BATCH)
  np.testing.assert_allclose(found, (1 - share) * plain + share * divergence, rtol=1e-4)


def test_distillation_of_equal_logits_is_zero():
  loss = losses.classification_loss(distillation=1.0)
  batch = {**BATCH, 'teacher_logits': LOGITS + 7}
  np.testing.assert_allclose(loss(LOGITS, batch), 0, atol=1e-5)


def test_loss_is_float32():
  loss = losses.classification_loss(label_smoothing=0.1, distillation=0.5)
  assert loss(LOGITS.astype(jnp.bfloat16), BATCH).dtype == jnp.float32


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'label_smoothing': 1.5}, r'label_smoothing: found 1.5, expected 0 \.\.\. 1'),
    ({'distillation': -0.1}, r'distillation: found -0.1, expected 0 \.\.\. 1'),
    ({'temperature': 0.0}, 'temperature: found 0.0, expected a positive number'),
  ],
)
def test_loss_refuses_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    losses.classification_loss(**options)


def test_distillation_needs_a_teacher():
  with pytest.raises(ValueError, match='expected teacher_logits too'):
    losses.classification_loss(distillation=0.5)(LOGITS, {'label': BATCH['label']})
