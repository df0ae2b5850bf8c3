"""A network, its compression and batches that train in milliseconds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import opq_jax
from opq_jax.finetuning import training

CLASSES = 5
FEATURES = 24
SGD = optax.chain(
  optax.add_decayed_weights(1e-3, mask=training.kernels), optax.sgd(0.05, momentum=0.9)
)


class Network(nn.Module):
  """Two dense layers with BatchNorm between; over all devices if `axis_name` is theirs."""

  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Dense(64, dtype=self.dtype, name='hidden')(x)
    norm = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      axis_name=self.axis_name if train else None,
      dtype=jnp.float32,
      name='norm',
    )
    x = nn.relu(norm(x.astype(jnp.float32))).astype(self.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(CLASSES, dtype=self.dtype, name='head')(x).astype(jnp.float32)


def linear(variables, images, **_):
  """A network of one matrix."""
  return images @ variables['params']['w'], {}


@functools.cache
def compressed_network(rate=16.0):
  """Variables, and the compression state of their params."""
  variables = Network().init(jax.random.key(0), jnp.zeros((1, FEATURES)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (
      jnp.asarray(0.2 * rng.laplace(size=leaf.shape), leaf.dtype) if leaf.ndim > 1 else leaf
    ),
    variables['params'],
  )
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=rate))
  return {**variables, 'params': params}, state


def batches(count, size=32, seed=0):
  """Noise whose label is in its first features."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    label = rng.integers(0, CLASSES, size).astype(np.int32)
    image = rng.normal(size=(size, FEATURES)).astype(np.float32)
    image[np.arange(size), label] += 2
    yield {'image': image, 'label': label}


def start(optimizer, **options):
  return training.init_train_state(compressed_network()[0], optimizer, jax.random.key(1), **options)


def assert_same_bits(found, expected):
  """Whether two trees hold the same bits, keys of random numbers included."""

  def compare(x, y):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()

  jax.tree.map(compare, found, expected)


def assert_compressed(params, state):
  """Support is the mask, and every value is in the codebook of its leaf, or escaped."""
  values = opq_jax.apply_compression(params, state)
  is_record = lambda node: node is None or isinstance(node, opq_jax.compression.LeafState)

  def check(record, value):
    if record is None:
      return
    value, mask = np.asarray(value), np.asarray(record.mask)
    np.testing.assert_array_equal(value != 0, mask)
    assert (np.isin(value, np.asarray(record.codebook)) | np.asarray(record.escaped)).all()

  jax.tree.map(check, state.tree, values, is_leaf=is_record)
