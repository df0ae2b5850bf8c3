"""Weights of Keras' applications: from files made by hand, and against Keras where it is there."""

import json
import os
import re
import zipfile

import jax
import numpy as np
import pytest

from opq_jax import importers, models
from opq_jax.weights import read_weights
from tests.helpers.variables import random_variables

h5py = pytest.importorskip('h5py')
CLASSES = 7


def tensors_of(name, **options):
  return importers.to_tensors(
    name, random_variables(models.create(name, num_classes=CLASSES, **options)), 'keras', **options
  )


def write_keras_2(path, tensors, root='', scope=''):
  """As Keras 2 names them: <layer>/<layer>/<weight>:0."""
  with h5py.File(path, 'w') as file:
    group = file.create_group(root) if root else file
    group.attrs['layer_names'] = sorted({name.split('/')[0] for name in tensors})
    for name, tensor in tensors.items():
      layer, weight = name.split('/')
      if tensor.shape[-1] == 1 and tensor.ndim == 4:
        weight = f'depthwise_{weight}'
      group[f'{layer}/{scope}{layer}/{weight}:0'] = tensor
  return path


def write_keras_3(path, tensors, has_names=True):
  """By class and number, in any order; and the configuration of a .keras file."""
  order = {
    'kernel': 0,
    'bias': 1,
    'gamma': 0,
    'beta': 1,
    'moving_mean': 2,
    'moving_variance': 3,
  }
  classes = {}
  for name, tensor in tensors.items():
    layer, weight = name.split('/')
    if 'moving' in weight:
      classes[layer] = ('batch_normalization', 'BatchNormalization')
    elif weight == 'kernel':
      is_deep = tensor.ndim == 4 and tensor.shape[-1] == 1
      deep = ('depthwise_conv2d', 'DepthwiseConv2D') if is_deep else ('conv2d', 'Conv2D')
      classes[layer] = deep if tensor.ndim == 4 else ('dense', 'Dense')
  groups, config = {}, [{'class_name': 'InputLayer', 'config': {'name': 'input'}}]
  for layer, (group, class_name) in classes.items():
    number = sum(known.startswith(f'{group}_') or known == group for known in groups.values())
    groups[layer] = f'{group}_{number}' if number else group
    config.append({'class_name': class_name, 'config': {'name': layer}})
  with h5py.File(path, 'w') as file:
    file.create_group('optimizer/vars')['0'] = np.zeros(3)
    file.create_group('layers/activation/vars')
    for name, tensor in tensors.items():
      layer, weight = name.split('/')
      variables = file.require_group(f'layers/{groups[layer]}/vars')
      variables[str(order[weight])] = tensor
      if has_names:
        variables.attrs['name'] = layer
  return {'class_name': 'Functional', 'config': {'layers': config}}


def zipped(folder, tensors, **options):
  config = write_keras_3(folder / 'model.weights.h5', tensors, **options)
  with zipfile.ZipFile(folder / 'net.keras', 'w') as archive:
    archive.writestr('config.json', json.dumps(config))
    archive.write(folder / 'model.weights.h5', 'model.weights.h5')
  return folder / 'net.keras'


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor, name)


def test_read_weights_names_what_keras_has_beside_layers(tmp_path):
  tensors = tensors_of('mobilenet_v1', width=0.25)
  old = write_keras_2(tmp_path / 'a.h5', tensors, root='model_weights')
  with h5py.File(old, 'a') as file:
    file['optimizer_weights/adam/kernel_momentum'] = np.zeros(5, np.float32)
  new = tmp_path / 'b.weights.h5'
  write_keras_3(new, tensors)
  for path, name in ((old, 'optimizer_weights'), (new, 'optimizer')):
    with pytest.warns(UserWarning, match=f'{path.name}: {name}: the state of an optimizer is left'):
      assert_equal(read_weights(path), tensors)
  with h5py.File(new, 'a') as file:
    file['encoder/vars/0'] = np.ones((8, 8), np.float32)
  with pytest.raises(ValueError, match=r'b\.weights\.h5: .*encoder: found weights beside layers'):
    read_weights(new)


