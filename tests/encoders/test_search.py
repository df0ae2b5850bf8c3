"""`opq_jax.compress`: every encoder, to every kind of target."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import encoders
from opq_jax.encoders import allocation_search, survey
from opq_jax.network import second_moments


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (96, 96, 8):
      x = nn.Dense(width)(nn.relu(x))
    return x


FN = Network().apply
INPUTS = jax.random.normal(jax.random.key(1), (1024, 64)) @ jax.random.normal(
  jax.random.key(2), (64, 64)
)


@pytest.fixture(scope='module')
def variables():
  return Network().init(jax.random.key(0), INPUTS)


@pytest.fixture(scope='module')
def moments(variables):
  return second_moments(FN, variables, INPUTS)


KINDS = 'rounding', 'feedback', 'trellis', 'trellis with moments', 'layer by layer'


def encoder_of(kind, moments):
  return {
    'rounding': encoders.Rounding(),
    'feedback': encoders.Feedback(moments),
    'trellis': encoders.Trellis(),
    'trellis with moments': encoders.Trellis(moments),
    'layer by layer': encoders.LayerByLayer(FN, INPUTS, encoders.Trellis(moments)),
  }[kind]


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def file_size(params, state):
  return len(opq_jax.file.serialize(params, state))


def output_error(variables, params):
  return float(jnp.square(FN(params, INPUTS) - FN(variables, INPUTS)).sum())


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_compress_meets_compression_rate(kind, variables, moments):
  network = opq_jax.compress(variables, compression_rate=16.0, encoder=encoder_of(kind, moments))
  report = opq_jax.size_report(network.params, network.state)
  # entropies of a trellis' codes are those given their subsets, which contexts alone know
  plain = opq_jax.size_report(*opq_jax.compress(variables, compression_rate=16.0)[:2])
  assert report.file == pytest.approx(plain.file, rel=0.03)
  # the answer is a network that is compressed already
  assert_same(opq_jax.apply_compression(network.params, network.state), network.params)
  assert_same(network.params['params']['Dense_0']['bias'], variables['params']['Dense_0']['bias'])
  if kind != 'rounding':
    rounded = opq_jax.compress(variables, compression_rate=16.0).params
    assert output_error(variables, network.params) < 0.95 * output_error(variables, rounded)


@pytest.mark.parametrize('kind', KINDS)
def test_compress_is_choice_on_plain_grids(kind, variables, moments):
  encoder = encoder_of(kind, moments)
  params, state, allocation = opq_jax.compress(variables, bits_per_weight=2.0, encoder=encoder)
  grids = opq_jax.init_state(variables, allocation)
  assert_same(tuple(encoder.choose_codes(variables, grids)), (params, state))


def test_compress_rounds_by_default(variables):
  options = {'objective': 'relative_error', 'compressible': lambda path, _: 'kernel' in path}
  targets = {'sparsity': 0.5, 'bits': 3.0}
  network = opq_jax.compress(variables, **targets, **options)
  allocation = opq_jax.allocate(variables, **targets, **options)
  state = opq_jax.init_state(variables, allocation)
  expected = opq_jax.apply_compression(variables, state), state, allocation
  assert_same(tuple(network), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_compress_meets_file_rate(kind, variables, moments):
  encoder = encoder_of(kind, moments)
  network = opq_jax.compress(variables, file_rate=8.0, encoder=encoder)
  original = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  rate = original / file_size(network.params, network.state)
  assert 8.0 <= rate < 8.0 * 1.012  # steps of so small a file


@pytest.mark.parametrize(('rate', 'has_moments'), [(8.0, True), (16.0, False)])
def test_survey_saves_encodings(monkeypatch, rate, has_moments):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(512, 128)) @ rng.normal(size=(128, 128))
  x = (np.maximum(x, 0) / 8).astype(np.float32)
  tree = {'a': rng.laplace(size=(128, 768)), 'b': rng.laplace(size=(512, 128)) / 9}
  tree = {name: leaf.astype(np.float32) for name, leaf in tree.items()}
  moments = {'a': (x.T @ x / len(x))[None], 'b': None} if has_moments else None
  monkeypatch.setattr(survey, '_MIN_WEIGHTS', 1 << 13)
  monkeypatch.setattr(survey, '_MIN_OUTPUTS', 16)
  encodings = []
  trials = encoders.Trellis.trials

  def counted(encoder):
    trial = trials(encoder)
    return lambda *args: encodings.append(trial(*args)) or encodings[-1]

  monkeypatch.setattr(encoders.Trellis, 'trials', counted)
  found = {}
  for version in (1, 2):
    encodings.clear()
    encoder = encoders.Trellis(moments, version=version)
    network = opq_jax.compress(tree, compression_rate=rate, encoder=encoder)
    found[version] = len(encodings), file_size(network.params, network.state)
  assert found[2][0] == 1 < found[1][0]
  assert found[2][1] == pytest.approx(found[1][1], rel=0.006)


def test_layer_by_layer_traces_once(variables):
  traces = []

  def fn(variables, x, train=False, mutable=()):
    traces.append(train)
    return FN({'params': variables['params']}, x - variables['batch_stats']['mean'][None])

  # with batch statistics every call makes a function of its own, which JAX has not traced yet
  with_statistics = {**variables, 'batch_stats': {'mean': jnp.zeros(64)}}
  encoder = encoders.LayerByLayer(fn, INPUTS, encoders.Rounding())
  opq_jax.compress(with_statistics, file_rate=8.0, encoder=encoder)
  assert traces == [True]


def test_layer_by_layer_starts_from_plain_grids(variables, moments):
  # codes along a trellis on the grids that a trellis has refined already take far more bytes; the
  # encoder as a value is given none but plain grids
  along = encoders.Trellis(moments)
  first = opq_jax.compress(variables, compression_rate=16.0, encoder=along)
  encoder = encoders.LayerByLayer(FN, INPUTS, along)
  network = opq_jax.compress(variables, compression_rate=16.0, encoder=encoder)
  assert_same(network.allocation, first.allocation)
  size = file_size(network.params, network.state)
  assert size == pytest.approx(file_size(first.params, first.state), rel=0.02)
  mistaken = encoder.choose_codes(variables, first.state)
  assert file_size(*mistaken) > 1.2 * size


@pytest.mark.parametrize('first', ['rounding', 'feedback', 'trellis'])
def test_layer_by_layer_chooses_like_first(first, variables, moments):
  leaf_encoder = encoder_of(first, moments)
  by_layers = encoders.LayerByLayer(FN, INPUTS, leaf_encoder, share=0.0)
  network = opq_jax.compress(variables, compression_rate=12.0, encoder=by_layers)
  alone = opq_jax.compress(variables, compression_rate=12.0, encoder=leaf_encoder)
  # the first layer reads the same inputs in both networks
  if first == 'feedback':
    kernel = lambda tree: np.asarray(tree['params']['Dense_0']['kernel'])
    assert np.mean(kernel(network.params) == kernel(alone.params)) > 0.99
  if first == 'rounding':
    assert_same(network.params, alone.params)
    assert_same(network.state, alone.state)
  codes = np.asarray(opq_jax.encode(*network[:2])['params']['Dense_1']['kernel'])
  follows = opq_jax.coding.trellis.indices_and_subsets(codes) is not None
  assert follows == (first == 'trellis')


def test_layer_by_layer_corrects_rounding(variables):
  rounding = encoders.Rounding()
  network = opq_jax.compress(
    variables,
    compression_rate=16.0,
    encoder=encoders.LayerByLayer(FN, INPUTS, rounding, share=1.0),
  )
  alone = opq_jax.compress(variables, compression_rate=16.0)
  assert output_error(variables, network.params) < 0.9 * output_error(variables, alone.params)
  assert_same(opq_jax.apply_compression(network.params, network.state), network.params)


def test_compress_leaves_the_rest_as_it_came(moments):
  kernel = np.random.default_rng(0).laplace(size=(64, 32)).astype(np.float32)
  params = {'kernel': kernel, 'steps': np.int64(3), 'mean': np.ones(4, np.float64)}
  for encoder in (encoders.Rounding(), encoders.Trellis()):
    found = opq_jax.compress(params, compression_rate=12.0, encoder=encoder).params
    assert found['steps'] is params['steps'] and found['mean'] is params['mean']
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_compress_refuses_other_values(variables, moments):
  for wrong in ('trellis', None, encoders.Trellis, opq_jax.allocate):
    with pytest.raises(ValueError, match=r'encoder: found .*, expected a value'):
      opq_jax.compress(variables, encoder=wrong)
  with pytest.raises(ValueError, match=r'first: found LayerByLayer.*, expected Rounding'):
    by_layers = encoders.LayerByLayer(FN, INPUTS, encoders.Rounding())
    encoders.LayerByLayer(FN, INPUTS, by_layers)
  with pytest.raises(ValueError, match='moments: found None, expected a tree of matrices'):
    encoders.Feedback(None)


def test_compress_refuses_targets(variables, moments):
  for kind in KINDS[1:]:
    with pytest.raises(ValueError, match='together with sparsity and bits, expected Rounding'):
      opq_jax.compress(variables, sparsity=0.5, bits=3.0, encoder=encoder_of(kind, moments))
  trellis = encoders.Trellis()
  with pytest.raises(ValueError, match='found file_rate together with another target'):
    opq_jax.compress(variables, file_rate=8.0, compression_rate=8.0, encoder=trellis)
  with pytest.raises(ValueError, match=r'file_rate: found -1\.0, expected a positive number'):
    opq_jax.compress(variables, file_rate=-1.0, encoder=trellis)
  with pytest.raises(ValueError, match='expected one of them'):
    opq_jax.compress(variables, bits_per_weight=2.0, compression_rate=8.0, encoder=trellis)


def test_encoders_are_plain_values(moments):
  by_layers = encoders.LayerByLayer(FN, INPUTS, encoders.Trellis(moments))
  shown = repr(by_layers)
  assert shown == (
    'LayerByLayer(fn=Module.apply, inputs=<float32[1024, 64]>, '
    'first=Trellis(moments=<3 arrays>, damping=0.05, version=2), share=0.5, damping=0.05)'
  )
  assert repr(encoders.Rounding()) == 'Rounding()'
  assert encoders.Rounding() == encoders.Rounding()
  feedback = encoders.Feedback(moments)
  # arrays have no truth value to compare by, and no hash
  assert feedback == feedback and feedback != encoders.Feedback(moments)
  assert len({feedback, by_layers, encoders.Rounding()}) == 3
  with pytest.raises(AttributeError):
    feedback.damping = 1.0


def test_search_stops_at_the_finest_grid():
  # codes that have too few bits, whatever more the allocation is asked for
  kernel = np.random.default_rng(0).uniform(-1, 1, (64, 64)).astype(np.float32)
  trial = lambda params, grids: encoders.Trial(params, grids, 4.0)
  params, _, allocation = allocation_search.search_allocation(trial, kernel, 8.0, {})
  assert float(allocation.tree.payload) == pytest.approx(8, rel=6e-3)
  assert params is kernel


def test_search_warns_of_its_last_allocation():
  kernel = np.random.default_rng(0).laplace(size=(256, 64)).astype(np.float32)
  kernel[:, 3] *= 1e-3  # a channel that is pruned as a whole
  with pytest.warns(UserWarning, match='all weights are pruned of') as caught:
    opq_jax.compress({'w': kernel}, compression_rate=16.0, encoder=encoders.Trellis())
  assert len(caught) == 1 and caught[0].filename == __file__


def test_compress_searches_outside_of_traces():
  kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  compressed = lambda encoder: lambda kernel: opq_jax.compress(kernel, encoder=encoder).params
  np.testing.assert_array_equal(
    jax.jit(compressed(encoders.Rounding()))(kernel), compressed(encoders.Rounding())(kernel)
  )
  with pytest.raises(ValueError, match=r'encoder: found Trellis\(.*\) in a trace, expected'):
    jax.jit(compressed(encoders.Trellis()))(kernel)
