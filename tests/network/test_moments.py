"""Second moments against windows that NumPy cuts out one by one."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax.models import layers as model_layers


def windows(images, size, strides, pads, dilation=1):
  """[places, rows, columns, channels] of padded images, in loops."""
  padded = np.pad(images, ((0, 0), pads, pads, (0, 0)))
  reach = (size - 1) * dilation + 1
  found = []
  for image in padded:
    for i in range(0, image.shape[0] - reach + 1, strides):
      for j in range(0, image.shape[1] - reach + 1, strides):
        found.append(image[i : i + reach : dilation, j : j + reach : dilation])
  return np.stack(found)


class Convolution(nn.Module):
  options: dict

  @nn.compact
  def __call__(self, x):
    return nn.Conv(4, name='conv', **self.options)(x)


@pytest.mark.parametrize(
  ('options', 'size', 'strides', 'pads', 'dilation', 'groups'),
  [
    ({'kernel_size': (3, 3)}, 3, 1, (1, 1), 1, 1),
    ({'kernel_size': (3, 3), 'padding': 1, 'strides': 2}, 3, 2, (1, 1), 1, 1),
    # TensorFlow's padding of an even side
    ({'kernel_size': (3, 3), 'padding': 'SAME', 'strides': 2}, 3, 2, (0, 1), 1, 1),
    ({'kernel_size': (3, 3), 'padding': 'VALID', 'kernel_dilation': 2}, 3, 1, (0, 0), 2, 1),
    ({'kernel_size': (3, 3), 'feature_group_count': 2}, 3, 1, (1, 1), 1, 2),
    ({'kernel_size': (3, 3), 'feature_group_count': 4, 'strides': 2}, 3, 2, (0, 1), 1, 4),
    ({'kernel_size': (5, 5), 'feature_group_count': 4}, 5, 1, (2, 2), 1, 4),
    ({'kernel_size': (1, 1), 'padding': [(0, 1), (0, 1)]}, 1, 1, (0, 1), 1, 1),
  ],
)
def test_moments_of_convolutions(options, size, strides, pads, dilation, groups):
  x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
  model = Convolution(options)
  variables = model.init(jax.random.key(0), x)
  found = opq_jax.network.second_moments(model.apply, variables, x)['params']['conv']
  assert found['bias'] is None
  seen = windows(x, size, strides, pads, dilation)
  # what is found fits the layer: its own output is the same weighted sum
  output = np.asarray(model.apply(variables, x)).reshape(-1, 4)
  assert len(seen) == len(output)
  kernel = np.asarray(variables['params']['conv']['kernel'])
  for group in range(groups):
    channels = slice(group * 4 // groups, (group + 1) * 4 // groups)
    rows = seen[..., channels].reshape(len(seen), -1)
    np.testing.assert_allclose(
      rows @ kernel[..., channels].reshape(rows.shape[1], -1), output[:, channels], atol=1e-5
    )
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(found['kernel'].matrix[group], expected, atol=1e-5)


class Separable(nn.Module):
  """The first two layers of MobileNets."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = lambda x, name: nn.BatchNorm(use_running_average=not train, name=name)(x)
    x = norm(nn.Conv(8, (3, 3), strides=2, use_bias=False, name='stem')(x), 'stem_bn')
    x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name='depthwise')(nn.relu6(x))
    return norm(x, 'depthwise_bn')


def test_moments_use_batch_statistics():
  x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  variables = Separable().init(jax.random.key(1), x)
  shifted = jax.tree.map(lambda leaf: leaf + 3, variables['batch_stats'])
  found = opq_jax.network.second_moments(
    Separable().apply, {**variables, 'batch_stats': shifted}, x
  )
  assert found['batch_stats']['stem_bn']['mean'] is None
  depthwise = found['params']['depthwise']['kernel'].matrix
  assert depthwise.shape == (8, 9, 9)
  # BatchNorm's output before the first ReLU6 has variance 1 and mean 0, whatever was stored
  energy = np.diagonal(depthwise, axis1=1, axis2=2)[:, 4]
  np.testing.assert_allclose(energy, 0.5, atol=0.1)


def convolved(options):
  def network(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, **options)

  return network


def layers(stack, x):
  return jax.lax.scan(lambda carry, pair: (carry, pair[0] @ pair[1]), 0, (x, stack))[1]


def indexed(stack, x):
  return jnp.stack([x[i] @ stack[i].astype(jnp.float32) for i in range(3)])


def recurrent(kernel, x):
  return jax.lax.scan(lambda carry, row: (carry, row @ kernel), 0, x)[1]


def in_a_while(kernel, x):
  step = lambda i, out: out.at[i].set(x[i] @ kernel)
  return jax.lax.while_loop(
    lambda state: state[0] < 3,
    lambda state: (state[0] + 1, step(state[0], state[1])),
    (0, jnp.zeros((3, 5, kernel.shape[1]))),
  )[1]


def in_a_branch(kernel, x):
  return jax.lax.cond(x.sum() > -1e9, lambda x: x @ kernel, lambda x: x @ kernel * 0, x)


