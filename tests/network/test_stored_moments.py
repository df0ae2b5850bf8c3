"""Moments on disk: those in memory, matrix for matrix, and encoders read them alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import encoders
from opq_jax.network import InputMoments, StoredMatrix, mean_moments, second_moments

WIDTH = 12


def network(params, x):
  """Leaves of all kinds: of one input, stacked, of every step, looked up, of experts, a window."""

  def layer(x, kernels):
    x = jnp.tanh(x @ kernels['up'] + x @ params['every'])
    return x + jnp.tanh(x @ kernels['first'] + x @ kernels['second']), None

  x, _ = jax.lax.scan(layer, params['table'][x], params['stack'])
  x = jnp.einsum('ebi,eio->ebo', jnp.stack([x, -2 * x]), params['experts']).sum(0)
  x = x @ params['list'][0] + x @ params['list'][1]
  image = x.reshape(1, 8, 8, WIDTH)
  numbers = 'NHWC', 'HWIO', 'NHWC'
  return jax.lax.conv_general_dilated(
    image, params['window'], (1, 1), 'SAME', dimension_numbers=numbers
  )


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.laplace(size=shape) / 3, jnp.float32)
  square = WIDTH, WIDTH
  return {
    'table': draw(20, WIDTH),
    'stack': {name: draw(3, *square) for name in ('up', 'first', 'second')},
    'every': draw(*square),
    'experts': draw(2, *square),
    'list': [draw(*square), draw(*square)],
    'window': draw(3, 3, WIDTH, 8),
  }


def batches(count):
  return [jax.random.randint(jax.random.key(i), (64,), 0, 20) for i in range(count)]


def is_moments(node):
  return isinstance(node, InputMoments)


@pytest.mark.parametrize('count', [1, 2])
def test_moments_on_disk_are_those_in_memory(params, tmp_path, count):
  expected = mean_moments(network, params, batches(count))
  folder = tmp_path / 'new' / 'folder'
  for _ in range(2):  # over the files of an earlier call
    found = mean_moments(network, params, batches(count), folder=folder)
  assert jax.tree.structure(found, is_leaf=is_moments) == jax.tree.structure(
    expected, is_leaf=is_moments
  )
  pairs = zip(
    *(jax.tree.leaves(tree, is_leaf=is_moments) for tree in (found, expected)), strict=True
  )
  compared = 0
  for one, other in pairs:
    assert isinstance(one.matrix, StoredMatrix)
    assert (one.inputs, one.slices, one.matrix.shape) == (
      *(other.inputs, other.slices),
      other.matrix.shape,
    )
    matrix = np.asarray(other.matrix)
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(np.asarray(one.matrix), matrix, atol=1e-5 * scale)
    np.testing.assert_array_equal(one.matrix[0], np.asarray(one.matrix)[0])
    compared += 1
  assert compared == 8
  # leaves that read the same rows share a file
  stack = found['stack']
  assert stack['first'].matrix == stack['second'].matrix != stack['up'].matrix
  assert len(list(folder.iterdir())) == 6


def test_encoders_read_moments_from_disk(params, tmp_path):
  (inputs,) = batches(1)
  stored = second_moments(network, params, inputs, folder=tmp_path)
  in_memory = jax.tree.map(np.asarray, stored)
  allocation = opq_jax.allocate(
    params, bits_per_weight=3.0, usage=opq_jax.usage(network, params, inputs)
  )
  grids = opq_jax.init_state(params, allocation)
  for kind in (encoders.Feedback, encoders.Trellis):
    found, expected = (kind(moments).choose_codes(params, grids) for moments in (stored, in_memory))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert '<8 arrays>' in repr(encoders.Trellis(stored))


def test_moments_on_disk_name_nonfinite_matrix(params, tmp_path):
  (inputs,) = batches(1)
  stored = second_moments(network, params, inputs, folder=tmp_path)
  matrix = stored['stack']['up'].matrix
  np.load(matrix.path, mmap_mode='r+')[1, 0, 2, 3] = np.nan
  with pytest.raises(ValueError, match='stack/up: found NaN or infinite moments'):
    opq_jax.compress(params, compression_rate=8.0, encoder=encoders.Trellis(stored))


def test_mean_moments_want_batch(params, tmp_path):
  for folder in (None, tmp_path):
    with pytest.raises(ValueError, match='batches: found none'):
      mean_moments(network, params, [], folder=folder)