@pytest.mark.filterwarnings('ignore:.*the state of an optimizer is left out')
def test_read_weights_keras_1_to_3(tmp_path):
  tensors = tensors_of('mobilenet_v1', width=0.25)
  assert_equal(read_weights(write_keras_2(tmp_path / 'a.h5', tensors)), tensors)
  path = write_keras_2(tmp_path / 'b.h5', tensors, root='model_weights', scope='mobilenet/')
  assert_equal(read_weights(path), tensors)
  write_keras_3(tmp_path / 'c.weights.h5', tensors)
  assert_equal(read_weights(tmp_path / 'c.weights.h5'), tensors)
  for has_names in (True, False):
    path = zipped(tmp_path, tensors, has_names=has_names)
    assert_equal(read_weights(path), tensors)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('resnet50', {}),
    ('vgg16', {'hidden': 8}),
    ('mobilenet_v1', {'width': 0.25}),
    ('mobilenet_v2', {'width': 0.35}),
  ],
)
def test_load_and_to_tensors_keras(tmp_path, name, options):
  tensors = tensors_of(name, **options)
  path = write_keras_2(tmp_path / 'net.h5', tensors)
  model, variables, source = importers.load(name, path, **options)
  assert (source.name, model.num_classes) == ('keras', CLASSES)
  again = importers.to_tensors(name, variables, 'keras', **options)
  assert_equal(again, tensors)


def test_from_tensors_resnet_biases_and_rgb():
  tensors = tensors_of('resnet50')
  plain = importers.from_tensors('resnet50', tensors)
  assert plain.model == models.create(
    'resnet50', num_classes=CLASSES, stride_first=True, epsilon=1.001e-5
  )
  kernel = plain.variables['params']['stem']['kernel']
  np.testing.assert_array_equal(kernel[:, :, 0], tensors['conv1_conv/kernel'][:, :, 2])
  biases = {
    name: np.full_like(tensor, 0.25)
    for name, tensor in tensors.items()
    if name.endswith('_conv/bias')
  }
  assert len(biases) == 53
  moved = importers.from_tensors('resnet50', tensors | biases).variables
  for (path, found), (_, mean) in zip(
    jax.tree_util.tree_leaves_with_path(moved['batch_stats']),
    jax.tree_util.tree_leaves_with_path(plain.variables['batch_stats']),
    strict=True,
  ):
    shift = 0.25 if path[-1].key == 'mean' else 0.0
    np.testing.assert_array_equal(found, mean - shift)


def test_from_tensors_names_a_bias_left():
  tensors = tensors_of('resnet50')
  tensors['conv1_conv/bias'] = np.zeros(3, np.float32)
  del tensors['conv2_block1_1_bn/moving_mean']
  with pytest.raises(ValueError) as caught:
    importers.from_tensors('resnet50', tensors)
  assert str(caught.value).splitlines() == [
    "the tensors are not those of keras's resnet50 (7 classes):",
    '  conv1_conv/bias: found shape (3,), expected no such tensor',
    '  conv2_block1_1_bn/moving_mean: not found, expected shape (64,)',
    '  conv2_block1_1_conv/bias: found shape (64,), expected no such tensor',
  ]


def test_preprocessing_equals_keras():
  image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
  (source,) = (s for s in importers.sources('resnet50') if s.name == 'keras')
  found = source.preprocessing(image)[..., ::-1]  # blue first, and the kernel turned back
  expected = image[16:240, 16:240, ::-1] - np.array([103.939, 116.779, 123.68])
  np.testing.assert_allclose(found, expected, atol=1e-4)


def damage_link(file, target):
  file['layers/conv2d/vars/0'] = h5py.ExternalLink(target, '/secret')


def damage_soft(file, target):
  file['layers/conv2d/vars/0'] = h5py.SoftLink('/layers/conv2d/vars/1')
  file['layers/conv2d/vars/1'] = np.zeros(3)


def damage_raw(file, target):
  variables = file.create_group('layers/conv2d/vars')
  variables.create_dataset('0', (3,), 'f4', external=[(target, 0, 12)])


def damage_shape(file, target):
  file.create_dataset('layers/conv2d/vars/0', (1 << 40,), 'f4', chunks=(1024,), compression='gzip')


def damage_names(file, target):
  file['layers/conv2d/vars/0'] = np.zeros((3, 3))
  del file['layers/conv2d/vars'].attrs['name']


