"""How functions use their leaves, against what their authors wrote down."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from opq_jax.network import usage

shape = jax.ShapeDtypeStruct


def used_by(fn, params, *inputs):
  found = usage(fn, params, *inputs)
  return {leaf.name: leaf for leaf in jax.tree.leaves(found)}


def roles(leaf):
  product = leaf.product
  return product.slices, product.inputs, product.outputs


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(4)(h, h)
    return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(10, 8)
    x = embed(tokens) + self.param('position', nn.initializers.normal(), (1, 5, 8))
    layers = nn.scan(
      nn.remat(Block), variable_axes={'params': 0}, split_rngs={'params': True}, length=3
    )
    x, _ = layers(name='layers')(x, None)
    return embed.attend(x)


def test_usage_of_scanned_attention():
  tokens = jnp.zeros((1, 5), jnp.int32)
  model = Transformer()
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  used = used_by(model.apply, variables, tokens)
  attention = 'params/layers/MultiHeadDotProductAttention_0'
  query, out = used[f'{attention}/query/kernel'], used[f'{attention}/out/kernel']
  assert roles(query) == ((0,), (1,), (2, 3)) and query.slices == 1
  assert roles(out) == ((0,), (1, 2), (3,))
  assert roles(used['params/layers/Dense_0/kernel']) == ((0,), (1,), (2,))
  assert query.product.where == ('scan',)
  # q, k and v read the same rows, and no other layer does
  readers = [
    name
    for name, leaf in used.items()
    if leaf.product and leaf.product.reads == query.product.reads
  ]
  assert readers == [f'{attention}/{name}/kernel' for name in ('key', 'query', 'value')]
  # a batch of one example makes neither the embedding of positions nor a norm a kernel
  kinds = {name: leaf.kind for name, leaf in used.items()}
  kernels = {name for name, kind in kinds.items() if kind == 'dot'}
  assert all(name.endswith('kernel') or 'Embed' in name for name in kernels)
  assert kinds['params/position'] == kinds['params/layers/LayerNorm_0/scale'] == 'elementwise'
  # tied: looked up by its rows, multiplied by its columns
  uses = used['params/Embed_0/embedding'].uses
  assert [(use.kind, use.inputs, use.outputs) for use in uses] == [
    ('look-up', (0,), (1,)),
    ('dot', (1,), (0,)),
  ]


@pytest.mark.parametrize(
  'expression, operand, expected',
  [
    ('btd,edf->ebtf', 'btd', ((), (1,), (0, 2))),  # each token in every expert
    ('ectd,edf->ectf', 'ectd', ((0,), (1,), (2,))),  # tokens were sent to experts
    ('btd,fd->btf', 'btd', ((), (1,), (0,))),
    ('bthd,hdf->btf', 'bthd', ((), (0, 1), (2,))),
  ],
)
def test_usage_of_einsum(expression, operand, expected):
  sizes = {'b': 2, 'c': 2, 't': 3, 'd': 4, 'e': 5, 'f': 6, 'h': 7}
  kernel = expression.split(',')[1].split('->')[0]
  x, w = (shape([sizes[axis] for axis in axes], 'float32') for axes in (operand, kernel))
  used = used_by(lambda w, x: jnp.einsum(expression, x, w), w, x)
  assert roles(used['']) == expected


def test_usage_of_batched_index():
  """`table[i]` under vmap, as Equinox looks tokens up, is the look-up that `table[tokens]` is."""
  table, tokens = shape((50, 32), 'float32'), shape((4, 6), 'int32')
  by_one = jax.vmap(jax.vmap(lambda table, i: table[i], (None, 0)), (None, 0))
  for network in (by_one, lambda table, tokens: table[tokens]):
    leaf = used_by(network, table, tokens)['']
    assert leaf.kind == 'look-up' and roles(leaf) == ((), (0,), (1,))


def test_usage_of_convolutions():
  class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(8, (3, 3), name='plain')(x)
      x = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
      x = nn.Conv(8, (3, 3), kernel_dilation=2, name='dilated')(x)
      return nn.ConvTranspose(4, (2, 2), strides=(2, 2), name='transposed')(x)

  x = jnp.zeros((1, 8, 8, 3))
  variables = jax.eval_shape(Convolutions().init, jax.random.key(0), x)
  used = used_by(Convolutions().apply, variables, x)
  for name in ('plain', 'depthwise', 'dilated', 'transposed'):
    leaf = used[f'params/{name}/kernel']
    assert leaf.kind == 'convolution' and roles(leaf) == ((), (0, 1, 2), (3,))
  assert used['params/depthwise/kernel'].product.groups == 8
  assert used['params/plain/bias'].kind == 'elementwise'


def test_usage_of_nnx_recurrent_and_normalized_layers():
  class Network(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(4, 6, rngs=rngs)
      self.norm = nnx.BatchNorm(6, rngs=rngs)
      self.cell = nnx.RNN(nnx.GRUCell(6, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
      return self.cell(self.norm(self.dense(x)))

  graph, state = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
  used = used_by(lambda s, x: nnx.merge(graph, s)(x), state, shape((2, 5, 4), 'float32'))
  kinds = {name: leaf.kind for name, leaf in used.items()}
  assert kinds['dense/kernel/value' if 'dense/kernel/value' in kinds else 'dense/kernel'] == 'dot'
  assert all(kind == 'elementwise' for name, kind in kinds.items() if 'norm' in name)
  recurrent = [leaf for name, leaf in used.items() if 'cell' in name and 'kernel' in name]
  assert recurrent and all(leaf.product.where == ('scan',) for leaf in recurrent)
  # the kernels of a cell are the same at each step: no slices
  assert all(leaf.slices == 0 for leaf in recurrent)


def test_usage_behind_arithmetic():
  def network(params, x):
    kernel = params['gain'] * params['v'] / jnp.linalg.norm(params['v'], axis=0, keepdims=True)
    return x @ kernel, x * params['gate'], x @ (2 * params['scaled'])

  params = {
    'gain': jnp.ones((1, 3)),
    'v': jnp.ones((3, 3)),
    'gate': jnp.ones((1, 3)),
    'unused': jnp.ones(2),
    'scaled': jnp.ones((3, 3)),
  }
  used = used_by(network, params, jnp.ones((1, 3)))
  assert used['v'].kind == 'dot' and not used['v'].product.is_exact
  assert used['scaled'].product.is_exact
  # one example: the gate has the shape of the activations, and is still no kernel
  assert {used[name].kind for name in ('gain', 'gate')} == {'elementwise'}
  assert used['unused'].kind == 'unused' and used['unused'].product is None


def test_usage_of_slices_by_index():
  def network(stack, x):
    for i in range(2):
      x = jnp.tanh(x @ stack[i])
    return jax.lax.fori_loop(2, 4, lambda i, x: jnp.tanh(x @ stack[i]), x)

  leaf = used_by(network, jnp.ones((4, 3, 3)), jnp.ones((2, 3)))['']
  assert leaf.slices == 1 and {use.slices for use in leaf.uses} == {(0,)}


def test_usage_names_what_it_does_not_understand():
  def network(params, x):
    carried, _ = jax.lax.scan(lambda w, _: (w * 0.9, None), params['carried'], None, length=2)
    return x @ carried, jnp.cumsum(params['summed'], axis=0) @ x.T

  used = used_by(
    network, {'carried': jnp.ones((3, 3)), 'summed': jnp.ones((3, 3))}, jnp.ones((2, 3))
  )
  assert [use.operation for use in used['carried'].uses] == ['scan']
  assert [use.operation for use in used['summed'].uses] == ['cumsum']
  with pytest.raises(ValueError, match=r'^act: found .*, expected an array'):
    usage(lambda p, x: x, {'act': jax.nn.relu}, jnp.ones(3))


def for_platforms(default):
  """A product that the CPU computes as a sum over its rows, and other platforms otherwise."""
  rows = lambda x, w: sum(x[:, i : i + 1] * w[i : i + 1] for i in range(4))
  return lambda w, x: jax.lax.platform_dependent(x, w, cpu=rows, default=default)


def test_usage_of_platforms_is_that_of_the_default():
  leaf = used_by(for_platforms(jnp.matmul), shape((4, 3), 'float32'), shape((5, 4), 'float32'))['']
  assert [use.kind for use in leaf.uses] == ['dot'] and roles(leaf) == ((), (0,), (1,))


def test_usage_of_a_kernel_for_other_platforms_is_that_of_the_cpu():
  def written(x, w):
    def body(x, w, out):
      out[...] = x[...] @ w[...]

    out = shape((5, 3), 'float32')
    return pl.pallas_call(body, out, interpret=True)(x, w)

  leaf = used_by(for_platforms(written), shape((4, 3), 'float32'), shape((5, 4), 'float32'))['']
  assert {use.kind for use in leaf.uses} == {'elementwise'}
