"""What is compressed, its channels and its slices, from how a function uses the leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from tests.helpers import stacks

pytestmark = pytest.mark.filterwarnings('ignore:the Laplace density')


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
    return x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
  layers: int = 3
  is_scanned: bool = True

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(50, 32)(tokens)
    if self.is_scanned:
      scanned = nn.scan(
        nn.remat(Block), variable_axes={'params': 0}, split_rngs={'params': True}, length=3
      )
      x, _ = scanned(name='layers')(x, None)
    else:
      for i in range(self.layers):
        x, _ = Block(name=f'layers{i}')(x)
    return nn.Dense(50)(x)


@pytest.mark.slow
def test_allocate_scanned_transformer_as_its_layers():
  tokens = jnp.zeros((2, 6), jnp.int32)
  scanned, apart = Transformer(), Transformer(is_scanned=False)
  params = scanned.init(jax.random.key(0), tokens)['params']
  stack = params['layers']
  rest = {name: leaf for name, leaf in params.items() if name != 'layers'}
  layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
  params_apart = rest | {f'layers{i}': layer for i, layer in enumerate(layers)}
  states, values = [], []
  for network, tree in ((scanned, params), (apart, params_apart)):
    fn = lambda params, x, network=network: network.apply({'params': params}, x)
    used = opq_jax.usage(fn, tree, tokens)
    compressed = opq_jax.compress(tree, bits_per_weight=3.0, usage=used)
    states.append(compressed.state.tree)
    values.append(compressed.params)
  attention = states[0]['layers']['MultiHeadDotProductAttention_0']
  assert attention['query']['kernel'].slices == 1 and attention['query']['bias'] is None
  assert states[0]['layers']['LayerNorm_0']['scale'] is None
  for i in range(3):
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.tree.map(lambda leaf, i=i: leaf[i], values[0]['layers']),
      values[1][f'layers{i}'],
    )
  jax.tree.map(np.testing.assert_array_equal, states[0]['Embed_0'], states[1]['Embed_0'])


def experts(params, x):
  """Attention, and eight experts of which each token takes one in eight."""
  x = x @ params['attention']
  chosen = jnp.zeros((len(x), 8, len(x) // 8))
  rows = jnp.einsum('td,tec->ecd', x, chosen)
  rows = jax.nn.relu(jnp.einsum('ecd,edf->ecf', rows, params['up']))
  return jnp.einsum('ecd,tec->td', jnp.einsum('ecf,efd->ecd', rows, params['down']), chosen)


def mixture():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.laplace(size=shape).astype(np.float32)
  return {'attention': draw(48, 48), 'up': draw(8, 48, 40), 'down': draw(8, 40, 48)}


def test_allocate_weighs_experts_by_their_share():
  params = mixture()
  used = opq_jax.usage(experts, params, jnp.ones((64, 48)))
  assert {name: leaf.share for name, leaf in used.items()} == {
    'attention': 1.0,
    'up': 0.125,
    'down': 0.125,
  }
  found = opq_jax.allocate(params, bits_per_weight=3.0, usage=used).tree
  assert found['up'].slices == 1 and found['attention'].slices == 0
  slices = lambda path, leaf: leaf.ndim - 2
  equal = opq_jax.allocate(params, bits_per_weight=3.0, slices=slices).tree
  assert float(found['attention'].payload) > float(equal['attention'].payload) + 0.5
  # a share of 1 / 8 lets an expert err by sqrt(8) more in steps where grids are fine
  fine = {'bits_per_weight': 6.0, 'objective': 'squared_error'}
  found = opq_jax.allocate(params, usage=used, **fine).tree
  steps = np.append(found['up'].step, found['down'].step) / found['attention'].step
  np.testing.assert_allclose(steps, np.sqrt(8), rtol=0.02)


def test_allocate_projections_onto_heads_as_matrices():
  """Channels are those of the matrix, however its outputs are cut into axes."""
  rng = np.random.default_rng(0)
  # heads of different scales: their mean would be another energy
  kernel = rng.laplace(size=(48, 6, 8)) * np.exp(rng.normal(size=(6, 1)))
  params = {'heads': kernel.astype(np.float32), 'out': rng.laplace(size=(48, 40))}
  params['out'] = params['out'].astype(np.float32)
  matrices = {**params, 'heads': params['heads'].reshape(48, 48)}

  def network(params, x):
    heads = jnp.einsum('bi,ihf->bhf', x, params['heads'])
    return heads.reshape(len(x), -1) @ params['out']

  found = opq_jax.usage(network, params, jnp.ones((2, 48)))
  assert found['heads'].channel_axis == (1, 2)
  for target in ({'bits_per_weight': 3.0}, {'sparsity': 0.5, 'bits': 3.0}):
    heads = opq_jax.allocate(params, usage=found, **target)
    plain = opq_jax.allocate(matrices, **target)
    for one, other in zip(jax.tree.leaves(heads), jax.tree.leaves(plain), strict=True):
      np.testing.assert_array_equal(one, other)
    state = opq_jax.init_state(params, heads)
    expected = opq_jax.size_report(matrices, opq_jax.init_state(matrices, plain))
    report = opq_jax.size_report(
      params, state, channel_axis=lambda path, _: found[path].channel_axis
    )
    assert report.nominal == expected.nominal
  with pytest.raises(ValueError, match=r'^heads: found channel_axis \(1, 3\), expected an axis'):
    opq_jax.allocate(params, channel_axis=lambda path, leaf: (1, 3))


def test_allocate_given_arguments_come_before_usage():
  params = mixture()
  used = opq_jax.usage(experts, params, jnp.ones((64, 48)))
  found = opq_jax.allocate(
    params,
    bits_per_weight=3.0,
    usage=used,
    compressible=lambda path, leaf: path != 'attention',
    slices=lambda path, leaf: 0,
    channel_axis=1,
  ).tree
  assert found['attention'] is None
  assert found['up'].slices == 0 and found['up'].channel_axis == 1


def test_allocate_refuses_usage_of_another_tree():
  params = mixture()
  used = opq_jax.usage(experts, params, jnp.ones((64, 48)))
  with pytest.raises(ValueError, match=r'^usage: found another tree than that of the parameters'):
    opq_jax.allocate({'up': params['up']}, usage=used)


def test_allocate_file_rate_of_slices():
  params = stacks.stacked()
  allocation = opq_jax.allocate(params, file_rate=10.0, slices=stacks.axes_of_stack())
  state = opq_jax.init_state(params, allocation)
  original = sum(leaf.nbytes for leaf in params.values())
  assert original / len(opq_jax.file.serialize(params, state)) == pytest.approx(10, rel=4e-3)


def test_summary_shows_usage():
  params = {**mixture(), 'gate': np.ones((4, 8), np.float32)}
  network = lambda params, x: experts(params, x) * params['gate'].sum()
  used = opq_jax.usage(network, params, jnp.ones((64, 48)))
  allocation = opq_jax.allocate(params, bits_per_weight=3.0, usage=used)
  text = str(opq_jax.summary(params, allocation, used))
  rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
  assert rows['up'][1:4] == ['8x48x40', 'sio', '8'] and rows['attention'][1:3] == ['48x48', 'io']
  assert 'of two axes or more, and not compressed: gate (elementwise)' in text
  plain = str(opq_jax.summary(params, allocation))
  assert 'axes:' not in plain and 'not compressed: gate' in plain


@pytest.mark.slow
@pytest.mark.parametrize(('bits', 'corrected'), [(6.0, True), (4.5, False)])
def test_allocate_retained_signal_of_shares(bits, corrected):
  # F = -p log(1 - D / S): where D is small, that of relative_error times p
  params = mixture()
  used = opq_jax.usage(experts, params, jnp.ones((64, 48)))
  targets = {'bits_per_weight': bits, 'corrected': corrected}
  steps = []
  for objective in ('retained_signal', 'relative_error'):
    found = opq_jax.allocate(params, usage=used, objective=objective, **targets).tree
    steps.append(np.append(found['up'].step, found['down'].step) / found['attention'].step)
  np.testing.assert_allclose(*steps, rtol=3e-2)
  # shares of 1 / 8 and weights in proportion to 40 and 48 of the leaf's own
  np.testing.assert_allclose(np.mean(steps[0]), np.sqrt(8 * 40 / 48), rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['retained_signal', 'balanced_error'])
def test_allocate_sparsity_of_shares(objective):
  params = mixture()
  used = opq_jax.usage(experts, params, jnp.ones((64, 48)))
  targets = {'sparsity': 0.6, 'bits': 3.0, 'objective': objective}
  found = opq_jax.allocate(params, usage=used, **targets).tree
  equal = opq_jax.allocate(params, slices=lambda path, leaf: leaf.ndim - 2, **targets).tree
  assert float(found['attention'].sparsity) < float(equal['attention'].sparsity) - 0.1
  assert found['attention'].step < equal['attention'].step
