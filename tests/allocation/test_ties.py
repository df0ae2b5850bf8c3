"""Leaves that are one array are allocated once, and with one record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from opq_jax.core import trees
from opq_jax.core.ties import Candidate, Tie, tied

TARGETS = [{'compression_rate': 12.0}, {'sparsity': 0.5, 'bits': 3.0}]


def untied():
  draw = np.random.default_rng(0).laplace
  return {'embed': draw(size=(96, 48)).astype('f4'), 'fc': draw(size=(48, 48)).astype('f4')}


AGAIN = {
  'object': lambda table: table,
  'copy': np.copy,
  'device': jnp.asarray,
  'transpose': lambda table: table.T,
  'transposed copy': lambda table: table.T.copy(),
}


@pytest.mark.parametrize('targets', TARGETS, ids=['rate', 'bits'])
@pytest.mark.parametrize('way', AGAIN)
def test_allocate_tied_leaf_counts_once(way, targets):
  params = untied()
  alone = opq_jax.allocate(params, **targets).tree
  params['head'] = AGAIN[way](params['embed'])
  found = opq_jax.allocate(params, **targets).tree
  head = found.pop('head')
  jax.tree.map(np.testing.assert_array_equal, found, alone)
  is_transposed = 'transpose' in way
  assert (head.tied_to, head.is_transposed) == ('embed', is_transposed)
  assert (head.shape, head.channel_axis) == (((48, 96), 0) if is_transposed else ((96, 48), -1))
  for field in ('threshold', 'step', 'levels', 'offset', 'scale', 'bits'):
    np.testing.assert_array_equal(getattr(head, field), getattr(alone['embed'], field))


@pytest.mark.parametrize('way', AGAIN)
def test_compress_keeps_ties(way):
  params = untied()
  params['head'] = AGAIN[way](params['embed'])
  network = opq_jax.compress(
    params, compression_rate=12.0, channel_axis=lambda path, _: 0 if path == 'head' else -1
  )
  head = network.params['head'].T if 'transpose' in way else network.params['head']
  np.testing.assert_array_equal(head, network.params['embed'])


OTHERS = {
  'one value': lambda table: np.where(np.arange(table.size).reshape(table.shape) == 7, 9, table),
  'signs': np.negative,
  'order': lambda table: table[::-1].copy(),
  'shape': lambda table: table.reshape(48, 96),
  'dtype': lambda table: table.astype(jnp.bfloat16),
}


@pytest.mark.parametrize('way', OTHERS)
def test_allocate_other_leaves(way):
  params = untied()
  params['head'] = OTHERS[way](params['embed']).astype(jnp.bfloat16 if way == 'dtype' else 'f4')
  assert opq_jax.allocate(params).tree['head'].tied_to == ''


def test_tied_of_many():
  """Groups of three, a square matrix and its transpose, the same object that cannot be read."""
  square = np.arange(9.0).reshape(3, 3)
  leaves = {'a': square, 'b': square + 1, 'c': square.T, 'd': square + 1, 'e': square.copy()}
  read = lambda leaf: lambda: leaf
  found = tied(Candidate(name, 0, leaf, read(leaf)) for name, leaf in leaves.items())
  assert found == {'c': Tie('a', True), 'd': Tie('b', False), 'e': Tie('a', False)}
  unread = [Candidate(name, 0, leaf, None) for name, leaf in [*leaves.items(), ('f', square)]]
  assert tied(unread) == {'f': Tie('a', False)}
  assert tied([Candidate('a', 0, square, None), Candidate('b', 1, square, None)]) == {}


def test_allocate_symmetric_is_no_transpose():
  half = np.random.default_rng(0).laplace(size=(24, 24)).astype('f4')
  symmetric = half + half.T
  found = opq_jax.allocate({'a': symmetric, 'b': symmetric.copy()}).tree
  assert found['b'].tied_to == 'a' and not found['b'].is_transposed


def test_allocate_ties_in_trace():
  """A tracer is the same leaf only where it is the same tracer."""
  params = untied()

  @jax.jit
  def once(table, fc):
    return opq_jax.allocate({'embed': table, 'fc': fc, 'head': table}, corrected=False)

  found = once(params['embed'], params['fc']).tree
  assert found['head'].tied_to == 'embed'
  alone = opq_jax.allocate(params, corrected=False).tree
  np.testing.assert_allclose(found['fc'].threshold, alone['fc'].threshold, rtol=1e-5)
  apart = jax.jit(lambda tree: opq_jax.allocate(tree, corrected=False))
  assert apart(params | {'head': params['embed']}).tree['head'].tied_to == ''


def test_allocate_ties_over_mesh():
  params = untied()
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  lay = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
  params = {'embed': lay(params['embed'], 'x'), 'head': lay(params['embed'].T, None, 'x')}
  found = opq_jax.allocate(params).tree
  assert (found['head'].tied_to, found['head'].is_transposed) == ('embed', True)
  state = opq_jax.init_state(params, opq_jax.Allocation(found))
  assert state.tree['head'].kinds.sharding.is_equivalent_to(params['head'].sharding, 2)
  np.testing.assert_array_equal(state.tree['head'].kinds.T, state.tree['embed'].kinds)


def test_finetuned_ties_are_as_the_params():
  """A tied pair that is two leaves for the optimizer goes apart, one that is one leaf does not."""
  params = untied()
  params['head'] = params['embed'].copy()
  state = opq_jax.init_state(params, opq_jax.allocate(params))
  masks = {name: np.asarray(state.tree[name].mask) for name in params}
  np.testing.assert_array_equal(masks['head'], masks['embed'])

  def loss(tree, has_ties):
    tree = tree | ({'head': tree['embed']} if has_ties else {})
    values = opq_jax.apply_compression(tree, state)
    return jnp.sum(jnp.sin(values['embed'])) + jnp.sum(values['head'] ** 2)

  for has_ties in (True, False):
    gradient = jax.grad(loss)(params, has_ties)
    moved = {name: leaf - 0.01 * gradient[name] for name, leaf in params.items()}
    if has_ties:
      moved['head'] = moved['embed']
    data = opq_jax.file.serialize(moved, state)
    with opq_jax.OpqFile(data) as file:
      assert file.tied_to('head') == ('embed' if has_ties else None)
      for name, value in opq_jax.apply_compression(moved, state).items():
        np.testing.assert_array_equal(file[name], value)


def test_summary_counts_ties_once():
  params = untied()
  alone = str(opq_jax.summary(params, opq_jax.allocate(params)))
  params['head'] = params['embed'].T
  text = str(opq_jax.summary(params, opq_jax.allocate(params)))
  assert 'head is the transpose of embed, and counts once' in text
  predicted = lambda text: next(line for line in text.splitlines() if 'predicted' in line)
  assert predicted(text) == predicted(alone)
  assert f'{96 * 48 + 48 * 48:,}' in text


def moments(width, seed):
  inputs = np.random.default_rng(seed).normal(size=(256, width)) @ np.diag(
    np.linspace(0.1, 2, width)
  )
  return (inputs.T @ inputs / 256).astype('f4')[None]


@pytest.mark.parametrize('way', ['copy', 'transposed copy'])
@pytest.mark.parametrize('kind', ['Trellis', 'Feedback'])
def test_encoders_keep_ties(kind, way, tmp_path):
  """The codes of the leaf that has moments are those of both."""
  params = untied()
  params['head'] = AGAIN[way](params['embed'])
  matrices = {'embed': None, 'fc': moments(48, 0), 'head': moments(len(params['head']), 1)}
  encoder = getattr(opq_jax.encoders, kind)(matrices)
  network = opq_jax.compress(params, compression_rate=12.0, encoder=encoder)
  head = np.asarray(network.params['head'])
  np.testing.assert_array_equal(head.T if 'transposed' in way else head, network.params['embed'])
  # of the encoder alone too, on the grids that were found
  again = encoder.choose_codes(params, opq_jax.init_state(params, network.allocation))
  jax.tree.map(np.testing.assert_array_equal, again.params, network.params)
  jax.tree.map(np.testing.assert_array_equal, again.state, network.state)
  opq_jax.save(tmp_path / 'net.opq', network.params, network.state)
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    assert file.tied_to('head') == 'embed' and file.tied_to('fc') is None
    for name, leaf in trees.named_leaves(network.params).items():
      np.testing.assert_array_equal(file[name], leaf)
  # the product's own choice, not that of the look-up
  error = lambda values: np.square(
    (values - params['head']).T @ np.linalg.cholesky(matrices['head'][0])
  ).sum()
  plain = opq_jax.compress(params, compression_rate=12.0)
  assert error(head) < 0.9 * error(np.asarray(plain.params['head']))


def test_layer_by_layer_keeps_ties():
  """A language model of copies: the codes of the table, for whose rows all layers were chosen."""
  rng = np.random.default_rng(0)
  f4 = lambda *shape: (rng.laplace(size=shape) / shape[0] ** 0.5).astype('f4')
  params = {'embed': f4(96, 48), 'fc': f4(48, 48)}
  params['head'] = params['embed'].T.copy()

  def fn(params, tokens):
    hidden = jnp.tanh(params['embed'][tokens] @ params['fc'])
    return hidden @ params['head']

  tokens = jnp.asarray(rng.integers(0, 96, (64, 16)))
  encoder = opq_jax.encoders.LayerByLayer(fn, tokens, first=opq_jax.encoders.Trellis())
  with pytest.warns(UserWarning, match='embed: found leaves that are looked up'):
    network = opq_jax.compress(params, compression_rate=10.0, encoder=encoder)
  np.testing.assert_array_equal(network.params['head'].T, network.params['embed'])
  tables = [leaf.name for leaf in encoder.traced(params).used if leaf.kind == 'look-up']
  assert tables == ['embed']
  error = lambda tree: float(jnp.square(fn(tree, tokens) - fn(params, tokens)).sum())
  alone = opq_jax.compress(params, compression_rate=10.0, encoder=encoder.first)
  assert error(network.params) < error(alone.params)
