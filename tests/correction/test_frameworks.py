"""Networks of NNX and Haiku, corrected as the same network of Linen is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opq_jax import correction
from opq_jax.network import second_moments

SHAPE, KEY = (128, 6), jax.random.key(3)


@pytest.fixture(autouse=True)
def promotion_of_frameworks():
  """Both libraries promote ranks and dtypes."""
  with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
    yield


class LinenNetwork(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Dense(8, name='dense')(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x)
    return nn.Dense(3, name='head')(nn.relu(x))


class NNXNetwork(nnx.Module):
  def __init__(self, rngs):
    self.dense, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.dense(x))))


def linen_variables():
  variables = LinenNetwork().init(jax.random.key(0), jnp.zeros(SHAPE))
  statistics = {'norm': {'mean': jnp.linspace(-1, 1, 8), 'var': jnp.linspace(0.5, 2, 8)}}
  return {'params': variables['params'], 'batch_stats': statistics}


def halved(params):
  """The same parameters with rough kernels."""
  return jax.tree.map(lambda leaf: jnp.round(2 * leaf) / 2 if leaf.ndim > 1 else leaf, params)


def corrected(functional):
  apply_fn, variables, _ = functional
  compressed = {**variables, 'params': halved(variables['params'])}
  return correction.correct_batch_norm(apply_fn, variables, compressed, KEY, SHAPE)


def as_linen():
  return correction.Functional(LinenNetwork().apply, linen_variables(), None)


def test_from_nnx_corrects_as_linen():
  functional = correction.from_nnx(NNXNetwork(nnx.Rngs(0)))
  # the names of both are the same
  functional = functional._replace(variables=linen_variables())
  found, expected = corrected(functional), corrected(as_linen())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
  x = jax.random.normal(KEY, SHAPE)
  restored = functional.restore(found)
  assert isinstance(restored, NNXNetwork)
  restored.eval()
  np.testing.assert_allclose(restored(x), functional.apply_fn(found, x), atol=1e-6)
  np.testing.assert_allclose(restored(x), LinenNetwork().apply(expected, x), atol=1e-4)
  # moments are taken on the statistics of the batch
  moments = [
    second_moments(fn, linen_variables(), x)['params']['head']['kernel'].matrix
    for fn in (functional.apply_fn, LinenNetwork().apply)
  ]
  np.testing.assert_allclose(*moments, atol=1e-4)


def test_from_haiku_corrects_as_linen():
  hk = pytest.importorskip('haiku')

  @hk.transform_with_state
  def network(x, is_training):
    x = hk.Linear(8, name='dense')(x)
    x = hk.BatchNorm(True, True, 0.9, eps=1e-5, name='norm')(x, is_training)
    return hk.Linear(3, name='head')(jax.nn.relu(x))

  params, state = network.init(KEY, jnp.zeros(SHAPE), True)
  linen = linen_variables()
  for name in ('dense', 'head'):
    layer = linen['params'][name]
    params[name] = {'w': layer['kernel'], 'b': layer['bias']}
  functional = correction.from_haiku(network.apply, params, state)
  statistics = {f'norm/{name}': leaf for name, leaf in linen['batch_stats']['norm'].items()}
  assert functional.variables['batch_stats'].keys() == statistics.keys()
  functional = functional._replace(variables={'params': params, 'batch_stats': statistics})
  found, expected = corrected(functional), corrected(as_linen())
  for name in ('mean', 'var'):
    np.testing.assert_allclose(
      found['batch_stats'][f'norm/{name}'].reshape(-1),
      expected['batch_stats']['norm'][name],
      atol=1e-5,
    )
  np.testing.assert_allclose(
    found['params']['head']['b'], expected['params']['head']['bias'], atol=1e-5
  )
  x = jax.random.normal(KEY, SHAPE)
  output, _ = network.apply(*functional.restore(found), None, x, False)
  np.testing.assert_allclose(output, LinenNetwork().apply(expected, x), atol=1e-4)
