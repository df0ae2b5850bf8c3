"""Checks on eight devices, each by its name: prints what failed, as JSON.

python -m tests.helpers.many_devices        (tests/allocation/test_sharding.py runs it)
"""

import functools
import json
import math
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from opq_jax.allocation import counts, shards, statistics
from opq_jax.allocation.bins import BINS, FINE_BINS
from opq_jax.compression import bits_per_weight
from opq_jax.finetuning import parallel, training
from tests.helpers import frameworks, support_cells
from tests.helpers.meshes import lies_alike

SPECS = {
  'a/kernel': P('data', 'model'),
  'b/kernel': P(None, 'model'),
  'c/kernel': P(('model', 'data')),
  'd/kernel': P('model', None, 'data'),
  'e/kernel': P(),
  'a/bias': P('model'),
}
SHAPES = {
  'a/kernel': (768, 1024),
  'b/kernel': (256, 512),
  'c/kernel': (640, 48),
  'd/kernel': (12, 40, 36),
  'e/kernel': (64, 40),
  'a/bias': (1024,),
}
TARGETS = [{'compression_rate': 14.0}, {'sparsity': 0.7, 'bits': 3.0}]


@functools.cache
def mesh(data=2, model=4, kind=AxisType.Auto):
  return jax.make_mesh((data, model), ('data', 'model'), axis_types=(kind, kind))


def lay(tree, specs, where):
  return {name: jax.device_put(w, NamedSharding(where, specs[name])) for name, w in tree.items()}


@functools.cache
def plain():
  rng = np.random.default_rng(0)
  return {
    name: (rng.laplace(size=s) * np.exp(0.4 * rng.normal(size=s[-1]))).astype(np.float32)
    for name, s in SHAPES.items()
  }


@functools.cache
def laid(kind=AxisType.Auto):
  return lay(plain(), SPECS, mesh(kind=kind))


def largest_moved(compiled, kinds='all-gather|all-to-all|collective-permute|all-reduce'):
  """Elements of the largest array that any such collective of a program makes."""
  found = [0]
  for line in compiled.as_text().splitlines():
    match = re.search(rf'= (.*?) (?:{kinds})(?:-start)?\(', line)
    if match:
      shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
      found += [math.prod(int(n) for n in s.split(',') if n) for s in shapes]
  return max(found)


def same(one, other, rtol):
  for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def statistics_are_those_of_one_device():
  for name, leaf in laid().items():
    # of three axes also channels on two of them, of which the mesh cuts one, or both
    for axis in (0, leaf.ndim - 1, *[(1, 2), (0, 2)] * (leaf.ndim > 2)):
      for histogram in (True, False) if axis else (True,):
        found = opq_jax.allocation.leaf_statistics(leaf, axis, histogram=histogram)
        expected = opq_jax.allocation.leaf_statistics(plain()[name], axis, histogram=histogram)
        np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-6)
        np.testing.assert_array_equal(found.maximum, expected.maximum)
        if histogram:
          np.testing.assert_array_equal(found.histogram, expected.histogram)
        if expected.leading is not None:
          np.testing.assert_array_equal(found.leading, expected.leading)
      count = counts.per_channel_count(leaf, np.float32(0.8), axis)
      expected = counts.per_channel_count(plain()[name], np.float32(0.8), axis)
      np.testing.assert_array_equal(count, expected)


def statistics_gather_nothing():
  leaf = laid()['a/kernel']
  shard = leaf.size // 8
  layout = shards.placement_of(leaf)
  for axis in (0, 1):
    compiled = statistics._leaf_statistics.lower(leaf, None, axis, True, layout).compile()
    assert 0 < largest_moved(compiled) <= 2 * BINS
    compiled = counts._per_channel_count.lower(leaf, np.float32(1), axis, layout).compile()
    assert 0 < largest_moved(compiled) <= 1024
  where = np.float32(9), np.int32(3)
  compiled = counts._fine_histogram.lower(leaf, where, layout).compile()
  assert 0 < largest_moved(compiled) <= FINE_BINS < shard


