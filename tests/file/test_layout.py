"""Loaded networks over a mesh, as the tree that they are loaded like."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from tests.helpers.opq_files import laplace, same_bits


def network():
  """Kernels, a tied one, a stack with slices, a vector, and a leaf that JAX would narrow."""
  kernel = laplace(16, 8)
  return {
    'kernel': kernel,
    'other': kernel.T.copy(),
    'stack': laplace(4, 8, 6, seed=1),
    'bias': laplace(8, seed=2),
    'wide': np.array([2**40, 3], np.int64),
  }


SPECS = {
  'kernel': P('x', 'y'),
  'other': P(None, ('x', 'y')),
  'stack': P('x'),
  'bias': P('y'),
  'wide': P(),
}


def shardings():
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def saved():
  params = network()
  allocation = opq_jax.allocate(
    params, compression_rate=10.0, slices=lambda name, leaf: int(name == 'stack')
  )
  state = opq_jax.init_state(params, allocation)
  return opq_jax.file.serialize(params, state)


def assert_laid_out(data, like):
  plain, plain_state = opq_jax.load(data)
  params, state = opq_jax.load(data, like=like)
  for name, sharding in shardings().items():
    assert same_bits(params[name], plain[name]), name
    if name == 'wide':
      assert isinstance(params[name], np.ndarray)
      continue
    assert params[name].sharding.is_equivalent_to(sharding, params[name].ndim), name
    record = state.tree[name]
    if record is None:
      continue
    assert record.kinds.sharding.is_equivalent_to(sharding, record.kinds.ndim)
    for leaf, expected in zip(
      jax.tree.leaves(record), jax.tree.leaves(plain_state.tree[name]), strict=True
    ):
      assert len(leaf.sharding.device_set) == 4 and same_bits(leaf, expected)
  return params, state


def test_load_like_arrays_of_mesh():
  like = {
    name: leaf if name == 'wide' else jax.device_put(leaf, shardings()[name])
    for name, leaf in network().items()
  }
  params, state = assert_laid_out(saved(), like)
  kernels = {name: params[name] for name in ('kernel', 'other', 'stack')}
  own = opq_jax.CompressionState({name: state.tree[name] for name in kernels})
  compressed = opq_jax.apply_compression(kernels, own)
  for name, leaf in compressed.items():
    assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
    assert same_bits(leaf, params[name])


def test_load_like_shapes_of_mesh():
  like = {
    name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=shardings()[name])
    for name, leaf in network().items()
  }
  assert_laid_out(saved(), like)


def test_load_like_other_arrays():
  """Arrays of one device, and of NumPy, leave the result on the host."""
  like = {name: jnp.zeros(leaf.shape) for name, leaf in network().items()}
  params, _ = opq_jax.load(saved(), like=like)
  assert all(isinstance(leaf, np.ndarray) for leaf in params.values())
