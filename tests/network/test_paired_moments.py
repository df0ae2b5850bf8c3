"""Sums over what the stages of a block read, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.network.paired_moments import stage_sums, stages, sum_of_batches


def block(params, x, scale):
  h = x * scale + params['bias'][None]
  gated = jax.nn.silu(h @ params['gate']) * jnp.einsum('bi,oi->bo', h, params['up'])
  return x + gated @ params['down'] + x @ params['twice'] @ params['twice']


def draw(seed):
  rng = np.random.default_rng(seed)
  shapes = {'gate': (4, 6), 'up': (6, 4), 'down': (6, 4), 'twice': (4, 4), 'bias': (4,)}
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_stages_are_leaves_that_read_the_same_rows():
  found = stages(block, draw(0), jnp.ones((8, 4)), jnp.float32(2))
  # a leaf of two products, and one that is added, are in none
  assert [(stage.leaves, stage.inputs) for stage in found] == [
    (('gate', 'up'), ((0,), (1,))),
    (('down',), ((0,),)),
  ]


def test_stage_sums_of_both_networks():
  first, second = draw(0), draw(1)
  x, y = (np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32) for seed in (2, 3))
  scale = jnp.float32(0.5)
  down = stages(block, first, jnp.asarray(x), scale)[1]
  # two batches
  sums = sum_of_batches(
    stage_sums(block, down, first, second, x[part], y[part], (scale,))
    for part in (slice(4), slice(4, 8))
  )

  def read(params, x):
    params = {name: np.asarray(leaf) for name, leaf in params.items()}
    h = x * 0.5 + params['bias']
    gate = h @ params['gate']
    return gate / (1 + np.exp(-gate)) * (h @ params['up'].T)

  rows, others = read(first, x), read(second, y)
  np.testing.assert_allclose(sums.moments[0], others.T @ others, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(sums.cross_moments[0], others.T @ rows, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(sums.residual, others.T @ (x - y), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(sums.means().residual, others.T @ (x - y) / 8, rtol=1e-4, atol=1e-5)
  assert float(sums.rows) == 8
  np.testing.assert_allclose(sums.means().moments[0], others.T @ others / 8, rtol=1e-4, atol=1e-5)


def test_residual_of_any_layout():
  """Heads, a kernel outputs first, a bias and a reshape lie between the product and the sum."""

  def block(params, x):
    heads = jnp.tanh(x).reshape(-1, 2, 2)
    y = jnp.einsum('bhi,ohi->ob', heads, params['out']).T + params['bias'][None]
    return x.reshape(-1, 2, 2) + y.reshape(-1, 2, 2)

  rng = np.random.default_rng(0)
  params = {'out': rng.normal(size=(4, 2, 2)), 'bias': rng.normal(size=4)}
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
  x, y = rng.normal(size=(2, 8, 4)).astype(np.float32)
  (stage,) = stages(block, params, x)
  sums = stage_sums(block, stage, params, params, x, y)
  expected = np.einsum('bi,bo->oi', np.tanh(y), x - y).reshape(4, 2, 2)
  np.testing.assert_allclose(sums.residual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'block',
  [
    lambda params, x: x + jax.nn.relu(x @ params['w']),
    lambda params, x: x * (x @ params['w']),
    lambda params, x: x @ params['w'] + x @ params['w'],
    lambda params, x: x @ params['w'] + params['bias'][None],
  ],
  ids=['relu', 'product', 'twice', 'bias alone'],
)
def test_no_residual_where_outputs_are_not_added_to_hidden_states(block):
  params = {'w': jnp.ones((4, 4)), 'bias': jnp.ones(4)}
  x = jnp.ones((8, 4))
  for stage in stages(block, params, x):
    assert stage_sums(block, stage, params, params, x, 2 * x).residual is None