def allocation_is_that_of_one_device():
  for targets in TARGETS:
    for corrected in (True, False):
      found = opq_jax.allocate(laid(), corrected=corrected, **targets)
      expected = opq_jax.allocate(plain(), corrected=corrected, **targets)
      # the least cost at a width is flat: rounding moves where it lies, and not what it is
      same(found, expected, 5e-3 if 'bits' in targets else 1e-3)
      np.testing.assert_allclose(balanced_error(found), balanced_error(expected), rtol=5e-4)


def balanced_error(allocation):
  """What the allocation has made as small as it could."""
  leaves = [(plain()[k], leaf) for k, leaf in allocation.tree.items() if leaf is not None]
  return sum(float(leaf.error) * np.linalg.norm(weights) for weights, leaf in leaves)


def a_traced_allocation_gathers_nothing():
  for targets, kind in zip(TARGETS, (AxisType.Auto, AxisType.Explicit), strict=True):
    tree = {name: laid(kind)[name] for name in ('a/kernel', 'b/kernel')}
    call = jax.jit(functools.partial(opq_jax.allocate, **targets))
    compiled = call.lower(tree).compile()
    assert 0 < largest_moved(compiled) <= 2 * BINS < tree['b/kernel'].size // 4
    same(compiled(tree), opq_jax.allocate(tree, **targets), 2e-3)


def explicit_axes_are_as_good_as_others():
  tree = laid(AxisType.Explicit)
  state = opq_jax.init_state(tree, opq_jax.allocate(tree, compression_rate=14.0))
  values = opq_jax.apply_compression(tree, state)
  lies_alike(values, tree)
  decoded = opq_jax.decode(opq_jax.encode(tree, state), state)
  jax.tree.map(np.testing.assert_array_equal, decoded, values)


def states_and_values_lie_as_the_weights_do():
  allocation = opq_jax.allocate(plain(), compression_rate=14.0)
  state = opq_jax.init_state(laid(), allocation)
  expected = opq_jax.init_state(plain(), allocation)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  for name, record in state.tree.items():
    if record is not None:
      lies_alike(record.mask, laid()[name])
      assert record.codebook.sharding.is_fully_replicated
      assert len(record.codebook.sharding.device_set) == 8
  values = opq_jax.apply_compression(laid(), state)
  lies_alike(values, laid())
  jax.tree.map(np.testing.assert_array_equal, values, opq_jax.apply_compression(plain(), expected))
  codes = opq_jax.encode(laid(), state)
  lies_alike(codes, laid())
  lies_alike(opq_jax.decode(codes, state), laid())
  found, bits = (bits_per_weight(*x) for x in ((laid(), state), (plain(), expected)))
  np.testing.assert_allclose(found, bits, rtol=1e-5)
  gradient = jax.grad(
    lambda p: sum(jnp.sum(leaf) for leaf in opq_jax.apply_compression(p, state).values())
  )
  for call, arguments in (
    (jax.jit(opq_jax.init_state), (laid(), allocation)),
    (opq_jax.apply_compression, (laid(), state)),
    (jax.jit(gradient), (laid(),)),
    (opq_jax.encode, (laid(), state)),
    (jax.jit(opq_jax.decode), (codes, state)),
  ):
    # nothing crosses between devices at all
    assert largest_moved(call.lower(*arguments).compile()) == 0


def escaped_weights_are_those_of_one_device():
  params = {name: leaf.copy() for name, leaf in plain().items()}
  params['a/kernel'][[3, 700], [5, 900]] = 4000, -3000
  params['d/kernel'][7, 39, 2] = 900
  over_mesh = lay(params, SPECS, mesh())
  allocation = opq_jax.allocate(params, compression_rate=8.0)
  same(opq_jax.allocate(over_mesh, compression_rate=8.0), allocation, 1e-3)
  state, expected = (opq_jax.init_state(tree, allocation) for tree in (over_mesh, params))
  assert state.tree['a/kernel'].escaped[np.array([3, 700]), np.array([5, 900])].all()
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  lies_alike(state.tree['a/kernel'].kinds, over_mesh['a/kernel'])
  values = opq_jax.apply_compression(over_mesh, state)
  lies_alike(values, over_mesh)
  decoded = opq_jax.decode(opq_jax.encode(over_mesh, state), state, over_mesh)
  jax.tree.map(np.testing.assert_array_equal, decoded, values)
  assert values['a/kernel'][3, 5] == 4000 and values['d/kernel'][7, 39, 2] == 900