def by_platform(kernel, x):
  rows = lambda x: sum(x[..., i : i + 1] * kernel[None, i : i + 1] for i in range(4))
  return jax.lax.platform_dependent(x, cpu=rows, default=lambda x: x @ kernel)


def shared(kernel, x):
  return jnp.stack([x[0] @ kernel, x[1] @ kernel, x[2] @ kernel])


# kernels [leaf shape], inputs, and how the leaf is seen: slices, inputs
PRODUCTS = {
  'dense': (lambda w, x: x @ w, (4, 6), (3, 5, 4), 0, (0,)),
  'transposed': (lambda w, x: x @ w.T, (6, 4), (3, 5, 4), 0, (1,)),
  'to heads': (lambda w, x: jnp.einsum('btd,dhf->bthf', x, w), (4, 2, 3), (3, 5, 4), 0, (0,)),
  'from heads': (
    lambda w, x: jnp.einsum('bthf,hfd->btd', x, w),
    (2, 3, 4),
    (3, 5, 2, 3),
    0,
    (0, 1),
  ),
  # the sum runs over the axes in another order than the leaf's
  'swapped': (lambda w, x: jnp.einsum('bfh,hfd->bd', x, w), (2, 3, 4), (5, 3, 2), 0, (0, 1)),
  'joined': (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4), (5, 6), 0, (0, 1)),
  'experts': (lambda w, x: jnp.einsum('btd,bdf->btf', x, w), (3, 4, 6), (3, 5, 4), 1, (1,)),
  'scan': (layers, (3, 4, 6), (3, 5, 4), 1, (1,)),
  'indexed': (indexed, (3, 4, 6), (3, 5, 4), 1, (1,)),
  'recurrent': (recurrent, (4, 6), (3, 5, 4), 0, (0,)),
  'while': (in_a_while, (4, 6), (3, 5, 4), 0, (0,)),
  'branch': (in_a_branch, (4, 6), (3, 5, 4), 0, (0,)),
  'platforms': (by_platform, (4, 6), (3, 5, 4), 0, (0,)),
  'shared': (shared, (4, 6), (3, 5, 4), 0, (0,)),
  'remat': (jax.checkpoint(lambda w, x: x @ w), (4, 6), (3, 5, 4), 0, (0,)),
  'concatenated': (
    lambda w, x: jnp.split(x @ jnp.concatenate([jnp.ones((4, 2)), w], axis=1), [2], axis=-1)[1],
    *((4, 6), (3, 5, 4), 0, (0,)),
  ),
  'PyTorch': (
    convolved(
      {'window_strides': (2,), 'padding': [(1, 1)], 'dimension_numbers': ('NCH', 'OIH', 'NCH')}
    ),
    *((6, 4, 3), (2, 4, 8), 0, (2, 1)),
  ),
  'stretched': (
    convolved(
      {
        'window_strides': (1, 1),
        'padding': [(2, 1), (-1, 2)],
        'lhs_dilation': (2, 3),
        'rhs_dilation': (1, 2),
        'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
      }
    ),
    *((3, 2, 4, 6), (2, 5, 4, 4), 0, (0, 1, 2)),
  ),
  'reversed': (
    lambda w, x: jax.lax.conv_general_dilated(
      x, w[::-1], (1,), 'SAME', dimension_numbers=('NHC', 'HIO', 'NHC')
    ),
    *((3, 4, 6), (2, 8, 4), 0, (0, 1)),
  ),
}


@pytest.mark.parametrize('name', PRODUCTS)
def test_moments_give_output_error(name):
  """The squared error of the output under other weights is tr(E^T H E), with E their error."""
  network, shape, input_shape, slices, inputs = PRODUCTS[name]
  rng = np.random.default_rng(0)
  kernel, error = rng.normal(size=(2, *shape)).astype(np.float32)
  x = jnp.asarray(rng.normal(size=input_shape), jnp.float32)
  kernel, error = jnp.asarray(kernel), jnp.asarray(error)
  found = opq_jax.network.second_moments(network, kernel, x)
  assert (found.slices, found.inputs) == (slices, inputs)
  outputs = [axis for axis in range(len(shape)) if axis >= slices and axis not in inputs]
  order = (*range(slices), *inputs, *outputs)
  width = int(np.prod([shape[axis] for axis in inputs]))
  rows = error.transpose(order).reshape(*shape[:slices], width, -1)
  matrix = np.asarray(found.matrix)[..., 0, :, :]
  change = np.asarray(network(kernel + error, x) - network(kernel, x), np.float64)
  predicted = np.einsum('...ko,...kl,...lo->...', rows, matrix, rows).sum()
  # the moments are means over the rows of one slice
  count = change.size / (rows.shape[-1] * int(np.prod(shape[:slices])))
  np.testing.assert_allclose(np.sum(np.square(change)), predicted * count, rtol=1e-5)


