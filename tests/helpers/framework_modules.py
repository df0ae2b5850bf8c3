"""Small networks of several frameworks that read 8 x 8 images: CNNs and transformers.

Modules of one name in different frameworks compute the same function.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

WIDTH, HEADS, LAYERS, EXPERTS, CAPACITY = 32, 4, 2, 4, 3
CLASSES = 10


class Cnn(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
    x = nn.relu(norm('norm_0')(nn.Conv(16, (3, 3), name='conv_0')(x[..., None])))
    x = nn.relu(norm('norm_1')(nn.Conv(32, (3, 3), strides=2, name='conv_1')(x)))
    return nn.Dense(CLASSES, name='head')(x.reshape(x.shape[0], -1))


class NnxCnn(nnx.Module):
  def __init__(self, rngs):
    self.conv_0 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
    self.norm_0 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.conv_1 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
    self.norm_1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(512, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm_0(self.conv_0(x[..., None])))
    x = nnx.relu(self.norm_1(self.conv_1(x)))
    return self.head(x.reshape(x.shape[0], -1))


class Experts(nn.Module):
  """Sends each token to one of the experts, which take `CAPACITY` tokens of an image each."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal(batch_axis=0)
    first = self.param('first', init, (EXPERTS, WIDTH, 2 * WIDTH))
    second = self.param('second', init, (EXPERTS, 2 * WIDTH, WIDTH))
    gates = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name='router')(x))
    chosen = jax.nn.one_hot(jnp.argmax(gates, -1), EXPERTS)
    # tokens that an expert has no place for pass by
    places = jnp.where(chosen > 0, jnp.cumsum(chosen, 1) - 1, -1).astype(jnp.int32)
    sent = jax.nn.one_hot(places, CAPACITY)
    hidden = nn.gelu(jnp.einsum('btec,btd,edf->becf', sent, x, first))
    weighted = sent * (chosen * gates)[..., None]
    return jnp.einsum('btec,becf,efd->btd', weighted, hidden, second)


class Block(nn.Module):
  experts: bool = False

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm(name='norm_0')(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS, name='attention')(h, h)
    h = nn.LayerNorm(name='norm_1')(x)
    if self.experts:
      return x + Experts(name='experts')(h), None
    h = nn.gelu(nn.Dense(2 * WIDTH, name='up')(h))
    return x + nn.Dense(WIDTH, name='down')(h), None


class Transformer(nn.Module):
  """Reads an image as eight tokens, its rows."""

  kind: str = 'apart'

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(WIDTH, name='embed')(x)
    x = x + self.param('position', nn.initializers.normal(0.1), (8, WIDTH))
    match self.kind:
      case 'apart':
        for layer in range(LAYERS):
          x, _ = Block(name=f'block_{layer}')(x)
      case 'scan':
        axes = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
        x, _ = nn.scan(nn.remat(Block), length=LAYERS, **axes)(name='blocks')(x, None)
      case 'experts':
        x, _ = Block(experts=True, name='block')(x)
    return nn.Dense(CLASSES, name='head')(nn.LayerNorm(name='norm')(x).mean(1))


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm_0, self.norm_1 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
    self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm_0(x))
    return x + self.down(nnx.gelu(self.up(self.norm_1(x))))


class NnxTransformer(nnx.Module):
  def __init__(self, rngs):
    make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
    self.blocks = make(rngs.split(LAYERS))
    self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
    self.position = nnx.Param(jnp.zeros((8, WIDTH)))
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x):
    run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    x = run(self.embed(x) + self.position[...], self.blocks)
    return self.head(self.norm(x).mean(1))


def plain(params, x):
  x = x.reshape(x.shape[0], 64)
  for name in ('hidden_0', 'hidden_1'):
    x = jax.nn.relu(x @ params[name]['w'] + params[name]['b'])
  # outputs first, as a table that is read in both directions has them
  return jnp.einsum('bi,oi->bo', x, params['head']['w']) + params['head']['b']


def equinox_transformer():
  """The transformer of Equinox, which is of the extra `test`."""
  import equinox as eqx

  biases = {f'use_{name}_bias': True for name in ('query', 'key', 'value', 'output')}

  class Block(eqx.Module):
    norm_0: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm_1: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
      self.norm_0, self.norm_1 = (eqx.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
      self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key, **biases)
      self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=key)
      self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=key)

    def __call__(self, x):
      h = jax.vmap(self.norm_0)(x)
      x = x + self.attention(h, h, h)
      hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm_1)(x)))
      return x + jax.vmap(self.down)(hidden)

  class Transformer(eqx.Module):
    embed: eqx.nn.Linear
    position: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
      self.embed = eqx.nn.Linear(8, WIDTH, key=key)
      self.position = jnp.zeros((8, WIDTH))
      self.blocks = [Block(key) for _ in range(LAYERS)]
      self.norm = eqx.nn.LayerNorm(WIDTH, eps=1e-6)
      self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, x):
      x = jax.vmap(self.embed)(x) + self.position
      for block in self.blocks:
        x = block(x)
      return self.head(jax.vmap(self.norm)(x).mean(0))

  return Transformer


def haiku_cnn():
  """The CNN of Haiku, transformed."""
  import haiku as hk

  @hk.transform_with_state
  def network(x, is_training):
    norm = lambda name: hk.BatchNorm(True, True, 0.9, eps=1e-5, name=name)
    x = jax.nn.relu(norm('norm_0')(hk.Conv2D(16, 3, name='conv_0')(x[..., None]), is_training))
    x = jax.nn.relu(norm('norm_1')(hk.Conv2D(32, 3, 2, name='conv_1')(x), is_training))
    return hk.Linear(CLASSES, name='head')(x.reshape(x.shape[0], -1))

  return network
