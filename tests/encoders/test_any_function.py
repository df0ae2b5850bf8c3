"""Encoders on stacks, heads, experts and transposed kernels: as on the same matrices apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import encoders
from opq_jax.compression import CompressionState
from opq_jax.network import InputMoments, second_moments, usage

LAYERS, WIDTH = 3, 48


def scanned(stack, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def apart(layers, x):
  for w in layers:
    x = jnp.tanh(x @ w)
  return x


@pytest.fixture(scope='module')
def stack():
  keys = jax.random.split(jax.random.key(0), LAYERS)
  # layers of different scales, which one grid for all would not suit
  draw = lambda key, scale: scale * jax.random.laplace(key, (WIDTH, WIDTH))
  return jnp.stack([draw(key, scale) for key, scale in zip(keys, (0.02, 0.1, 0.5), strict=True)])


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(512, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)), jnp.float32)


@pytest.fixture(scope='module')
def moments(stack, inputs):
  """Of the stack, and the same matrices of the layers apart."""
  of_stack = second_moments(scanned, stack, inputs)
  return of_stack, [InputMoments(matrix, (0,)) for matrix in of_stack.matrix]


def of_kinds(moments, fn, inputs):
  feedback = encoders.Feedback(moments)
  return {
    'rounding': encoders.Rounding(),
    'feedback': feedback,
    'trellis': encoders.Trellis(),
    'trellis with feedback': encoders.Trellis(moments),
    'layer by layer': encoders.LayerByLayer(fn, inputs, first=feedback),
    'layer by layer along the trellis': encoders.LayerByLayer(
      fn, inputs, first=encoders.Trellis(moments)
    ),
  }


@pytest.mark.parametrize('kind', of_kinds(1, None, None))
def test_encoders_code_stack_as_layers(kind, stack, inputs, moments):
  of_stack, of_layers = moments
  slices = {'slices': lambda path, leaf: 1} if kind in ('rounding', 'trellis') else {}
  encoder = of_kinds(of_stack, scanned, inputs)[kind]
  found = opq_jax.compress(stack, compression_rate=10.0, encoder=encoder, **slices)
  encoder = of_kinds(of_layers, apart, inputs)[kind]
  expected = opq_jax.compress(list(stack), compression_rate=10.0, encoder=encoder)
  assert found.state.tree.slices == 1
  np.testing.assert_array_equal(found.params, np.stack(expected.params))
  codes = opq_jax.encode(found.params, found.state)
  apart_codes = opq_jax.encode(expected.params, expected.state)
  np.testing.assert_array_equal(codes, np.stack(apart_codes))
  data = opq_jax.file.serialize(found.params, found.state)
  np.testing.assert_array_equal(opq_jax.load(data)[0], found.params)


@pytest.mark.filterwarnings('ignore:one threshold for all prunes')
def test_encoders_need_slices_of_their_moments(stack, inputs, moments):
  grids = opq_jax.init_state(stack, opq_jax.allocate(stack, compression_rate=10.0))
  feedback = encoders.Feedback(moments[0])
  with pytest.raises(ValueError, match='found moments of 1 axes of slices and a grid of 0'):
    feedback.choose_codes(stack, grids)
  layer_by_layer = encoders.LayerByLayer(scanned, inputs, first=encoders.Rounding())
  with pytest.raises(ValueError, match='found a leaf of 1 axes of slices and a grid of 0'):
    layer_by_layer.choose_codes(stack, grids)


# kernel, inputs, and the same kernel as a matrix of inputs by outputs
LAYOUTS = {
  'outputs first': ('bi,oi->bo', (64, 48), (512, 48), lambda w: w.T),
  'to heads': ('bi,ihf->bhf', (48, 4, 16), (512, 48), lambda w: w.reshape(48, 64)),
  'from heads': ('bhf,hfo->bo', (4, 12, 64), (512, 4, 12), lambda w: w.reshape(48, 64)),
  'heads first': (
    'bi,hif->bhf',
    (4, 48, 16),
    (512, 48),
    lambda w: jnp.moveaxis(w, 0, 1).reshape(48, 64),
  ),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_encoders_follow_axes(layout, inputs):
  """The codes of a kernel do not depend on the order of its axes."""
  expression, shape, input_shape, as_matrix = LAYOUTS[layout]
  kernel = jax.random.laplace(jax.random.key(1), shape)
  network = lambda w, x: jnp.einsum(expression, x, w)
  x = inputs.reshape(input_shape)
  moments = second_moments(network, kernel, x)
  plain = second_moments(lambda w, x: x @ w, as_matrix(kernel), inputs)
  np.testing.assert_allclose(moments.matrix, plain.matrix, rtol=1e-5, atol=1e-2)
  # the very same matrix, since a rounding at the edge of a cell would be another code
  moments = InputMoments(plain.matrix, moments.inputs)
  state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=12.0))
  found = encoders.Feedback(moments).choose_codes(kernel, state).params
  grid = state.tree.replace(kinds=as_matrix(state.tree.kinds))
  rows = encoders.Feedback(plain).choose_codes(as_matrix(kernel), CompressionState(grid)).params
  np.testing.assert_array_equal(as_matrix(found), rows)

  # along the trellis too, in a file of the same payload; heads that are summed over are taps there
  found = encoders.Trellis(moments).choose_codes(kernel, state)
  rows = encoders.Trellis(plain).choose_codes(as_matrix(kernel), CompressionState(grid))
  if layout != 'from heads':
    np.testing.assert_array_equal(as_matrix(found.params), rows.params)
    of_file = lambda coded: opq_jax.OpqFile(opq_jax.file.serialize(*coded))
    assert of_file(found).payload_sizes('') == of_file(rows).payload_sizes('')
  error = lambda values: float(jnp.square(network(values - kernel, x)).sum())
  assert error(found.params) < 0.8 * error(opq_jax.apply_compression(kernel, state))


def convolution(layout):
  numbers = ('NHWC', layout, 'NHWC')
  return lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=numbers)


@pytest.mark.parametrize('kind', ['trellis with feedback', 'layer by layer along the trellis'])
def test_encoders_follow_axes_of_window(kind):
  """PyTorch's convolutions have the codes and the payload of Flax's."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(np.cumsum(rng.normal(size=(4, 6, 6, 8)), 1), jnp.float32)
  kernel = jnp.asarray(rng.laplace(size=(3, 3, 8, 24)), jnp.float32).at[1, 1, 0, 3].set(4e3)
  coded = {}
  for layout, order in (('HWIO', (0, 1, 2, 3)), ('OIHW', (3, 2, 0, 1))):
    weights, fn = (
      {'w': kernel.transpose(order)},
      lambda p, x, layout=layout: convolution(layout)(p['w'], x),
    )
    moments = second_moments(fn, weights, x)
    grids = opq_jax.init_state(
      weights, opq_jax.allocate(weights, bits_per_weight=3.0, usage=usage(fn, weights, x))
    )
    encoder = of_kinds(moments, fn, x)[kind]
    coded[layout] = encoder.choose_codes(weights, grids)
  one, other = (coded[layout].params['w'] for layout in ('HWIO', 'OIHW'))
  np.testing.assert_array_equal(one.transpose(3, 2, 0, 1), other)
  files = [opq_jax.file.serialize(*coded[layout]) for layout in ('HWIO', 'OIHW')]
  with opq_jax.OpqFile(files[0]) as first, opq_jax.OpqFile(files[1]) as second:
    (size,) = first.payload_sizes('w')
    assert second.payload_sizes('w') == (size,) and second.axes('w') == (2, 3, 1, 0)
  assert files[0][-size:] == files[1][-size:]


class LinenMlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (64, 56, 10):
      x = nn.Dense(width)(nn.relu(x))
    return x


def test_equinox_has_codes_of_linen(inputs):
  """The same network in both libraries: the same codes and payloads, up to the order of axes."""
  eqx = pytest.importorskip('equinox')
  variables = LinenMlp().init(jax.random.key(0), inputs)
  module = eqx.nn.MLP(WIDTH, 10, 64, 2, key=jax.random.key(0))
  layers = [variables['params'][f'Dense_{i}'] for i in range(3)]
  linears = [
    eqx.tree_at(lambda m: (m.weight, m.bias), linear, (layer['kernel'].T, layer['bias']))
    for linear, layer in zip(module.layers, layers, strict=True)
  ]
  arrays, static = eqx.partition(linears, eqx.is_array)

  def equinox(arrays, x):
    for linear in eqx.combine(arrays, static):
      x = jax.vmap(linear)(jax.nn.relu(x))
    return x

  def compressed(fn, params):
    moments = second_moments(fn, params, inputs)
    network = opq_jax.compress(
      params,
      compression_rate=10.0,
      encoder=encoders.Trellis(moments),
      usage=usage(fn, params, inputs),
    )
    return network, opq_jax.OpqFile(opq_jax.file.serialize(network.params, network.state))

  found, file = compressed(equinox, arrays)
  expected, other = compressed(LinenMlp().apply, variables)
  for i, linear in enumerate(found.params):
    name, twin = f'{i}/weight', f'params/Dense_{i}/kernel'
    np.testing.assert_array_equal(
      linear.weight.T, expected.params['params'][f'Dense_{i}']['kernel']
    )
    assert file.axes(name) == (1, 0) and other.axes(twin) == ()
    assert file.payload_sizes(name) == other.payload_sizes(twin)


def test_encoders_code_experts_apart(inputs):
  """Experts of one batched product are slices, as if each were a leaf of its own."""
  keys = jax.random.split(jax.random.key(2), 3)
  params = {
    'first': jax.random.laplace(keys[0], (WIDTH, WIDTH)) / 7,
    'experts': jax.random.laplace(keys[1], (4, WIDTH, 24))
    * jnp.array([0.1, 0.2, 0.4, 0.8])[:, None, None],
  }

  def together(params, x):
    tokens = jnp.tanh(x @ params['first']).reshape(4, -1, WIDTH)
    return jnp.einsum('eti,eio->eto', tokens, params['experts'])

  def apart(params, x):
    tokens = jnp.tanh(x @ params['first']).reshape(4, -1, WIDTH)
    return [t @ w for t, w in zip(tokens, params['experts'], strict=True)]

  assert usage(together, params, inputs)['experts'].slices == 1
  of_experts = {**params, 'experts': list(params['experts'])}
  found, expected = (
    opq_jax.compress(
      tree,
      compression_rate=10.0,
      encoder=encoders.LayerByLayer(
        fn, inputs, encoders.Feedback(second_moments(fn, tree, inputs))
      ),
    )
    for fn, tree in ((together, params), (apart, of_experts))
  )
  steps = [leaf.step for leaf in expected.state.tree['experts']]
  np.testing.assert_allclose(found.state.tree['experts'].step, steps, rtol=1e-6)
  same = found.params['experts'] == jnp.stack(expected.params['experts'])
  assert float(same.mean()) > 0.995  # products of other shapes round otherwise
