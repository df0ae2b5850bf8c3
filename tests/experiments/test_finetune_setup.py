"""What a finetuning run starts from: its config, its teacher, and its first compression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opq_jax
from configs.finetune_imagenet import get_config as get_imagenet_config
from configs.finetune_resnet20_cifar10 import get_config
from experiments import finetune_setup
from opq_jax import finetuning, importers, models
from opq_jax.allocation import paper
from opq_jax.correction import correct_batch_norm
from opq_jax.importers import networks
from tests.helpers.smoke_configs import smoke

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('argument', ['10', '12.5', '30,resnet32', '15,smoke'])
def test_get_config_reads_argument(argument):
  config = get_config(argument)
  assert config.file_rate == float(argument.split(',')[0])
  assert config.model == ('resnet32' if 'resnet32' in argument else 'resnet20')


@pytest.mark.parametrize('argument', ['15,20', 'smok', ''])
def test_get_config_refuses_argument(argument):
  with pytest.raises(ValueError, match='argument: found'):
    get_config(argument)


def test_configs_have_the_same_fields():
  config = get_imagenet_config('vgg16,paper')
  assert set(config) == set(get_config())
  assert (config.model, config.same_size, config.file_rate) == ('vgg16', False, 0.0)
  assert (config.sparsity, config.bits) == paper.TARGETS['vgg16'][:2]
  assert get_imagenet_config('vgg16,same_size').same_size
  assert get_imagenet_config('resnet50,18').file_rate == 18.0
  for argument in ('resnet50', 'paper', 'resnet50,paper,18', 'resnet51,paper'):
    with pytest.raises(ValueError, match='argument: found'):
      get_imagenet_config(argument)


def test_teacher_is_one_that_can_teach(monkeypatch):
  sources = {name: importers.sources(name)[0] for name in ('resnet20', 'resnet50')}
  network = lambda config: importers.Imported(None, None, sources[config.model])
  monkeypatch.setattr(finetune_setup, 'float_network', network)
  own = network(smoke())
  with pytest.raises(ValueError, match="found 'resnet32' and distillation 0"):
    finetune_setup.teacher(smoke(teacher='resnet32', teacher_weights='file'), own)
  with pytest.raises(ValueError, match=r'found a network that reads .*, expected '):
    options = {'teacher_weights': 'file', 'distillation': 0.5}
    finetune_setup.teacher(smoke(teacher='resnet50', **options), own)
  for option in ('teacher', 'teacher_weights'):
    with pytest.raises(ValueError, match='expected both or neither'):
      finetune_setup.teacher(smoke(distillation=0.5, **{option: 'resnet32'}), own)


CONFIGS = [get_config('20,resnet32'), *(get_imagenet_config(f'{n},paper') for n in paper.TARGETS)]


@pytest.mark.parametrize('config', CONFIGS, ids=lambda config: config.model)
def test_whole_networks_trace(config):
  """Traced alone, at their full size."""
  options = {'num_classes': config.num_classes, 'dtype': jnp.dtype(config.dtype)}
  model = models.create(config.model, **options, **config.model_options.to_dict())
  variables = models.variable_shapes(model)
  optimizer = finetune_setup.make_optimizer(config, optax.constant_schedule(config.learning_rate))
  key = jax.random.key(config.seed)

  def step(variables, batch):
    state = opq_jax.init_state(variables, opq_jax.allocate(variables))
    start = opq_jax.apply_compression(variables, state)
    if networks.has_batch_norm(variables):
      correct = functools.partial(correct_batch_norm, model.apply, variables, start)
      start = correct(key, config.noise_shape)
    before = finetuning.init_train_state(start, optimizer, key)
    state = opq_jax.CompressionState(state.tree['params'])
    after, metrics = finetuning.train_step(
      before, state, batch, apply_fn=model.apply, optimizer=optimizer
    )
    return before, after, metrics

  image = jax.ShapeDtypeStruct((config.batch_size, *config.fake_shape), np.float32)
  label = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
  before, after, metrics = jax.eval_shape(step, variables, {'image': image, 'label': label})
  assert after == before
  assert before.params == variables['params']
  assert metrics['loss'].shape == ()


def test_compress_same_size():
  two = smoke(file_rate=0.0, sparsity=0.6, bits=3.0)
  one = smoke(same_size=True, sparsity=0.6, bits=3.0)
  imported = finetune_setup.float_network(two)
  network = networks.Network('resnet20', *imported)
  states = [finetune_setup.compress(config, network, []) for config in (two, one)]
  variables = finetune_setup.to_save(two, network, network.variables)
  reports = [opq_jax.size_report(variables, state) for state in states]
  assert reports[1].file == pytest.approx(reports[0].file, rel=0.003)
  assert reports[0].sparsity == pytest.approx(0.6, abs=1e-3)
  assert abs(reports[1].sparsity - 0.6) > 0.02


@pytest.mark.parametrize(('rate', 'model'), [(10, 'resnet20'), (30, 'resnet20'), (20, 'resnet32')])
def test_compress_leaves_room_to_grow(rate, model):
  config = get_config(f'{rate},{model},smoke')
  imported = finetune_setup.float_network(config)
  network = networks.Network(model, *imported)
  state = finetune_setup.compress(config, network, [])
  variables = finetune_setup.to_save(config, network, network.variables)
  found = opq_jax.size_report(variables, state).file_rate
  assert found == pytest.approx(rate * (1 + config.growth), rel=0.003)


def test_make_optimizer_refuses_unknown():
  with pytest.raises(ValueError, match="optimizer: found 'adagrad', expected sgd or adamw"):
    finetune_setup.make_optimizer(smoke(optimizer='adagrad'), lambda step: 0.1)


def test_augmentation_of_refuses_unknown():
  with pytest.raises(ValueError, match="augmentation: found 'cutout', expected one of cifar, "):
    finetune_setup.augmentation_of(smoke(augmentation='cutout'))
