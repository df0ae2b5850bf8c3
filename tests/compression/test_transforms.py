"""Compression in a training loop of one's own; the docstring has Linen, NNX and plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import opq_jax
from opq_jax.compression import LeafState
from opq_jax.compression.transforms import clip_to_grid
from opq_jax.finetuning import parallel, training
from tests.helpers import small_networks


def loss_of(function):
  x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  return lambda params: jnp.mean(function(params, x) ** 2)


def forward(params, x):
  return jnp.tanh(x @ params['hidden']['kernel']) @ params['head']['kernel']


def test_compressed_equals_apply():
  variables, state = small_networks.compressed_network()
  params = variables['params']
  values = opq_jax.apply_compression(params, state)
  found = jax.value_and_grad(loss_of(opq_jax.compressed(forward, state)))(params)
  expected, slope = jax.value_and_grad(loss_of(forward))(values)
  assert float(found[0]) == float(expected)
  for layer in ('hidden', 'head'):
    mask = np.asarray(state.tree[layer]['kernel'].mask)
    gradient = np.asarray(found[1][layer]['kernel'])
    np.testing.assert_allclose(gradient, np.where(mask, slope[layer]['kernel'], 0), rtol=1e-5)
    assert (gradient[~mask] == 0).all()


def test_compressed_keeps_signature():
  _, state = small_networks.compressed_network()

  def scaled(params, x, *, factor):
    """Help."""
    return factor * forward(params, x)

  function = opq_jax.compressed(scaled, state)
  assert (function.__name__, function.__doc__) == ('scaled', 'Help.')
  params, x = small_networks.compressed_network()[0]['params'], np.ones((1, 24), np.float32)
  np.testing.assert_allclose(
    function(params, x, factor=3.0), 3 * function(params, x, factor=1.0), rtol=1e-6
  )


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    optax.adamw(1e-2, weight_decay=0.1),
    optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),  # moves everything
    optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
  ],
  ids=['sgd', 'adamw', 'noise', 'multi_steps'],
)
@pytest.mark.filterwarnings('default')  # of optax
def test_keep_compressed_keeps_zeros(optimizer):
  variables, state = small_networks.compressed_network()
  params = variables['params']
  optimizer = optax.chain(optimizer, opq_jax.keep_compressed(state))
  # the memory of a run without compression pulls at pruned weights
  memory = optimizer.init(params)

  @jax.jit
  def step(params, memory):
    gradient = jax.grad(loss_of(forward))(params)
    with jax.numpy_dtype_promotion('standard'):
      updates, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, updates), memory

  for _ in range(200):
    params, memory = step(params, memory)
  for layer in ('hidden', 'head'):
    mask, kernel = np.asarray(state.tree[layer]['kernel'].mask), np.asarray(params[layer]['kernel'])
    assert (kernel[~mask] == 0).all()
    assert (kernel[mask] != 0).any()
  small_networks.assert_compressed(params, state)


def test_keep_compressed_of_narrow_updates():
  weights = {'w': jax.random.laplace(jax.random.key(0), (64, 32))}
  state = opq_jax.init_state(weights, opq_jax.allocate(weights, compression_rate=16.0))
  keep = opq_jax.keep_compressed(state)
  updates = {'w': jnp.full((64, 32), 0.5, jnp.bfloat16)}
  kept, _ = keep.update(updates, keep.init(weights), weights)
  moved = optax.apply_updates(weights, kept)['w']
  np.testing.assert_array_equal(moved == 0, ~state.tree['w'].mask)


def test_keep_compressed_other_updates():
  variables, state = small_networks.compressed_network()
  params = variables['params']
  updates = jax.tree.map(jnp.ones_like, params)
  kept, _ = opq_jax.keep_compressed(state).update(updates, optax.EmptyState(), params)
  assert (kept['head']['bias'] == 1).all()
  mask = state.tree['head']['kernel'].mask
  expected = jnp.where(mask, 1.0, -params['head']['kernel'])
  np.testing.assert_array_equal(kept['head']['kernel'], expected)


def test_keep_compressed_in_train_step():
  _, state = small_networks.compressed_network()
  optimizer = optax.chain(optax.adam(1e-2), opq_jax.keep_compressed(state))
  step = parallel.pmap_train_step(small_networks.Network().apply, optimizer)
  train_state = parallel.replicate(small_networks.start(optimizer))
  replicated = parallel.replicate(state)
  for batch in small_networks.batches(3):
    train_state, _ = step(train_state, replicated, batch)
  mask = np.asarray(state.tree['hidden']['kernel'].mask)
  assert (np.asarray(train_state.params['hidden']['kernel'])[~mask] == 0).all()


def test_keep_compressed_under_nnx_optimizer():
  """`nnx.Optimizer` hands arrays on, where the state was made for variables."""
  model = nnx.Sequential(
    nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1))
  )
  params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=3.0))
  optimizer = nnx.Optimizer(
    model, optax.chain(optax.sgd(1e-2, 0.9), opq_jax.keep_compressed(state)), wrt=nnx.Param
  )
  inputs = jax.random.normal(jax.random.key(0), (8, 16))

  @nnx.jit
  def step(model, optimizer):
    loss = lambda model: jnp.mean((model(inputs) - 1) ** 2)
    optimizer.update(model, nnx.grad(loss)(model))

  with jax.numpy_dtype_promotion('standard'):
    for _ in range(3):
      step(model, optimizer)
  moved = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  for i in (0, 2):
    before = np.asarray(params['layers'][i]['kernel'][...])
    after = np.asarray(moved['layers'][i]['kernel'])
    # NNX has had several names for the value of a variable
    variable = state.tree['layers'][i]['kernel']
    is_state = lambda node: isinstance(node, LeafState)
    (record,) = jax.tree.leaves(variable, is_leaf=is_state)
    mask = np.asarray(record.mask)
    assert (after[~mask] == 0).all() and 0.2 < mask.mean() < 0.8
    assert (after[mask] != before[mask]).any()


def test_keep_compressed_errors():
  variables, state = small_networks.compressed_network()
  keep = opq_jax.keep_compressed(state)
  updates = jax.tree.map(jnp.ones_like, variables['params'])
  with pytest.raises(ValueError, match='params: found None'):
    keep.update(updates, keep.init(updates))
  with pytest.raises(ValueError, match='other structure'):
    keep.update({'params': updates}, keep.init(updates), {'params': variables['params']})
  turned = jax.tree.map(jnp.transpose, updates)
  with pytest.raises(ValueError, match=r'head/kernel: found shape \(5, 64\), expected \(64, 5\)'):
    keep.update(turned, keep.init(updates), jax.tree.map(jnp.transpose, variables['params']))


def test_clip_drops_outward_gradient():
  variables, state = small_networks.compressed_network()
  leaf = state.tree['head']['kernel']
  end = float(leaf.threshold) + int(leaf.levels) * float(leaf.step)
  # beyond, inside and at the very end; on either side
  weight = np.zeros((64, 5), np.float32)
  weight[:6, 0] = [2 * end, -2 * end, 0.99 * end, -0.99 * end, end, 2 * end]
  gradient = np.ones((64, 5), np.float32)
  gradient[:6, 0] = [-1, 1, -1, 1, -1, 1]
  params = variables['params'] | {'head': {'kernel': jnp.asarray(weight), 'bias': jnp.zeros(5)}}
  gradients = jax.tree.map(lambda leaf: -jnp.ones_like(leaf), params)
  gradients['head'] = {'kernel': jnp.asarray(gradient), 'bias': -jnp.ones(5)}
  clip = clip_to_grid(state)
  found, _ = clip.update(gradients, clip.init(params), params)
  assert found['head']['kernel'][:6, 0].tolist() == [0, 0, -1, 1, 0, 1]
  assert (found['head']['kernel'][6:] == 1).all()
  assert (found['head']['bias'] == -1).all()


def test_clip_in_train_step():
  variables, state = small_networks.compressed_network()
  [batch] = small_networks.batches(1)
  optimizer = optax.sgd(0.1)
  # at first the grid reaches the largest weight
  tripled = jax.tree.map(lambda leaf: 3 * leaf, variables['params'])
  start = training.init_train_state({**variables, 'params': tripled}, optimizer, jax.random.key(0))
  apply_fn = small_networks.Network().apply
  step = functools.partial(training.train_step, apply_fn=apply_fn, optimizer=optimizer)
  plain, clipped = (step(start, state, batch, clip_to_grid=on)[0] for on in (False, True))
  for layer in ('hidden', 'head'):
    leaf = state.tree[layer]['kernel']
    end = float(leaf.threshold) + int(leaf.levels) * float(leaf.step)
    before, free, kept = (
      np.abs(params[layer]['kernel']) for params in (tripled, plain.params, clipped.params)
    )
    dropped = (before >= end) & (free > before)
    assert dropped.any()
    np.testing.assert_array_equal(kept, np.where(dropped, before, free))


def test_clip_needs_params():
  variables, state = small_networks.compressed_network()
  clip = clip_to_grid(state)
  with pytest.raises(ValueError, match='params: found None'):
    clip.update(variables['params'], clip.init(variables['params']))
