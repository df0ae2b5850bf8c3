"""The finetuning experiment on noise: its results, and how it continues after an interruption."""

import json
import os
import pathlib
import signal
import struct
import time

import flax.linen as nn
import jax
import numpy as np
import pytest

import opq_jax
from configs.finetune_imagenet import get_config as get_imagenet_config
from experiments import finetune, finetune_setup
from experiments.metric_log import MetricLog
from opq_jax import finetuning, importers
from opq_jax.allocation import paper
from opq_jax.compression import CompressionState, bits_per_weight
from opq_jax.core import trees
from tests.helpers import processes
from tests.helpers.smoke_configs import smoke

event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')

ROOT = pathlib.Path(__file__).parents[2]


# what the steps compute is for test_training.py
pytestmark = pytest.mark.slow


def start(workdir, *arguments, devices=2, **options):
  """Starts a run of four steps and a network of one block in another process."""
  return processes.start(
    *('-m', 'experiments.finetune', f'--workdir={workdir}'),
    f'--config={ROOT}/configs/finetune_resnet20_cifar10.py:15,smoke',
    *('--config.model_options.blocks=(1,)', '--config.fake_shape=(8, 8, 3)', '--config.steps=4'),
    *arguments,
    devices=devices,
    has_torch=False,
    **options,
  )