@functools.cache
def stacks():
  """Stacks of matrices: cut along the slices, along another axis, along both."""
  rng = np.random.default_rng(1)
  # as few parts and channels as `SHAPES` have: one program of the solver serves both trees
  shapes = {'layers': (4, 64, 96), 'experts': (4, 2, 48, 32), 'plain': (40, 64)}
  specs = {'layers': P('data', None, 'model'), 'experts': P('model', 'data'), 'plain': P('data')}
  params = {
    name: (rng.laplace(size=s) * rng.uniform(0.2, 3, (*s[:-2], 1, 1))).astype(np.float32)
    for name, s in shapes.items()
  }
  return params, lay(params, specs, mesh())


def axes_of_slices(path, leaf):
  return {'layers': 1, 'experts': 2, 'plain': 0}[path]


def slices_are_those_of_one_device():
  params, over_mesh = stacks()
  for targets in TARGETS:
    found, expected = (
      opq_jax.allocate(tree, slices=axes_of_slices, **targets) for tree in (over_mesh, params)
    )
    # steps of small matrices lie in a flat minimum; thresholds are counted
    same(found, expected, 3e-2 if 'bits' in targets else 1e-3)
    for x, y in zip(found.tree.values(), expected.tree.values(), strict=True):
      np.testing.assert_allclose(x.threshold, y.threshold, rtol=1e-3)
  state, one = (opq_jax.init_state(tree, expected) for tree in (over_mesh, params))
  jax.tree.map(np.testing.assert_array_equal, state, one)
  for name, record in state.tree.items():
    lies_alike(record.kinds, over_mesh[name])
    assert record.threshold.sharding.is_fully_replicated
  values = opq_jax.apply_compression(over_mesh, state)
  lies_alike(values, over_mesh)
  jax.tree.map(np.testing.assert_array_equal, values, opq_jax.apply_compression(params, one))
  codes = opq_jax.encode(over_mesh, state)
  lies_alike(codes, over_mesh)
  for call, arguments in (
    (jax.jit(opq_jax.init_state), (over_mesh, expected)),
    (opq_jax.apply_compression, (over_mesh, state)),
    (opq_jax.encode, (over_mesh, state)),
    (jax.jit(opq_jax.decode), (codes, state)),
  ):
    # nothing crosses between devices at all
    assert largest_moved(call.lower(*arguments).compile()) == 0
  data = opq_jax.file.serialize(over_mesh, state)
  assert data == opq_jax.file.serialize(params, one)


def slices_gather_nothing():
  params, over_mesh = stacks()
  for name in ('layers', 'experts'):
    leaf, slices = over_mesh[name], axes_of_slices(name, None)
    counted = math.prod(leaf.shape[:slices])
    layout = shards.placement_of(leaf)
    found = opq_jax.allocation.leaf_statistics(leaf, slices=slices)
    expected = opq_jax.allocation.leaf_statistics(params[name], slices=slices)
    same(found, expected, 2e-6)
    lowered = statistics._leaf_statistics.lower(leaf, None, -1, True, layout, slices)
    assert 0 < largest_moved(lowered.compile()) <= 2 * BINS * counted
    threshold = np.full(leaf.shape[:slices], 0.5, np.float32)
    count = counts.per_channel_count(leaf, threshold, -1)
    expected = counts.per_channel_count(params[name], threshold, -1)
    np.testing.assert_array_equal(count, expected)
    lowered = counts._per_channel_count.lower(leaf, threshold, -1, layout, slices)
    assert 0 < largest_moved(lowered.compile()) <= leaf.shape[-1] * counted


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(512, name='wide')(x))
    return nn.Dense(8, name='out')(x)


