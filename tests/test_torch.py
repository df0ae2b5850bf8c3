"""Imported PyTorch weights give PyTorch's logits, and go home again unchanged."""

import re

import assets
import jax
import numpy as np
import pytest
from test_models import random_variables

import opq_jax
from opq_jax import data, importers, models, weight_files

torch = pytest.importorskip('torch')
networks = pytest.importorskip('torch_networks')
CLASSES = 7
SMALL = {'hidden': 24}
TENSORFLOW = {'epsilon': 0.001, 'same': True}
RESNET50 = {'blocks': (3, 4, 6, 3), 'bottleneck': True}

# name, source, PyTorch function, its options, our options, how PyTorch pads and normalises, sizes
CASES = [
  ('alexnet', 'torchvision', networks.alexnet, SMALL, SMALL, {}, [(224, 224), (99, 131)]),
  ('vgg16', 'torchvision', networks.vgg16, SMALL, SMALL, {}, [(97, 64)]),
  ('vgg16_bn', 'torchvision', networks.vgg16, SMALL | {'batch_norm': True}, SMALL, {}, [(97, 64)]),
  ('mobilenet_v1', 'timm', networks.mobilenet_v1, {}, {}, {}, [(45, 64)]),
  (
    'mobilenet_v1_075',
    'huggingface',
    networks.mobilenet_v1,
    {'width': 0.75, 'source': 'huggingface'},
    {},
    TENSORFLOW,
    [(45, 64)],
  ),
  ('mobilenet_v1_050', 'timm', networks.mobilenet_v1, {'width': 0.5}, {}, {}, [(64, 45)]),
  ('mobilenet_v2', 'torchvision', networks.mobilenet_v2, {}, {}, {}, [(45, 64)]),
  (
    'mobilenet_v2',
    'torchvision',
    networks.mobilenet_v2,
    {'width': 0.35},
    {'width': 0.35, 'padding': 'SAME', 'epsilon': 0.001},
    TENSORFLOW,
    [(45, 64)],
  ),
  ('resnet18', 'torchvision', networks.resnet, {'blocks': (2, 2, 2, 2)}, {}, {}, [(45, 64)]),
  ('resnet34', 'torchvision', networks.resnet, {'blocks': (3, 4, 6, 3)}, {}, {}, [(64, 45)]),
  ('resnet50', 'torchvision', networks.resnet, RESNET50, {}, {}, [(45, 64)]),
  (
    'resnet50',
    'torchvision',
    networks.resnet,
    RESNET50 | {'stride_first': True},
    {'stride_first': True},
    {},
    [(45, 64)],
  ),
  (
    'resnet101',
    'torchvision',
    networks.resnet,
    RESNET50 | {'blocks': (3, 4, 23, 3)},
    {},
    {},
    [(45, 64)],
  ),
  *[
    (f'resnet{depth}', 'akamaster', networks.cifar_resnet, {'depth': depth}, {}, {}, [(32, 27)])
    for depth in (20, 32, 44, 56, 110)
  ],
]


def images(height, width):
  """Patterns and colours, so that the logits differ."""
  rng = np.random.default_rng(1)
  return (rng.normal(0, 1, (3, 1, 1, 3)) + rng.normal(0, 0.5, (3, height, width, 3))).astype(
    np.float32
  )


@pytest.mark.parametrize(
  ('name', 'source', 'network', 'theirs', 'ours', 'form', 'sizes'),
  CASES,
  ids=[f'{case[0]}-{case[1]}-{"-".join(case[4])}'.rstrip('-') for case in CASES],
)
def test_logits_are_pytorchs_and_tensors_return_unchanged(
  name, source, network, theirs, ours, form, sizes
):
  tensors = networks.Tensors(**form)
  expected = [networks.logits(network, tensors, images(*size), CLASSES, **theirs) for size in sizes]
  state_dict = tensors.numpy()
  counters = {
    key.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for key in state_dict
    if key.endswith('running_mean')
  }
  model, variables, found = importers.from_tensors(name, state_dict | counters, **ours)
  assert found.name == source
  assert model.num_classes == CLASSES
  for size, reference in zip(sizes, expected, strict=True):
    difference = np.abs(jax.jit(model.apply)(variables, images(*size)) - reference).max()
    assert difference <= 1e-4 * np.abs(reference).max(), size
    assert np.ptp(reference, axis=0).max() > 0.05 * np.abs(reference).max()

  returned = importers.to_tensors(name, variables, source, **ours)
  assert returned.keys() == state_dict.keys()
  for key, tensor in returned.items():
    assert tensor.dtype == np.float32 and tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor, state_dict[key], key)


