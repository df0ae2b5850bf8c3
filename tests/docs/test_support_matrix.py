"""Every cell of the support matrix of README.md: "yes" works, "no" is refused or has no effect."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import opq_jax
from opq_jax import cli, correction, encoders, finetuning, importers
from opq_jax.network import second_moments
from opq_jax.weights import write_safetensors
from tests.helpers import snippets

FEATURES = {
  '`compress`, `allocate`, `encode`, trellis codes': 'compress',
  '`save`, `load` into the same containers': 'files',
  '`compressed`, `keep_compressed` with optax': 'optax',
  '`opq compress` and `verify`, leaf by leaf': 'command line',
  'training step of `opq_jax.finetuning`': 'training step',
  'BatchNorm correction, synthetic inputs': 'correction',
  '`usage`, moments of inputs': 'moments',
  'error feedback': 'feedback',
  'layer by layer': 'layer by layer',
  'weights of torchvision, timm, Keras, ...': 'import',
}
FRAMEWORKS = ('Linen', 'NNX', 'Haiku', 'Equinox', 'plain JAX')
X = jax.random.normal(jax.random.key(7), (32, 24))
Y = jnp.zeros(32, jnp.int32)


class Network(NamedTuple):
  """A network of two dense layers of one framework.

  Attributes:
    params: its tree.
    apply: (params, x) -> logits.
    channel_axis: axis of the output channels of its kernels.
    kernels: path names of its kernels.
  """

  params: Any
  apply: Callable[[Any, jax.Array], jax.Array]
  channel_axis: int
  kernels: tuple[str, ...]


class LinenNetwork(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Dense(48)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(10)(nn.relu(x))


class NNXNetwork(nnx.Module):
  def __init__(self, rngs):
    self.hidden, self.head = nnx.Linear(24, 48, rngs=rngs), nnx.Linear(48, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.hidden(x)))


def linen():
  model = LinenNetwork()
  variables = model.init(jax.random.key(0), X)
  return Network(variables, model.apply, -1, ('params/Dense_0/kernel', 'params/Dense_1/kernel'))


def with_nnx():
  graph, params, rest = nnx.split(NNXNetwork(nnx.Rngs(0)), nnx.Param, ...)
  run = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x)
  return Network(nnx.to_pure_dict(params), run, -1, ('head/kernel', 'hidden/kernel'))


def with_haiku():
  hk = pytest.importorskip('haiku')  # of the extra `test`
  forward = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP((48, 10))(x)))
  params = forward.init(jax.random.key(0), X)
  return Network(params, forward.apply, -1, ('mlp/~/linear_0/w', 'mlp/~/linear_1/w'))


def with_equinox():
  eqx = pytest.importorskip('equinox')
  model = eqx.nn.MLP(24, 10, 48, 1, key=jax.random.key(0))
  arrays, static = eqx.partition(model, eqx.is_array)
  run = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
  return Network(arrays, run, 0, ('layers/0/weight', 'layers/1/weight'))


def plain():
  keys = jax.random.split(jax.random.key(0))
  params = {
    'hidden': {'w': jax.random.laplace(keys[0], (24, 48)) / 5, 'b': jnp.zeros(48)},
    'head': {'w': jax.random.laplace(keys[1], (48, 10)) / 7, 'b': jnp.zeros(10)},
  }

  def run(params, x):
    x = jax.nn.relu(x @ params['hidden']['w'] + params['hidden']['b'])
    return x @ params['head']['w'] + params['head']['b']

  return Network(params, run, -1, ('head/w', 'hidden/w'))


@functools.cache
def network(framework):
  made = (linen, with_nnx, with_haiku, with_equinox, plain)
  return dict(zip(FRAMEWORKS, made, strict=True))[framework]()


def compressed(net, **options):
  return opq_jax.compress(
    net.params, compression_rate=8.0, channel_axis=net.channel_axis, **options
  )


def leaves(tree):
  with_names = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in with_names}


def matrix():
  """{(feature, framework): cell} of the table in README.md."""
  text = (snippets.ROOT / 'README.md').read_text()
  table = text.partition('<!-- support matrix -->')[2].partition('<!-- end of the')[0]
  rows = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table.splitlines()
    if line.startswith('|')
  ]
  assert tuple(rows[0][1:]) == FRAMEWORKS
  assert [row[0] for row in rows[2:]] == list(FEATURES)
  return {
    (FEATURES[row[0]], framework): re.sub(r' \[\d\]', '', cell)
    for row in rows[2:]
    for framework, cell in zip(FRAMEWORKS, row[1:], strict=True)
  }


def cells(feature, *values):
  """The frameworks that have one of these values."""
  found = matrix()
  return [framework for framework in FRAMEWORKS if found[feature, framework] in values]


def test_matrix_values():
  assert set(matrix().values()) == {'yes', 'no', 'wrapper', '`from_nnx`', '`from_haiku`'}
  everywhere = ('compress', 'files', 'optax', 'command line', 'moments', 'feedback')
  for feature in (*everywhere, 'layer by layer'):
    assert cells(feature, 'yes') == list(FRAMEWORKS)
  assert cells('training step', 'yes', 'wrapper') == list(FRAMEWORKS)
  # tests/correction/test_frameworks.py
  assert cells('correction', '`from_nnx`', '`from_haiku`') == ['NNX', 'Haiku']
  assert cells('correction', 'no') == ['Equinox', 'plain JAX']
  assert cells('import', 'no') == list(FRAMEWORKS[1:])


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_compress_framework(framework):
  net = network(framework)
  for encoder in (encoders.Rounding(), encoders.Trellis()):
    result = compressed(net, encoder=encoder)
    report = opq_jax.size_report(result.params, result.state)
    assert 7.9 < report.entropy_rate < 9.5
    codes = leaves(opq_jax.encode(result.params, result.state))
    assert sorted(name for name, leaf in codes.items() if leaf.dtype == jnp.int8) == sorted(
      net.kernels
    )
    assert jax.tree.structure(result.params) == jax.tree.structure(net.params)
    assert np.isfinite(net.apply(result.params, X)).all()


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_load_framework(framework, tmp_path):
  net = network(framework)
  result = compressed(net)
  opq_jax.save(tmp_path / 'a.opq', result.params, result.state)
  loaded, _ = opq_jax.load(tmp_path / 'a.opq', like=net.params)
  assert jax.tree.structure(loaded) == jax.tree.structure(net.params)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), loaded, result.params))
  assert (net.apply(loaded, X) == net.apply(result.params, X)).all()


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_optax_framework(framework):
  net = network(framework)
  state = compressed(net).state
  apply_fn = opq_jax.compressed(net.apply, state)
  optimizer = optax.chain(optax.adam(1e-2), opq_jax.keep_compressed(state))
  loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(
    apply_fn(params, X), Y
  ).mean()

  @jax.jit
  def step(params, memory):
    updates, memory = optimizer.update(jax.grad(loss)(params), memory, params)
    return optax.apply_updates(params, updates), memory

  params, memory = net.params, optimizer.init(net.params)
  for _ in range(20):
    params, memory = step(params, memory)
  assert loss(params) < 0.5 * loss(net.params)
  states = leaves(jax.tree.map(lambda leaf: leaf, state.tree))
  for name in net.kernels:
    pruned = states[f'{name}/kinds'] == 0
    assert pruned.any() and (leaves(params)[name][pruned] == 0).all()


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_command_line_framework(framework, tmp_path):
  net = network(framework)
  source, target = str(tmp_path / 'a.safetensors'), str(tmp_path / 'a.opq')
  write_safetensors(source, net.params)
  axis = 'first' if net.channel_axis == 0 else 'last'
  assert cli.main(['compress', source, target, '--rate', '8', '--channel-axis', axis]) == 0
  assert cli.main(['verify', target, '--against', source]) == 0
  with opq_jax.OpqFile(target) as file:
    assert sorted(name for name in file if file.leaf_state(name)) == sorted(net.kernels)


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_train_step_framework(framework):
  net = network(framework)
  variables, apply_fn = net.params, net.apply
  if framework != 'Linen':
    variables = {'params': net.params}

    def apply_fn(variables, x, train=False, mutable=None, rngs=None):
      logits = net.apply(variables['params'], x)
      return (logits, {}) if mutable else logits

  result = opq_jax.compress(
    variables['params'], compression_rate=8.0, channel_axis=net.channel_axis
  )
  optimizer = optax.adam(1e-2)
  state = finetuning.init_train_state(variables, optimizer, jax.random.key(0))
  step = jax.jit(functools.partial(finetuning.train_step, apply_fn=apply_fn, optimizer=optimizer))
  losses = []
  for _ in range(20):
    state, metrics = step(state, result.state, {'image': X, 'label': Y})
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.5 * losses[0]


def test_correction_linen():
  net = network('Linen')
  corrected = correction.correct_batch_norm(
    net.apply, net.params, compressed(net).params, jax.random.key(0), (32, 24)
  )
  old, new = (leaves(tree['batch_stats']) for tree in (net.params, corrected))
  assert all((old[name] != new[name]).any() for name in old)


@pytest.mark.parametrize('framework', FRAMEWORKS[1:])
def test_correction_refused(framework):
  net = network(framework)
  with pytest.raises((ValueError, TypeError, AttributeError)):
    correction.correct_batch_norm(
      net.apply, net.params, compressed(net).params, jax.random.key(0), (32, 24)
    )
  with pytest.raises((ValueError, TypeError, AttributeError)):
    correction.synthetic_inputs(net.apply, net.params, jax.random.key(0), (32, 24))


@functools.cache
def calibration_inputs():
  """Inputs that go together, as those of trained networks do."""
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(512, 24)) @ rng.normal(size=(24, 24)) / 4, jnp.float32)


@functools.cache
def moments_of(framework):
  net = network(framework)
  return second_moments(net.apply, net.params, calibration_inputs())


def output_error(framework, encoder):
  """The squared error of the logits, relative to theirs."""
  net, x = network(framework), calibration_inputs()
  logits = net.apply(net.params, x)
  result = compressed(net, encoder=encoder)
  return float(jnp.square(net.apply(result.params, x) - logits).sum() / jnp.square(logits).sum())


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_moments_framework(framework):
  net, x = network(framework), np.asarray(calibration_inputs())
  found = leaves(moments_of(framework))
  assert sorted(found) == sorted(f'{name}/matrix' for name in net.kernels)
  first = next(name for name in net.kernels if 24 in leaves(net.params)[name].shape)
  np.testing.assert_allclose(found[f'{first}/matrix'][0], x.T @ x / len(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_feedback_framework(framework):
  feedback = encoders.Feedback(moments_of(framework))
  assert output_error(framework, feedback) < 0.9 * output_error(framework, encoders.Rounding())


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_layer_by_layer_framework(framework):
  feedback = encoders.Feedback(moments_of(framework))
  fn = network(framework).apply
  encoder = encoders.LayerByLayer(fn, calibration_inputs(), first=feedback)
  assert output_error(framework, encoder) < 0.98 * output_error(framework, feedback)


class ConvNetwork(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.relu(nn.Conv(16, (3, 3))(x)).mean((1, 2)))


def test_convolution_linen():
  """Moments, and layer by layer, of `nn.Conv`."""
  images = jax.random.normal(jax.random.key(3), (16, 8, 8, 4))
  model = ConvNetwork()
  variables = model.init(jax.random.key(4), images)
  moments = second_moments(model.apply, variables, images)
  shapes = {name.removesuffix('/matrix'): leaf.shape for name, leaf in leaves(moments).items()}
  assert shapes == {'params/Conv_0/kernel': (1, 36, 36), 'params/Dense_0/kernel': (1, 16, 16)}
  first = encoders.Feedback(moments)
  encoder = encoders.LayerByLayer(model.apply, images, first=first)
  result = opq_jax.compress(variables, compression_rate=8.0, encoder=encoder)
  error = lambda params: float(
    jnp.square(model.apply(params, images) - model.apply(variables, images)).sum()
  )
  assert error(result.params) < error(opq_jax.compress(variables, compression_rate=8.0).params)


def test_importers_linen_alone():
  """Imported networks are modules of Linen."""
  from opq_jax import models

  assert {type(models.create(name)).__bases__[0] for name in models.names()} == {nn.Module}
  assert importers.sources('resnet50')
