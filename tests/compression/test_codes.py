"""What compressed weights are, and what they stay while an optimizer works on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opq_jax import Allocation, allocate, apply_compression, decode, encode, init_state
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.records import affine_codebook

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def tree(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(0.1 * rng.laplace(size=shape), dtype)
  return {'a': {'kernel': draw(96, 64), 'bias': draw(64)}, 'b': {'kernel': draw(3, 3, 16, 40)}}


@functools.cache
def compressed(dtype, rate=12.0):
  params = tree(dtype)
  allocation = allocate(params, compression_rate=rate)
  return params, allocation, init_state(params, allocation)


def records(state):
  return {'a': state.tree['a']['kernel'], 'b': state.tree['b']['kernel']}


def kernels(params):
  return {'a': params['a']['kernel'], 'b': params['b']['kernel']}


def assert_same_bits(x, y):
  assert x.dtype == y.dtype
  assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_invariants(params, state):
  """Support is the mask, values are in the codebook, and codes say which."""
  values, codes = kernels(apply_compression(params, state)), kernels(encode(params, state))
  for name, leaf in records(state).items():
    np.testing.assert_array_equal(np.asarray(values[name]) != 0, leaf.mask)
    assert codes[name].dtype == jnp.int8
    looked_up = np.asarray(leaf.codebook)[np.asarray(codes[name], int)]
    assert_same_bits(values[name], jnp.asarray(looked_up).astype(leaf.dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_values_are_codebook_at_codes(dtype):
  params, _, state = compressed(dtype)
  assert_invariants(params, state)
  values = apply_compression(params, state)
  assert values['a']['bias'] is params['a']['bias'] or bool(
    (values['a']['bias'] == params['a']['bias']).all()
  )
  jax.tree.map(assert_same_bits, decode(encode(params, state), state), values)
  jax.tree.map(assert_same_bits, apply_compression(values, state), values)
  jax.tree.map(assert_same_bits, params, tree(dtype))


def test_init_state_at_edges():
  params = {'w': jnp.array([[0.5, -0.5, 0.501, -0.501], [0.99, -1.01, 9.0, -9.0]])}
  leaf = allocate(params, sparsity=0.25, bits=2.0).tree['w']
  leaf = leaf.replace(
    threshold=jnp.float32(0.5), step=jnp.float32(0.5), offset=jnp.float32(0.25), levels=jnp.int32(3)
  )
  state = init_state(params, Allocation({'w': leaf}))
  codes = np.asarray(encode(params, state)['w'])
  np.testing.assert_array_equal(codes, [[0, 0, 1, -1], [1, -2, -128, -128]])
  expected = [[0, 0, 0.75, -0.75], [0.75, -1.25, 9.0, -9.0]]
  np.testing.assert_array_equal(apply_compression(params, state)['w'], expected)
  np.testing.assert_array_equal(decode({'w': codes}, state, params)['w'], expected)
  with pytest.raises(ValueError, match='w: found escaped weights and no params'):
    decode({'w': codes}, state)
  # escaped weights are trained as they are, at places that do not change; the others are clipped
  trained = {'w': params['w'] + jnp.array([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, -5.0, 1.0]])}
  expected = [[0, 0, 0.75, -0.75], [1.75, -1.25, 4.0, -8.0]]
  np.testing.assert_array_equal(apply_compression(trained, state)['w'], expected)
  gradient = jax.grad(lambda p: apply_compression(p, state)['w'].sum())(trained)['w']
  np.testing.assert_array_equal(gradient, [[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize('levels', [0, 1, 2, 127])
def test_decode_every_code(levels):
  codes = jnp.arange(-127, 128, dtype=jnp.int8)
  leaf = LeafState(
    kinds=(codes != 0).astype(np.uint8),
    codebook=affine_codebook(jnp.float32(0.75), jnp.float32(0.5), jnp.int32(levels)),
    threshold=jnp.float32(0.5),
    step=jnp.float32(0.5),
    levels=jnp.int32(levels),
    dtype=jnp.dtype(jnp.float32),
  )
  # beyond the last level too, where no weight has a code
  assert_same_bits(decode(codes, CompressionState(leaf)), leaf.codebook[codes.astype(jnp.int32)])


@pytest.mark.parametrize('dtype', DTYPES)
def test_apply_gradient(dtype):
  params, _, state = compressed(dtype)
  away = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype), params
  )
  function = functools.partial(apply_compression, state=state)
  _, pull = jax.vjp(function, params)
  for found in (jax.jvp(function, (params,), (away,))[1], pull(away)[0]):
    assert_same_bits(found['a']['bias'], away['a']['bias'])
    for name, leaf in records(state).items():
      expected = jnp.where(leaf.mask, kernels(away)[name], jnp.zeros((), dtype))
      np.testing.assert_array_equal(kernels(found)[name], expected)


def test_apply_in_vmap_and_scan():
  params, _, state = compressed(jnp.float32)
  two = jax.tree.map(lambda x: jnp.stack([x, -x]), params)
  together = jax.vmap(apply_compression, (0, None))(two, state)
  one_by_one = jax.lax.scan(lambda c, p: (c, apply_compression(p, state)), 0, two)[1]
  for k in range(2):
    alone = apply_compression(jax.tree.map(lambda x, k=k: x[k], two), state)
    for many in (together, one_by_one):
      jax.tree.map(assert_same_bits, jax.tree.map(lambda x, k=k: x[k], many), alone)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'optimizer',
  [
    optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.3, momentum=0.9)),
    optax.adamw(1e-2, weight_decay=0.1),
  ],
  ids=['sgd', 'adamw'],
)
def test_apply_invariants_in_training(optimizer, dtype):
  params, _, state = compressed(dtype)
  before = jax.device_get(state)
  targets = jax.tree.map(
    lambda x: jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params
  )

  def loss(params):
    values = apply_compression(params, state)
    off = jax.tree.map(lambda v, t: jnp.sum((v.astype(jnp.float32) - t) ** 2), values, targets)
    return sum(jax.tree.leaves(off))

  @jax.jit
  def step(params, memory):
    gradient = jax.grad(loss)(params)
    with jax.numpy_dtype_promotion('standard'):  # optax's bias correction mixes int and float
      updates, memory = optimizer.update(gradient, memory, params)
      return optax.apply_updates(params, updates), memory

  memory, first = optimizer.init(params), loss(params)
  for _ in range(10):
    params, memory = step(params, memory)
    assert_invariants(params, state)
  assert loss(params) < first or dtype != jnp.float32
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_apply_error_as_predicted():
  params, allocation, state = compressed(jnp.float32)
  values, codes = apply_compression(params, state), encode(params, state)
  for part in 'ab':
    weights, value = (np.asarray(x[part]['kernel'], float) for x in (params, values))
    leaf = allocation.tree[part]['kernel']
    _, counts = np.unique(codes[part]['kernel'], return_counts=True)
    share = counts / counts.sum()
    assert float(leaf.entropy) == pytest.approx(-np.sum(share * np.log2(share)), rel=0.01)
    assert float(leaf.error) == pytest.approx(
      np.sum((weights - value) ** 2) / np.sum(weights**2), rel=0.02
    )
    assert float(leaf.sparsity) == pytest.approx(np.mean(value == 0), abs=0.005)


def test_apply_on_four_devices():
  assert jax.device_count() == 4
  params, allocation, state = compressed(jnp.float32)
  mesh = Mesh(np.array(jax.devices()), 'x')
  spread = jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), 'x'))), params
  )
  again = allocate(spread, compression_rate=12.0)
  for one, many in zip(jax.tree.leaves(allocation), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(one, many, rtol=1e-4)
  # the same state on one device and on four
  jax.tree.map(assert_same_bits, apply_compression(spread, state), apply_compression(params, state))


def test_apply_refuses_other_trees():
  params, _, state = compressed(jnp.float32)
  kernel = params['a']['kernel']
  others = [
    ({**params, 'a': {'kernel': kernel}}, 'a/bias'),
    ({**params, 'c': kernel}, 'c'),
    ({**params, 'a': {**params['a'], 'kernel': kernel.T}}, r'a/kernel: found.*expected'),
    (jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), r'a/kernel: found.*expected'),
  ]
  for other, message in others:
    for function in (apply_compression, encode):
      with pytest.raises(ValueError, match=message):
        function(other, state)
  assert isinstance(state.tree['a']['kernel'], LeafState)
