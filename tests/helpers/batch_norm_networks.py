"""Small networks with BatchNorm, and their moments in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from opq_jax.core.trees import named_leaves

KEY = jax.random.key(0)
SHAPE = (32, 6)


class Network(nn.Module):
  """Two hidden layers of 5 with BatchNorm, and a head."""

  head: tuple
  momentum: float = 0.9
  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = False):
    for number in (1, 2):
      x = nn.Dense(5, dtype=self.dtype, name=f'hidden_{number}')(x).astype(jnp.float32)
      norm = nn.BatchNorm(not train, momentum=self.momentum, name=f'norm_{number}')
      x = nn.relu(norm(x)).astype(self.dtype)
    for layer in self.head:
      x = layer(x)
    return x


PLAIN = Network((nn.Dense(3),))  # one for all tests: compiled once


def network(head=None, **options):
  """A network, its variables, and these with rounded kernels; three outputs by default."""
  model = Network(head or (nn.Dense(3),), **options) if head or options else PLAIN
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros(SHAPE))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    positive = path[-1].key in ('scale', 'var')
    values = rng.uniform(0.5, 2, leaf.shape) if positive else rng.normal(size=leaf.shape)
    return values.astype(leaf.dtype)

  variables = jax.tree.map_with_path(draw, shapes)
  round_off = lambda leaf: np.round(leaf * 1.5) / np.float32(1.5) if leaf.ndim > 1 else leaf
  return model, variables, {**variables, 'params': jax.tree.map(round_off, variables['params'])}


def on(batch, apply_fn):
  """`apply_fn` on this batch instead of its own inputs."""
  return lambda variables, _, **options: apply_fn(variables, batch, **options)


def moments(variables, batch):
  """Mean and variance before every BatchNorm, and the mean output; numpy, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
  dense = lambda x, layer: x @ layer['kernel'] + layer.get('bias', 0)
  found, x = {}, np.asarray(batch, np.float64)
  for number in (1, 2):
    x = dense(x, params[f'hidden_{number}'])
    mean, var = x.mean(0), x.var(0)
    found[f'norm_{number}'] = mean, var
    norm = params[f'norm_{number}']
    x = (x - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
    x = np.maximum(x, 0)
  return found, dense(x, params['head_0']).mean(0)


def bias_changes(corrected, compressed):
  """The change of every parameter that the correction has changed."""
  before, after = named_leaves(compressed['params']), named_leaves(corrected['params'])
  changes = {name: np.asarray(after[name]) - np.asarray(before[name]) for name in before}
  return {name: change for name, change in changes.items() if change.any()}


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, tree, expected)