@pytest.fixture(scope='module')
def of_two_processes(tmp_path_factory):
  """The folder of such a run of two processes of one device each, which nothing disturbs."""
  folder = tmp_path_factory.mktemp('of_two_processes')
  apart = '--distributed', f'--coordinator=localhost:{processes.free_port()}', '--processes=2'
  both = [start(folder, *apart, f'--process={index}', devices=1) for index in range(2)]
  for process in both:
    process.finish()
  return folder


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The results and the folder of a run of four steps."""
  pytest.importorskip('matplotlib')
  workdir = tmp_path_factory.mktemp('finished')
  return finetune.run(smoke(steps=4), workdir), workdir


def test_finetune_writes_its_results(finished):
  result, workdir = finished
  assert [row['network'] for row in result['rows']] == [
    'float32',
    'one shot',
    'one shot, corrected',
    'finetuned, its file',
  ]
  rows = result['rows']
  assert rows[1]['file_rate'] == pytest.approx(15.45, rel=0.003)
  path = workdir / 'network.opq'
  assert path.stat().st_size == rows[-1]['file_bytes']
  written = json.loads((workdir / 'results.json').read_text())
  assert written == json.loads(json.dumps(result))
  assert str(workdir) not in json.dumps(result)
  assert (workdir / 'accuracy.png').read_bytes().startswith(b'\x89PNG')
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if line['kind'] == 'train']
  assert len(losses) == 4 and np.isfinite(losses).all()


def test_finetune_keeps_compression_state(finished):
  _, workdir = finished
  network, found = opq_jax.load(workdir / 'network.opq')
  with finetuning.Checkpoints(workdir / 'checkpoints') as checkpoints:
    state = checkpoints.restore_compression(
      jax.eval_shape(lambda tree: opq_jax.init_state(tree, opq_jax.allocate(tree)), network)
    )
  found, expected = (jax.tree.leaves(tree) for tree in (found, state))
  assert len(found) == len(expected) > 20
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(one, other)


def check_zero_cell(config, workdir):
  """Checks that weights of a finished run came back and others are gone, but not the smallest."""
  _, variables, _ = finetune_setup.float_network(config)
  with finetuning.Checkpoints(workdir / 'checkpoints') as checkpoints:
    state = checkpoints.restore_compression(
      jax.eval_shape(opq_jax.init_state, variables, opq_jax.allocate(variables))
    )
  loaded, _ = opq_jax.load(workdir / 'network.opq')
  kernel, finetuned, leaf = (
    tree['params']['head']['kernel'] for tree in (variables, loaded, state.tree)
  )
  before, after = np.asarray(leaf.mask), np.asarray(finetuned) != 0
  assert (after & ~before).any() and (before & ~after).any()
  is_pruned = ~before & (np.abs(kernel) <= config.zero_cell * leaf.threshold)
  assert is_pruned.any() and not after[is_pruned].any()


def test_finetune_from_feedback_codes(finished, tmp_path):
  plain = finished[0]['rows'][1]
  config = smoke(steps=1, feedback=True, unlabelled_batches=1, zero_cell=0.5, learning_rate=1.0)
  result = finetune.run(config, tmp_path)
  _, with_feedback, _, last = result['rows']
  assert with_feedback['file_bytes'] == pytest.approx(plain['file_bytes'], rel=0.01)
  assert last['file_bytes'] == (tmp_path / 'network.opq').stat().st_size
  check_zero_cell(config, tmp_path)
  targets = {'file_rate': 0.0, 'sparsity': 0.5, 'bits': 3.0}
  with pytest.raises(ValueError, match='feedback: found sparsity and bits'):
    finetune.run(smoke(feedback=True, **targets), tmp_path / 'other')


def test_finetune_starts_from_correction_at_its_bits(tmp_path, monkeypatch):
  begun, options = [], {}

  class Stopped(Exception):
    """Before the first step."""

  def stop(variables, *_, **__):
    begun.append(variables)
    raise Stopped

  monkeypatch.setattr(finetuning, 'init_train_state', stop)
  monkeypatch.setattr(finetuning, 'pmap_train_step', lambda *_, **own: options.update(own))
  config = smoke(price_of_bits=2.0)
  with pytest.raises(Stopped):
    finetune.run(config, tmp_path)
  [found] = begun
  model, variables, _ = finetune_setup.float_network(config)
  with finetuning.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    state = checkpoints.restore_compression(
      jax.eval_shape(opq_jax.init_state, variables, opq_jax.allocate(variables))
    )
  expected = opq_jax.correction.correct_batch_norm(
    model.apply,
    variables,
    opq_jax.apply_compression(variables, state),
    jax.random.key(config.seed),
    config.noise_shape,
  )
  for name, leaf in trees.named_leaves(found).items():
    is_latent = trees.named_leaves(state.tree).get(f'{name}/kinds') is not None
    source = variables if is_latent else expected
    np.testing.assert_array_equal(leaf, trees.named_leaves(source)[name], name)
  moved = jax.tree.map(
    lambda new, old: bool((new != old).any()), found['batch_stats'], variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved))
  # a price is of bits beyond those of the start
  kernels = CompressionState(state.tree['params'])
  bits = float(bits_per_weight(found['params'], kernels))
  assert (options['price_of_bits'], options['bits_limit']) == (2.0, pytest.approx(bits, rel=1e-6))


def test_finetune_continues_after_sigterm(finished, tmp_path, monkeypatch):
  _, workdir = finished
  pmap_train_step = finetuning.pmap_train_step

  def stopped_after_two(*arguments, **options):
    step = pmap_train_step(*arguments, **options)

    def with_signal(train_state, *rest):
      if int(train_state.step) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(train_state, *rest)

    return with_signal

  config = smoke(steps=4, checkpoint_every=100)
  with monkeypatch.context() as patch:
    patch.setattr(finetuning, 'pmap_train_step', stopped_after_two)
    assert finetune.run(config, tmp_path) is None
  assert not (tmp_path / 'network.opq').exists()
  assert (tmp_path / 'checkpoints' / '2').exists()
  # a line that the killed run would not have been able to vouch for
  MetricLog(tmp_path).write(3, kind='train', loss=0.0)
  assert finetune.run(config, tmp_path) is not None
  assert (tmp_path / 'network.opq').read_bytes() == (workdir / 'network.opq').read_bytes()
  lines = lambda folder: [
    {name: value for name, value in json.loads(line).items() if name != 'images_per_second'}
    for line in (folder / 'metrics.jsonl').read_text().splitlines()
  ]
  assert lines(tmp_path) == lines(workdir)


def test_finetune_killed_equals_two_processes(of_two_processes, tmp_path):
  """A run of one process that is killed and goes on: neither kill nor processes change its file."""
  with start(tmp_path, is_killed=True) as process:
    end = time.monotonic() + processes.TIMEOUT
    while not list((tmp_path / 'checkpoints').glob('[1-3]')):
      assert process.poll() is None and time.monotonic() < end, process.complaint()
      time.sleep(0.005)
    process.kill()
  assert process.returncode == -signal.SIGKILL
  assert not (tmp_path / 'network.opq').exists()
  start(tmp_path).finish()
  assert (tmp_path / 'network.opq').read_bytes() == (of_two_processes / 'network.opq').read_bytes()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  steps = [record['step'] for record in map(json.loads, lines) if record['kind'] == 'train']
  assert steps == [1, 2, 3, 4]
  rows, others = (
    json.loads((folder / 'results.json').read_text())['rows']
    for folder in (tmp_path, of_two_processes)
  )
  assert rows == others


def events(folder):
  """Of TensorBoard's files: (step, name, value), or the step from which older ones are dropped."""
  found = []
  for path in sorted(folder.glob('events.out.tfevents.*'), key=os.path.getmtime):
    rest = path.read_bytes()
    while rest:
      (size,) = struct.unpack('<Q', rest[:8])
      event = event_pb2.Event.FromString(rest[12 : 12 + size])
      rest = rest[16 + size :]
      if event.HasField('session_log'):
        found.append((event.step, 'start', None))
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return found


