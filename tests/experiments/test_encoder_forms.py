"""One sentence encoder in the forms that people write it in: the same answers of the library."""

import functools

import jax
import numpy as np
import pytest

import opq_jax

pytest.importorskip('equinox')  # of the extra `test`

from experiments.benchmarks.accuracy import encoder_forms

LAYERS, FEATURES, HIDDEN, WORDS, LENGTH, HEADS = 2, 32, 64, 50, 12, 4
BITS = 3.0


@functools.cache
def canonical():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return (rng.laplace(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 100)).astype('f4')

  norm = lambda: {'scale': 1 + draw(FEATURES), 'bias': draw(FEATURES)}
  dense = lambda inputs, outputs: {'kernel': draw(inputs, outputs), 'bias': draw(outputs)}
  tables = (('word', WORDS), ('position', LENGTH), ('type', 2))
  params = {name: {'embedding': draw(rows, FEATURES)} for name, rows in tables}
  params['norm'] = norm()
  for i in range(LAYERS):
    params |= {
      f'{i}_{name}': dense(FEATURES, FEATURES) for name in ('query', 'key', 'value', 'out')
    }
    params |= {f'{i}_norm': norm(), f'{i}_last_norm': norm()}
    params |= {f'{i}_up': dense(FEATURES, HIDDEN), f'{i}_down': dense(HIDDEN, FEATURES)}
  return params


@functools.cache
def answers(name):
  """Embeddings, the payload and step of every matrix, and the bytes of the codes."""
  form = encoder_forms.form(name, canonical(), HEADS)
  tokens = np.random.default_rng(1).integers(1, WORDS, (4, LENGTH))
  tokens[0, 7:] = 0
  used = opq_jax.usage(form.fn, form.params, tokens)
  allocation = opq_jax.allocate(form.params, bits_per_weight=BITS, usage=used)
  state = opq_jax.init_state(form.params, allocation)
  with opq_jax.OpqFile(opq_jax.file.serialize(form.params, state)) as file:
    stored = sum(file.sizes().values())
  return form.fn(form.params, tokens), encoder_forms.grids(form, allocation), stored


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in encoder_forms.FORMS if name != 'dense'])
def test_form_is_compressed_as_dense(name):
  embeddings, grids, stored = answers(name)
  dense_embeddings, dense_grids, dense_stored = answers('dense')
  np.testing.assert_allclose(embeddings, dense_embeddings, atol=1e-6)
  assert grids.keys() == dense_grids.keys() and len(grids) == 6 * LAYERS + 3
  # up to the tolerance of the search, which meets the leaves in another order
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4),
    jax.tree.leaves(grids),
    jax.tree.leaves({key: dense_grids[key] for key in grids}),
  )
  assert stored == pytest.approx(dense_stored, rel=2e-3)
