"""Sources are recognised, errors list what does not fit, and the way home is the way back."""

import functools
import re

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import data, importers, models
from tests.helpers import assets
from tests.helpers.variables import random_variables

CLASSES = 7


@pytest.fixture(scope='module')
def cifar_test():
  """The 10,000 test images and their labels, prepared once for both networks."""

  @functools.cache
  def load(preprocessing):
    folder = assets.assets() / 'tfds'
    batches = list(
      data.batches('cifar10', 'test', data_dir=folder, batch_size=500, preprocessing=preprocessing)
    )
    return tuple(np.concatenate([batch[key] for batch in batches]) for key in ('image', 'label'))

  return load


def state_dict(name, source='torchvision', num_classes=CLASSES, **options):
  """Random tensors by the names of a source, which `test_torch.py` has from elsewhere."""
  variables = random_variables(models.create(name, num_classes=num_classes, **options))
  return importers.to_tensors(name, variables, source, **options)


def huggingface_resnet_name(name):
  """From torchvision's, by the modules of transformers' modeling_resnet.py."""
  name = re.sub(r'^fc\.', 'classifier.1.', name)
  name = re.sub(r'^conv1\.', 'resnet.embedder.embedder.convolution.', name)
  name = re.sub(r'^bn1\.', 'resnet.embedder.embedder.normalization.', name)
  stage = lambda match: f'resnet.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.'
  name = re.sub(r'^layer(\d)\.(\d+)\.', stage, name)
  name = name.replace('.downsample.0.', '.shortcut.convolution.')
  name = name.replace('.downsample.1.', '.shortcut.normalization.')
  layer = lambda match: (
    f'.layer.{int(match[2]) - 1}.' + {'conv': 'convolution.'}.get(match[1], 'normalization.')
  )
  return re.sub(r'\.(conv|bn)(\d)\.', layer, name)


def huggingface_v2_name(name):
  """From torchvision's, by the modules of transformers' modeling_mobilenet_v2.py."""
  last = name.rpartition('.')[2]
  if name.startswith('classifier'):
    return f'classifier.{last}'
  number, *rest = (int(part) for part in re.findall(r'\.(\d+)', name))
  if number in (0, 18):
    module, kind = {0: 'conv_stem.first_conv', 18: 'conv_1x1'}[number], rest[0]
  else:
    places = ['conv_3x3', 'reduce_1x1'] if number == 1 else ['expand_1x1', 'conv_3x3', 'reduce_1x1']
    # the last convolution and its BatchNorm are not grouped there
    place, kind = (len(places) - 1, rest[0] - len(places) + 1) if len(rest) == 1 else rest
    block = 'conv_stem' if number == 1 else f'layer.{number - 2}'
    module = f'{block}.{places[place]}'
  return f'mobilenet_v2.{module}.{("convolution", "normalization")[kind]}.{last}'


def test_from_tensors_huggingface():
  tensors = state_dict('resnet18')
  ours = importers.from_tensors('resnet18', tensors)
  renamed = {huggingface_resnet_name(name): tensor for name, tensor in tensors.items()}
  theirs = importers.from_tensors('resnet18', renamed)
  assert (ours.source.name, theirs.source.name) == ('torchvision', 'huggingface')
  assert theirs.model == ours.model
  assert theirs.source.preprocessing.resample == 'bicubic'
  jax.tree.map(np.testing.assert_array_equal, theirs.variables, ours.variables)

  tensors = state_dict('mobilenet_v2')
  ours = importers.from_tensors('mobilenet_v2', tensors)
  renamed = {huggingface_v2_name(name): tensor for name, tensor in tensors.items()}
  theirs = importers.from_tensors('mobilenet_v2', renamed)
  assert theirs.source.name == 'huggingface'
  assert theirs.model == ours.model.clone(padding='SAME', epsilon=0.001)
  jax.tree.map(np.testing.assert_array_equal, theirs.variables, ours.variables)


def test_from_tensors_of_a_named_source():
  tensors = state_dict('resnet50')
  resize = lambda **options: (
    importers.from_tensors('resnet50', tensors, **options).source.preprocessing.resize
  )
  assert resize() == 256
  assert resize(source='torchvision_v2') == 232
  assert resize(source='timm') == 235
  with pytest.raises(ValueError, match="source: found 'caffe2', expected one of torchvision, "):
    resize(source='caffe2')


def test_load_a_data_parallel_checkpoint(tmp_path):
  torch = pytest.importorskip('torch')
  tensors = state_dict('resnet20', 'akamaster')
  wrapped = {f'module.{name}': torch.from_numpy(tensor) for name, tensor in tensors.items()}
  torch.save({'state_dict': wrapped, 'epoch': 3}, tmp_path / 'net.pth')
  loaded = importers.load('resnet20', tmp_path / 'net.pth')
  direct = importers.from_tensors('resnet20', tensors)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, direct.variables)