def damage_depth(file, target):
  file['layers/functional/layers/conv2d/vars/0'] = np.zeros((3, 3))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (damage_link, 'found a ExternalLink, expected no links'),
    (damage_soft, 'found a SoftLink, expected no links'),
    (damage_raw, 'found data in another file'),
    (damage_shape, 'found 0 bytes, expected those of'),
    (damage_names, 'conv2d: found no name of the layer'),
    (damage_depth, 'functional: found a layer of layers'),
  ],
)
def test_read_weights_refuses_keras_links(tmp_path, damage, message):
  with h5py.File(tmp_path / 'secret.h5', 'w') as file:
    file['secret'] = np.zeros(3)
  with h5py.File(tmp_path / 'net.weights.h5', 'w') as file:
    file.create_group('layers')
    if damage is not damage_depth:
      file.create_group('layers/conv2d/vars').attrs['name'] = 'stem'
    if damage is damage_raw:
      del file['layers/conv2d']
    damage(file, str(tmp_path / 'secret.h5'))
    if damage is damage_raw:
      file['layers/conv2d/vars'].attrs['name'] = 'stem'
  with pytest.raises(ValueError, match=re.escape(message)):
    read_weights(tmp_path / 'net.weights.h5')


def test_read_weights_names_damaged_keras(tmp_path):
  for name in ('net.h5', 'net.keras'):
    (tmp_path / name).write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))
    with pytest.raises(ValueError, match=f'{name}: expected a'):
      read_weights(tmp_path / name)
  with zipfile.ZipFile(tmp_path / 'net.keras', 'w') as archive:
    archive.writestr('config.json', '{}')
  with pytest.raises(ValueError, match=r"net.keras: found \['config.json'\], expected"):
    read_weights(tmp_path / 'net.keras')


def test_read_weights_without_h5py(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'h5py', None)
  with pytest.raises(ValueError, match=r'pip install opq_jax\[keras\]'):
    read_weights(tmp_path / 'net.h5')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  ('name', 'application', 'ours', 'theirs', 'suffix'),
  [
    ('mobilenet_v1', 'MobileNet', {'width': 0.25}, {'alpha': 0.25}, '.weights.h5'),
    ('mobilenet_v1_050', 'MobileNet', {}, {'alpha': 0.5}, '.h5'),
    ('mobilenet_v2', 'MobileNetV2', {'width': 0.35}, {'alpha': 0.35}, '.keras'),
    ('resnet50', 'ResNet50', {}, {}, '.keras'),
    ('vgg16', 'VGG16', {}, {}, '.weights.h5'),
  ],
)
def test_load_gives_the_logits_of_keras(tmp_path, name, application, ours, theirs, suffix):
  os.environ.setdefault('KERAS_BACKEND', 'torch')
  keras = pytest.importorskip('keras')
  # its dense layers want the size that the weights are for
  side = 224 if name == 'vgg16' else 96
  reference = getattr(keras.applications, application)(
    weights=None,
    classes=CLASSES,
    input_shape=(side, side, 3),
    classifier_activation=None,
    **theirs,
  )
  rng = np.random.default_rng(0)
  for weight in reference.weights:
    if len(weight.shape) > 1:
      fan_in = 9 if weight.shape[-1] == 1 else np.prod(weight.shape[:-1])
      weight.assign(rng.normal(0, np.sqrt(2 / fan_in), weight.shape))
    else:
      is_scale = weight.name in ('gamma', 'moving_variance')
      weight.assign(rng.uniform(*((0.5, 1.5) if is_scale else (-0.3, 0.3)), weight.shape))
  path = tmp_path / f'net{suffix}'
  (reference.save_weights if suffix == '.weights.h5' else reference.save)(path)

  colours, patterns = rng.normal(0, 1, (2, 1, 1, 3)), rng.normal(0, 0.5, (2, side, side, 3))
  images = (colours + patterns).astype(np.float32)
  has_blue_first = application in ('ResNet50', 'VGG16')
  expected = np.asarray(
    keras.ops.convert_to_numpy(
      reference(images[..., ::-1].copy() if has_blue_first else images, training=False)
    )
  )
  model, variables, source = importers.load(name, path, **ours)
  assert source.name == 'keras'
  found = jax.jit(model.apply)(variables, images)
  assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
  assert np.ptp(expected, axis=0).max() > 0.05 * np.abs(expected).max()

  # and home
  tensors = importers.to_tensors(name, variables, 'keras', **ours)
  for layer in reference.layers:
    layer.set_weights([tensors[f'{layer.name}/{weight.name}'] for weight in layer.weights])
  again = keras.ops.convert_to_numpy(
    reference(images[..., ::-1].copy() if has_blue_first else images, training=False)
  )
  assert np.abs(np.asarray(again) - expected).max() <= 1e-5 * np.abs(expected).max()