def test_tensorboard_equals_metric_log(finished):
  _, workdir = finished
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  expected = [
    (line['step'], f'{line["kind"]}/{name}', pytest.approx(value, rel=1e-3, abs=1e-5))
    for line in lines
    for name, value in line.items()
    if line['kind'] in ('train', 'test') and name not in ('step', 'kind')
  ]
  assert len(expected) > 12
  assert events(workdir) == [(0, 'start', None), *expected]


class Plain(nn.Module):
  """No BatchNorm."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.Conv(16, (3, 3), name='conv')(x))
    return nn.Dense(self.num_classes, name='head')(x.reshape(len(x), -1))


@pytest.mark.parametrize(('optimizer', 'teacher'), [('sgd', ''), ('adamw', 'resnet32')])
def test_finetune_without_batch_norm(tmp_path, monkeypatch, optimizer, teacher):
  pytest.importorskip('matplotlib')
  model = Plain()
  variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  imported = importers.Imported(model, variables, importers.sources('resnet20')[0])
  asked = []

  def float_network(config):
    asked.append((config.model, config.weights, config.model_options.to_dict()))
    return imported

  monkeypatch.setattr(finetune_setup, 'float_network', float_network)
  config = smoke(
    optimizer=optimizer,
    teacher=teacher,
    teacher_weights='folder/teacher.safetensors' if teacher else '',
    steps=3,
    distillation=0.5,
    label_smoothing=0.1,
    accumulation=2,
    ema_decay=0.9,
    eval_every=1,
    file_rate=0.0,
    sparsity=0.6,
    bits=3.0,
  )
  result = finetune.run(config, tmp_path, ['--config.steps=3'])
  assert result['command'].endswith('--config.steps=3')
  assert asked[1:] == ([(teacher, 'folder/teacher.safetensors', {})] if teacher else [])
  assert result['config']['teacher_weights'] == ('teacher.safetensors' if teacher else '')
  network, state = opq_jax.load(tmp_path / 'network.opq')
  assert set(network) == {'params'}
  kernel = state.tree['params']['head']['kernel']
  np.testing.assert_array_equal(network['params']['head']['kernel'] != 0, kernel.mask)
  with opq_jax.OpqFile(tmp_path / 'network.opq') as file:
    assert file.metadata['model'] == 'resnet20'
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if line['kind'] == 'test'] == [1, 2, 3]


def test_metric_log_drops_torn_line(tmp_path):
  log = MetricLog(tmp_path)
  assert log.records() == []
  for step in (1, 2, 3):
    log.write(step, kind='train', loss=1 / 3)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4, "lo')
  assert [record['step'] for record in log.records()] == [1, 2, 3]
  log.keep_until(2)
  log.close()
  record = {'kind': 'train', 'loss': 0.33333}
  assert log.records() == [{'step': 1, **record}, {'step': 2, **record}]


def test_finetune_vgg16_of_the_paper(tmp_path):
  pytest.importorskip('matplotlib')
  result = finetune.run(get_imagenet_config('vgg16,paper,smoke'), tmp_path)
  assert result['steps'] == 2
  _, state = opq_jax.load(tmp_path / 'network.opq')
  masks = [leaf.mask for leaf in jax.tree.leaves(state.tree, is_leaf=is_record) if leaf is not None]
  pruned = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
  assert pruned == pytest.approx(paper.TARGETS['vgg16'].sparsity, abs=1e-3)


def is_record(node):
  return node is None or isinstance(node, opq_jax.compression.LeafState)