def test_moments_are_shared_by_readers():
  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.MultiHeadDotProductAttention(2, name='attention')(x, x)

  x = jnp.ones((2, 3, 4))
  variables = Attention().init(jax.random.key(0), x)
  found = opq_jax.network.second_moments(Attention().apply, variables, x)['params']['attention']
  query, key, value = (found[name]['kernel'].matrix for name in ('query', 'key', 'value'))
  assert query is key and key is value and found['out']['kernel'].matrix is not value
  batches = [x, 2 * x]
  mean = opq_jax.network.mean_moments(Attention().apply, variables, batches)
  np.testing.assert_allclose(
    mean['params']['attention']['key']['kernel'].matrix, 2.5 * key, rtol=1e-6
  )


def test_moments_none():
  def network(params, x, key):
    x = (
      x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
      + params['table'][jnp.array([0, 2])]
    )
    cut = x @ params['cut'][:3, :]
    by_index = jax.lax.fori_loop(0, 2, lambda i, x: x @ params['stack'][i], x)
    return cut, by_index, x @ (params['v'] / jnp.linalg.norm(params['v'])), x @ params['kernel']

  names = ('cut', 'kernel', 'stack', 'table', 'v')
  shapes = ((4, 3), (3, 3), (2, 3, 3), (4, 3), (3, 3))
  params = {name: jnp.ones(shape) for name, shape in zip(names, shapes, strict=True)}
  # a table that is looked up needs none; of the others a warning says so
  with pytest.warns(UserWarning, match=r'^cut, stack, v: found leaves that are multiplied behind'):
    found = opq_jax.network.second_moments(network, params, jnp.ones((2, 3)), jax.random.key(0))
  assert [name for name in names if found[name] is not None] == ['kernel']
  # dropout's key is an input as any other, and rows are twice what they were, or 0
  values = np.unique(np.asarray(found['kernel'].matrix))
  assert values.min() >= 1 and values.max() <= 4


def test_moments_need_a_batch_mode():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, mode='eval'):
      return nn.BatchNorm(use_running_average=mode == 'eval')(nn.Dense(2)(x))

  x = jnp.ones((2, 3))
  variables = Network().init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r'Network: found batch_stats and a call without any of'):
    opq_jax.network.second_moments(Network().apply, variables, x)
  train = lambda variables, x: Network().apply(variables, x, 'train', mutable=['batch_stats'])
  assert opq_jax.network.second_moments(train, variables, x)['params']['Dense_0']['kernel']


def test_moments_of_depthwise_layers_of_models():
  """`models` computes them otherwise on the CPU; the moments are those of the convolution."""
  options = {'feature_group_count': 4, 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
  written = lambda kernel, x: model_layers.depthwise_conv(x, kernel, (2, 2), 'SAME', **options)
  plain = lambda kernel, x: jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', **options)
  kernel = jnp.ones((3, 3, 1, 4))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 4)), jnp.float32)
  found, expected = (opq_jax.network.second_moments(fn, kernel, x) for fn in (written, plain))
  assert found.inputs == expected.inputs == (0, 1, 2)
  np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-5)


@pytest.mark.parametrize('is_on_disk', [False, True])
def test_moments_name_leaves_of_branches_that_are_not_taken(is_on_disk, tmp_path):
  def network(params, x):
    taken = lambda x: x @ params['taken']
    return jax.lax.cond(x.sum() > 1e9, lambda x: x @ params['other'], taken, x)

  params = {'other': jnp.ones((4, 6)), 'taken': jnp.ones((4, 6))}
  options = {'folder': tmp_path} if is_on_disk else {}
  with pytest.warns(UserWarning, match='^other: found leaves, or slices of them, that no input'):
    found = opq_jax.network.second_moments(network, params, jnp.ones((3, 4)), **options)
  assert np.all(np.asarray(found['other'].matrix) == 0)
  assert np.all(np.asarray(found['taken'].matrix) == 1)


@pytest.mark.parametrize('sign', [1, -1])
def test_moments_in_branches_are_those_of_the_branch_that_is_taken(sign):
  """The same rows are read before a branch, in it, and in the other one."""

  def network(params, x):
    before = x @ params['before']
    first, second = (lambda x, name=name: x @ params[name] for name in ('first', 'second'))
    both = lambda x: first(x) + second(x)
    return before + jax.lax.cond(sign * x.sum() > 0, both, first, x)

  params = {name: jnp.ones((4, 6)) for name in ('before', 'first', 'second')}
  x = jnp.asarray(np.random.default_rng(0).random((5, 4)), jnp.float32)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    found = opq_jax.network.second_moments(network, params, x)
  expected = np.asarray(x.T @ x / 5)
  for name in params:
    is_read = name != 'second' or sign > 0
    np.testing.assert_allclose(found[name].matrix[0], expected * is_read, rtol=1e-5)


def test_moments_of_two_scans_over_the_same_rows():
  def network(params, x):
    layers = lambda stack: jax.lax.scan(lambda _, kernel: (0, x @ kernel), 0, stack)[1].sum(0)
    return layers(params['three']) + layers(params['two'])

  params = {'three': jnp.ones((3, 4, 6)), 'two': jnp.ones((2, 4, 6))}
  found = opq_jax.network.second_moments(network, params, jnp.ones((5, 4)))
  assert {name: moments.matrix.shape for name, moments in found.items()} == {
    'three': (3, 1, 4, 4),
    'two': (2, 1, 4, 4),
  }