def small_resnet():
  """A state dict of a ResNet-18 with seven classes."""
  tensors = networks.Tensors()
  networks.logits(networks.resnet, tensors, images(33, 33), CLASSES, blocks=(2, 2, 2, 2))
  return tensors.numpy()


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


def test_huggingface_differs_by_its_names_in_resnet_and_by_its_padding_too_in_mobilenet():
  tensors = small_resnet()
  ours = importers.from_tensors('resnet18', tensors)
  renamed = {huggingface_resnet_name(name): tensor for name, tensor in tensors.items()}
  theirs = importers.from_tensors('resnet18', renamed)
  assert (ours.source.name, theirs.source.name) == ('torchvision', 'huggingface')
  assert theirs.model == ours.model
  assert theirs.source.preprocessing.resample == 'bicubic'
  jax.tree.map(np.testing.assert_array_equal, theirs.variables, ours.variables)

  tensors = networks.Tensors()
  networks.logits(networks.mobilenet_v2, tensors, images(32, 32), CLASSES)
  tensors = tensors.numpy()
  ours = importers.from_tensors('mobilenet_v2', tensors)
  renamed = {huggingface_v2_name(name): tensor for name, tensor in tensors.items()}
  theirs = importers.from_tensors('mobilenet_v2', renamed)
  assert theirs.source.name == 'huggingface'
  assert theirs.model == ours.model.clone(padding='SAME', epsilon=0.001)
  jax.tree.map(np.testing.assert_array_equal, theirs.variables, ours.variables)


def test_who_names_the_source_gets_its_preprocessing():
  tensors = networks.Tensors()
  networks.logits(networks.resnet, tensors, images(33, 33), CLASSES, **RESNET50)
  tensors = tensors.numpy()
  resize = lambda **options: (
    importers.from_tensors('resnet50', tensors, **options).source.preprocessing.resize
  )
  assert resize() == 256
  assert resize(source='torchvision_v2') == 232
  assert resize(source='timm') == 235
  with pytest.raises(ValueError, match="source: found 'keras', expected one of torchvision, "):
    resize(source='keras')


def test_a_checkpoint_of_a_parallel_training_run_is_read(tmp_path):
  tensors = networks.Tensors()
  networks.logits(networks.cifar_resnet, tensors, images(16, 16), 10, depth=20)
  state_dict = {f'module.{name}': tensor for name, tensor in tensors.items()}
  torch.save({'state_dict': state_dict, 'epoch': 3}, tmp_path / 'net.pth')
  loaded = importers.load('resnet20', tmp_path / 'net.pth')
  direct = importers.from_tensors('resnet20', tensors.numpy())
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, direct.variables)


def test_one_class_fewer_drops_the_background():
  tensors = small_resnet()
  whole = importers.from_tensors('resnet18', tensors)
  model, variables, _ = importers.from_tensors('resnet18', tensors, num_classes=CLASSES - 1)
  assert (whole.model.num_classes, model.num_classes) == (CLASSES, CLASSES - 1)
  expected = jax.jit(whole.model.apply)(whole.variables, images(33, 33))[:, 1:]
  found = jax.jit(model.apply)(variables, images(33, 33))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  message = r'fc.bias: found shape \(7,\), expected \(5,\)'
  with pytest.raises(ValueError, match=message):
    importers.from_tensors('resnet18', tensors, num_classes=5)


def test_one_error_lists_every_tensor_that_does_not_fit():
  tensors = small_resnet()
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


def test_tensors_of_no_known_source_are_an_error_that_shows_both():
  with pytest.raises(ValueError) as caught:
    importers.from_tensors('resnet18', {'a.b': np.zeros(3)})
  assert str(caught.value) == (
    'resnet18: found tensors a.b, …, expected those of '
    'torchvision: conv1.weight, bn1.bias, bn1.weight, …; '
    'huggingface: resnet.embedder.embedder.convolution.weight, '
    'resnet.embedder.embedder.normalization.bias, resnet.embedder.embedder.normalization.weight, …'
  )