LAYOUT = {
  'wide': {'kernel': P(None, 'model'), 'bias': P('model')},
  'out': {'kernel': P('model', None), 'bias': P()},
}


def finetuning(where):
  """Three steps, on one device or over a mesh; the state that they made and the weights' own."""
  rng = np.random.default_rng(0)
  network = Network()
  variables = network.init(jax.random.key(0), np.zeros((1, 256), np.float32))
  optimizer = optax.sgd(0.1, momentum=0.9)
  if where is None:
    params = variables['params']
    step = jax.jit(
      functools.partial(training.train_step, apply_fn=network.apply, optimizer=optimizer)
    )
  else:
    params = jax.tree.map(
      lambda leaf, spec: jax.device_put(leaf, NamedSharding(where, spec)),
      variables['params'],
      LAYOUT,
    )
    step = parallel.sharded_train_step(where, network.apply, optimizer)
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.0))
  train_state = training.init_train_state({'params': params}, optimizer, jax.random.key(1))
  for _ in range(3):
    batch = {
      'image': rng.normal(size=(32, 256)).astype(np.float32),
      'label': rng.integers(0, 8, 32).astype(np.int32),
    }
    train_state, metrics = step(train_state, state, batch)
  return train_state, state, metrics, params, batch


def finetuning_is_that_of_one_device():
  found, state, metrics, params, batch = finetuning(mesh())
  expected, _, expected_metrics, *_ = finetuning(None)
  np.testing.assert_allclose(metrics['loss'], expected_metrics['loss'], rtol=1e-5)
  for x, y in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  lies_alike(found.params, params)
  trace = found.opt_state[0].trace
  lies_alike(trace, params)
  values = opq_jax.apply_compression(found.params, state)
  for layer in ('wide', 'out'):
    record = state.tree[layer]['kernel']
    np.testing.assert_array_equal(values[layer]['kernel'] != 0, record.mask)

  network, optimizer = Network(), optax.sgd(0.1, momentum=0.9)
  function = functools.partial(training.train_step, apply_fn=network.apply, optimizer=optimizer)
  rows = NamedSharding(mesh(), P('data'))
  batch = {name: jax.device_put(leaf, rows) for name, leaf in batch.items()}
  compiled = jax.jit(function).lower(found, state, batch).compile()
  kernel = params['out']['kernel'].size
  assert largest_moved(compiled, 'all-gather|all-to-all|collective-permute') < kernel // 4


def a_state_is_restored_into_another_mesh():
  state = opq_jax.init_state(laid(), opq_jax.allocate(laid(), compression_rate=14.0))
  other = lay(plain(), SPECS, mesh(4, 2))
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    opq_jax.init_state(other, opq_jax.allocate(other, compression_rate=14.0)),
  )
  with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f'{folder}/state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(f'{folder}/state', target)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  lies_alike(restored, target)
  jax.tree.map(
    np.testing.assert_array_equal,
    opq_jax.apply_compression(other, restored),
    opq_jax.apply_compression(laid(), state),
  )


CHECKS: dict[str, Callable[[], object]] = {
  check.__name__: check
  for check in (
    statistics_are_those_of_one_device,
    statistics_gather_nothing,
    allocation_is_that_of_one_device,
    a_traced_allocation_gathers_nothing,
    explicit_axes_are_as_good_as_others,
    states_and_values_lie_as_the_weights_do,
    escaped_weights_are_those_of_one_device,
    slices_are_those_of_one_device,
    slices_gather_nothing,
    finetuning_is_that_of_one_device,
    a_state_is_restored_into_another_mesh,
  )
}
# a column of the support matrix
CHECKS |= {
  f'{name} on a mesh': functools.partial(support_cells.cell, name, 'mesh of 8')
  for name in frameworks.NETWORKS
}


def main(names):
  jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_numpy_dtype_promotion', 'strict')
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  failed = {}
  for name, check in CHECKS.items():
    if names and name not in names:
      continue
    try:
      with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the Laplace density')
        check()
      failed[name] = ''
    except Exception:
      failed[name] = traceback.format_exc()
  print(json.dumps(failed))


if __name__ == '__main__':
  main(sys.argv[1:])