def test_from_tensors_drops_the_background():
  tensors = state_dict('resnet18')
  whole = importers.from_tensors('resnet18', tensors)
  model, variables, _ = importers.from_tensors('resnet18', tensors, num_classes=CLASSES - 1)
  assert (whole.model.num_classes, model.num_classes) == (CLASSES, CLASSES - 1)
  for leaf in ('kernel', 'bias'):
    expected = whole.variables['params']['head'][leaf][..., 1:]
    np.testing.assert_array_equal(variables['params']['head'][leaf], expected)
  message = r'fc.bias: found shape \(7,\), expected \(5,\)'
  with pytest.raises(ValueError, match=message):
    importers.from_tensors('resnet18', tensors, num_classes=5)


def test_from_tensors_lists_all_differences():
  tensors = state_dict('resnet18')
  del tensors['layer2.0.downsample.1.running_var']
  tensors['avgpool.scale'] = np.zeros(3, np.float32)
  tensors['conv1.weight'] = np.zeros((64, 1, 7, 7), np.float32)
  with pytest.raises(ValueError) as caught:
    importers.from_tensors('resnet18', tensors)
  assert str(caught.value).splitlines() == [
    "the tensors are not those of torchvision's resnet18 (7 classes):",
    '  avgpool.scale: found shape (3,), expected no such tensor',
    '  conv1.weight: found shape (64, 1, 7, 7), expected (64, 3, 7, 7)',
    '  layer2.0.downsample.1.running_var: not found, expected shape (128,)',
  ]


def test_from_tensors_of_no_known_source():
  with pytest.raises(ValueError) as caught:
    importers.from_tensors('resnet18', {'a.b': np.zeros(3)})
  assert str(caught.value) == (
    'resnet18: found tensors a.b, …, expected those of '
    'torchvision: conv1.weight, bn1.bias, bn1.weight, …; '
    'huggingface: resnet.embedder.embedder.convolution.weight, '
    'resnet.embedder.embedder.normalization.bias, resnet.embedder.embedder.normalization.weight, …'
  )


def test_to_tensors_of_another_network():
  _, variables, _ = importers.from_tensors('resnet18', state_dict('resnet18'))
  with pytest.raises(ValueError) as caught:
    importers.to_tensors('resnet34', variables, 'torchvision')
  first, *lines = str(caught.value).splitlines()
  assert first == "the variables are not those of torchvision's resnet34 (7 classes):"
  assert lines[0] == (
    '  batch_stats/stage_1_block_3/conv_1_bn/mean: not found, expected shape (64,)'
  )


def test_to_tensors_of_a_compressed_network(tmp_path):
  variables = random_variables(models.create('alexnet', num_classes=CLASSES, hidden=8))
  # a convolution and the dense layer behind the last one, of which each has an order of its own
  allocation = opq_jax.allocate(
    variables,
    compression_rate=12.0,
    compressible=lambda path, _: 'conv_2' in path or 'dense_1' in path,
  )
  state = opq_jax.init_state(variables, allocation)
  compressed = opq_jax.apply_compression(variables, state)

  opq_jax.save(tmp_path / 'net.opq', compressed, state)
  stored, _ = opq_jax.load(tmp_path / 'net.opq')
  tensors = importers.to_tensors('alexnet', stored, 'torchvision', hidden=8)
  opq_jax.weights.write_safetensors(tmp_path / 'home.safetensors', tensors)
  again = importers.load('alexnet', tmp_path / 'home.safetensors', hidden=8)
  jax.tree.map(np.testing.assert_array_equal, again.variables, compressed)

  # and in PyTorch's order, which the way through our own importer would not tell
  params = jax.tree.map(np.asarray, compressed['params'])
  weight, kernel = tensors['features.3.weight'], params['conv_2']['kernel']
  np.testing.assert_array_equal(weight[7, 5], kernel[:, :, 5, 7])
  weight, kernel = tensors['classifier.1.weight'], params['dense_1']['kernel']
  row, column, channel = 5, 1, 200
  np.testing.assert_array_equal(
    weight[:, channel * 36 + row * 6 + column], kernel[(row * 6 + column) * 256 + channel]
  )


@pytest.fixture
def optimized():
  """Compiles as users do: ten thousand images take longer than the compiler."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


@pytest.mark.slow
@pytest.mark.parametrize(('depth', 'hits'), [(20, 9173), (32, 9263)])
def test_load_published_cifar_accuracy(cifar_test, optimized, depth, hits):
  path = assets.assets() / f'weights/resnet{depth}_cifar10.safetensors'
  model, variables, source = importers.load(f'resnet{depth}', path)
  images, labels = cifar_test(source.preprocessing)
  apply = jax.jit(lambda batch: model.apply(variables, batch).argmax(-1))
  answers = np.concatenate([apply(batch) for batch in np.split(images, 200)])
  assert (answers == labels).sum() == hits