def test_variables_of_another_network_do_not_go_home_by_this_name():
  _, variables, _ = importers.from_tensors('resnet18', small_resnet())
  with pytest.raises(ValueError) as caught:
    importers.to_tensors('resnet34', variables, 'torchvision')
  first, *lines = str(caught.value).splitlines()
  assert first == "the variables are not those of torchvision's resnet34 (7 classes):"
  assert lines[0] == (
    '  batch_stats/stage_1_block_3/conv_1_bn/mean: not found, expected shape (64,)'
  )


def test_a_compressed_network_goes_home_bit_for_bit(tmp_path):
  variables = random_variables(models.create('alexnet', num_classes=CLASSES, **SMALL))
  allocation = opq_jax.allocate(variables, compression_rate=12.0)
  state = opq_jax.init_state(variables, allocation)
  compressed = opq_jax.apply_compression(variables, state)

  opq_jax.save(tmp_path / 'net.opq', compressed, state)
  stored, _ = opq_jax.load(tmp_path / 'net.opq')
  tensors = importers.to_tensors('alexnet', stored, 'torchvision', **SMALL)
  opq_jax.write_safetensors(tmp_path / 'home.safetensors', tensors)
  again = importers.load('alexnet', tmp_path / 'home.safetensors', **SMALL)
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


@pytest.mark.parametrize(
  ('name', 'config', 'network'),
  [
    ('resnet50', 'ResNetConfig', 'ResNetForImageClassification'),
    ('mobilenet_v1', 'MobileNetV1Config', 'MobileNetV1ForImageClassification'),
    ('mobilenet_v2', 'MobileNetV2Config', 'MobileNetV2ForImageClassification'),
  ],
)
def test_logits_are_those_of_transformers(name, config, network):
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  reference = getattr(transformers, network)(getattr(transformers, config)(num_labels=CLASSES))
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for key, tensor in reference.state_dict().items():
      if tensor.ndim > 1:
        limit = np.sqrt(6 / np.prod(tensor.shape[1:]))
      elif tensor.ndim == 1:
        limit = 0.3
      else:
        continue
      drawn = torch.from_numpy(rng.uniform(-limit, limit, tensor.shape).astype(np.float32))
      is_scale = key.endswith(('running_var', 'normalization.weight'))
      tensor.copy_(1 + drawn if is_scale else drawn)
  state_dict = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
  model, variables, source = importers.from_tensors(name, state_dict)
  assert source.name == 'huggingface'
  for size in ((64, 64), (75, 97)):
    x = images(*size)
    with torch.no_grad():
      expected = reference.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).logits.numpy()
    difference = np.abs(jax.jit(model.apply)(variables, x) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max(), size
    assert np.ptp(expected, axis=0).max() > 0.05 * np.abs(expected).max()


def test_pretrained_mobilenet_v2_recognises_photographs_with_pytorchs_logits():
  model, variables, source = importers.load('mobilenet_v2', assets.real_weights('mobilenet_v2'))
  tensors = networks.Tensors(weight_files.read_weights(assets.real_weights('mobilenet_v2')))
  hits = []
  apply = jax.jit(model.apply)
  for batch in data.batches(
    'imagenet2012',
    'validation[:48]',
    data_dir=assets.assets() / 'tfds',
    batch_size=8,
    preprocessing=source.preprocessing,
  ):
    logits = np.asarray(apply(variables, batch['image']))
    if not hits:
      expected = networks.logits(networks.mobilenet_v2, tensors, batch['image'], 1000)
      assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    hits += list(logits.argmax(-1) == batch['label'])
  assert len(hits) == 48
  assert np.mean(hits) >= 0.75


@pytest.mark.parametrize(('depth', 'accuracy'), [(20, 0.9173), (32, 0.9263)])
def test_pretrained_cifar_resnets_have_the_accuracy_that_pytorch_has(depth, accuracy):
  path = assets.assets() / f'weights/resnet{depth}_cifar10.safetensors'
  model, variables, source = importers.load(f'resnet{depth}', path)
  hits = []
  apply = jax.jit(model.apply)
  for batch in data.batches(
    'cifar10',
    'test',
    data_dir=assets.assets() / 'tfds',
    batch_size=500,
    preprocessing=source.preprocessing,
  ):
    logits = np.asarray(apply(variables, batch['image']))
    hits += list(logits.argmax(-1) == batch['label'])
  assert len(hits) == 10_000
  assert np.mean(hits) == pytest.approx(accuracy, abs=1e-9)
