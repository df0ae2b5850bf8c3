"""Training checkpoints: an optimizer's state is left out of a file, or kept bit for bit."""

import functools
import json
import os

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax.training import train_state

import opq_jax
from opq_jax import cli
from opq_jax.cli import in_memory, optimizers
from opq_jax.core import trees


def run(*argv):
  return cli.main([str(word) for word in argv])


@pytest.fixture(scope='module')
def trained():
  """A state after a step of Adam: moments, a counter, parameters."""
  draw = np.random.default_rng(0).laplace
  params = {
    f'Dense_{i}': {'kernel': draw(size=(64, 64)).astype('f4'), 'bias': np.ones(64, 'f4')}
    for i in range(2)
  }
  optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
  state = train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
  return stepped(state, jax.tree.map(lambda leaf: leaf * 1e-6, params))


def stepped(state, gradients):
  with jax.numpy_dtype_promotion('standard'):  # optax mixes types of numbers
    return state.apply_gradients(grads=gradients)


@pytest.fixture(params=['msgpack', 'orbax', 'safetensors', 'npz'])
def path(request, trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tree = jax.tree.map(np.asarray, flax.serialization.to_state_dict(trained))
  named = {name.replace('/', '.'): leaf for name, leaf in trees.named_leaves(tree).items()}
  path = tmp_path / f'run.{request.param}'
  match request.param:
    case 'msgpack':
      path.write_bytes(flax.serialization.to_bytes(trained))
    case 'orbax':
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    case 'safetensors':
      safetensors.numpy.save_file(named, path)
    case 'npz':
      np.savez(path, **named)
  return path


def leaves_of(path):
  """Leaves of a file by name, with dots for the folders of a tree."""
  named = trees.named_leaves(opq_jax.load(path)[0])
  return {name.replace('/', '.'): leaf for name, leaf in named.items()}


def originals(trained):
  tree = flax.serialization.to_state_dict(trained)
  return {k.replace('/', '.'): np.asarray(v) for k, v in trees.named_leaves(tree).items()}


def test_compress_leaves_optimizer_out(path, trained, capsys):
  assert run('compress', path, 'run.opq') == 0
  captured = capsys.readouterr()
  wanted = originals(trained)
  cleared = {name for name, leaf in wanted.items() if name.startswith('opt_state') and leaf.ndim}
  size = sum(wanted[name].nbytes for name in cleared)
  assert f'{len(cleared)} leaves of {size:,} bytes are left out' in captured.err
  found = leaves_of('run.opq')
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    if name in cleared:
      # second moments, and first moments of biases, whose gradients are positive
      number = 0 if (leaf < 0).any() else np.mean(leaf, dtype=np.float64)
      assert ('nu' in name or 'bias' in name) == (number > 0)
      np.testing.assert_array_equal(found[name], np.full_like(leaf, number), name)
    elif 'kernel' not in name:  # the learning rate, the step, biases
      assert found[name].tobytes() == leaf.tobytes(), name
  assert found['params.Dense_0.kernel'].any()
  assert run('verify', 'run.opq', '--against', path) == 0
  # sizes are those of the rest: 2 kernels and 2 biases in float32, and a few scalars
  capsys.readouterr()
  assert run('inspect', 'run.opq', '--json') == 0
  totals = json.loads(capsys.readouterr().out)['totals']
  assert 0 <= totals['original'] - 4 * 2 * (64 * 64 + 64) < 64


def test_compress_keeps_optimizer(path, trained, capsys):
  assert run('compress', path, 'run.opq', '--keep-optimizer') == 0
  assert 'optimizer' not in capsys.readouterr().err
  found = leaves_of('run.opq')
  for name, leaf in originals(trained).items():
    if name.startswith('opt_state'):
      assert found[name].tobytes() == leaf.tobytes(), name
  assert run('verify', 'run.opq', '--against', path) == 0


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_file_rate_without_optimizer(trained, tmp_path, suffix, monkeypatch):
  monkeypatch.chdir(tmp_path)
  named = originals(trained)
  if suffix == 'msgpack':
    (tmp_path / 'run.msgpack').write_bytes(flax.serialization.to_bytes(trained))
  else:
    safetensors.numpy.save_file(named, tmp_path / 'run.safetensors')
  assert run('compress', f'run.{suffix}', 'run.opq', '--file-rate', '6') == 0
  rest = sum(leaf.nbytes for name, leaf in named.items() if not name.startswith('opt_state'))
  assert rest / os.stat('run.opq').st_size == pytest.approx(6, rel=0.02)


def test_restored_state_trains_on(trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'run.msgpack').write_bytes(flax.serialization.to_bytes(trained))
  assert run('compress', 'run.msgpack', 'run.opq') == 0
  again = flax.serialization.from_state_dict(trained, opq_jax.load('run.opq')[0])
  moved = stepped(again, trained.params)
  assert np.isfinite(np.asarray(moved.params['Dense_0']['kernel'])).all()


def test_restored_adam_stays_where_it_was(tmp_path, monkeypatch):
  """A fresh Adam would make its first steps as long as the learning rate, in every weight."""
  monkeypatch.chdir(tmp_path)
  goal, curvature = np.random.default_rng(0).normal(size=(2, 32, 32)).astype('f4')
  gradient = lambda params: {'kernel': np.square(curvature) * (params['kernel'] - goal)}
  state = train_state.TrainState.create(
    apply_fn=None, params={'kernel': np.zeros((32, 32), 'f4')}, tx=optax.adam(0.03)
  )
  step = jax.jit(lambda state: stepped(state, gradient(state.params)))
  for _ in range(400):
    state = step(state)
  (tmp_path / 'run.msgpack').write_bytes(flax.serialization.to_bytes(state))
  assert run('compress', 'run.msgpack', 'run.opq') == 0
  restored = flax.serialization.from_state_dict(state, opq_jax.load('run.opq')[0])
  distances = {}
  for name, opt_state in (
    ('kept', state.opt_state),
    ('restored', restored.opt_state),
    ('fresh', state.tx.init(state.params)),
  ):
    later = state.replace(opt_state=opt_state)
    for _ in range(3):
      later = step(later)
    distances[name] = float(np.sum(np.square(curvature * (later.params['kernel'] - goal))))
  assert distances['restored'] < 1.5 * distances['kept'] < 0.15 * distances['fresh']


def test_verify_of_zeros_in_the_place_of_an_optimizer(trained, tmp_path, monkeypatch):
  """Files had zeros at first, also for counters."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'run.msgpack').write_bytes(flax.serialization.to_bytes(trained))
  of_earlier = functools.partial(optimizers.without_optimizer, kept='left_out')
  with monkeypatch.context() as patch:
    patch.setattr(in_memory, 'MEANS', 'left_out')
    patch.setattr(in_memory, 'without_optimizer', of_earlier)
    assert run('compress', 'run.msgpack', 'run.opq') == 0
  assert not leaves_of('run.opq')['opt_state.inner_state.0.count'].any()
  assert run('verify', 'run.opq', '--against', 'run.msgpack') == 0


def test_torch_optimizer_is_said(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  model = torch.nn.Linear(32, 16)
  optimizer = torch.optim.Adam(model.parameters())
  model(torch.ones(1, 32)).sum().backward()
  optimizer.step()
  torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, 'run.pt')
  assert run('compress', 'run.pt', 'run.opq') == 0
  said = capsys.readouterr().err
  assert 'optimizer: 4,232 bytes of an optimizer are left out; opq compress --keep-opt' in said
  assert set(opq_jax.load('run.opq')[0]) == {'weight', 'bias'}
  assert run('verify', 'run.opq', '--against', 'run.pt') == 0


@pytest.mark.parametrize('kind', [torch.optim.Adam, torch.optim.SGD])
def test_torch_optimizer_is_kept(tmp_path, monkeypatch, capsys, kind):
  """An optimizer of PyTorch takes its next step from the file as from the checkpoint."""
  monkeypatch.chdir(tmp_path)
  torch.manual_seed(0)
  options = {'momentum': 0.9} if kind is torch.optim.SGD else {'amsgrad': True}

  def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()

  model = torch.nn.Linear(32, 16)
  optimizer = kind(model.parameters(), lr=1e-2, **options)
  step(model, optimizer, torch.randn(4, 32))
  state = optimizer.state_dict()
  state['param_groups'][0]['note'] = 'a text'
  torch.save({'epoch': 3, 'model': model.state_dict(), 'optimizer': state}, 'run.pt')
  assert run('compress', 'run.pt', 'run.opq', '--keep-optimizer') == 0
  said = capsys.readouterr().err
  assert 'optimizer/param_groups/0/note: found neither tensors nor numbers' in said
  assert 'bytes of an optimizer' not in said
  assert run('verify', 'run.opq', '--against', 'run.pt') == 0

  loaded = opq_jax.load('run.opq')[0]
  assert set(loaded) == {'weight', 'bias', 'optimizer'}
  moments = loaded['optimizer']['state']
  for number, tensors in state['state'].items():
    for name, tensor in tensors.items():
      found = torch.from_numpy(moments[number][name])
      assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
  groups = [
    {name: value if value is None else value.tolist() for name, value in group.items()}
    for group in loaded['optimizer']['param_groups']
  ]
  as_tensors = jax.tree.map(torch.from_numpy, moments)
  results = []
  for saved in (state, {'state': as_tensors, 'param_groups': groups}):
    twin = torch.nn.Linear(32, 16)
    twin.load_state_dict(model.state_dict())
    again = kind(twin.parameters())
    again.load_state_dict(saved)
    step(twin, again, torch.ones(2, 32))
    results.append(twin.weight.detach())
  assert torch.equal(*results)
