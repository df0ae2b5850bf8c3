"""Imported weights give the logits that an independent implementation gives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opq_jax import data
from opq_jax.importers import tf_slim
from opq_jax.models import MobileNetV1
from tests.helpers import assets

# (output channels, stride) of Conv2d_1 to Conv2d_13 as TF-slim's mobilenet_v1.py lists them
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
LAYERS += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]


def torch_logits(tensors, images):
  """TF-slim's MobileNet-V1 in plain PyTorch, straight from the checkpoint's tensors."""
  torch = pytest.importorskip('torch')
  functional = torch.nn.functional
  tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}

  def convolve(x, kernel, stride, groups=1):
    pads = []
    for size in (x.shape[3], x.shape[2]):
      total = max((-(-size // stride) - 1) * stride + kernel.shape[2] - size, 0)
      pads += [total // 2, total - total // 2]
    return functional.conv2d(functional.pad(x, pads), kernel, stride=stride, groups=groups)

  def normalize(x, layer):
    names = ('moving_mean', 'moving_variance', 'gamma', 'beta')
    statistics = [tensors[f'MobilenetV1/{layer}/BatchNorm/{name}'] for name in names]
    return functional.relu6(functional.batch_norm(x, *statistics, eps=0.001))

  kernel = lambda layer: tensors[f'MobilenetV1/{layer}/weights'].permute(3, 2, 0, 1)
  x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
  x = normalize(convolve(x, kernel('Conv2d_0'), 2), 'Conv2d_0')
  for number, (_, stride) in enumerate(LAYERS, start=1):
    deep, point = f'Conv2d_{number}_depthwise', f'Conv2d_{number}_pointwise'
    filters = tensors[f'MobilenetV1/{deep}/depthwise_weights'].permute(2, 3, 0, 1)
    x = normalize(convolve(x, filters, stride, groups=x.shape[1]), deep)
    x = normalize(convolve(x, kernel(point), 1), point)
  x = convolve(x.mean((2, 3), keepdim=True), kernel('Logits/Conv2d_1c_1x1'), 1)[:, :, 0, 0]
  return (x + tensors['MobilenetV1/Logits/Conv2d_1c_1x1/biases']).numpy()


def random_tensors(width=0.25, num_classes=5):
  """A checkpoint with TF-slim's names and shapes and random, harmless values."""
  rng = np.random.default_rng(0)
  tensors = {}

  def add(name, shape, low, high):
    tensors[f'MobilenetV1/{name}'] = rng.uniform(low, high, shape).astype(np.float32)

  def add_layer(layer, weights, shape, channels):
    fan_in = np.prod(shape[:3]) if weights == 'weights' else 9
    add(f'{layer}/{weights}', shape, -2 / np.sqrt(fan_in), 2 / np.sqrt(fan_in))
    for name, low, high in [
      ('gamma', 0.5, 1.5),
      ('beta', -0.5, 1.0),
      ('moving_mean', -0.2, 0.2),
      # below 1, so that the image is still felt thirteen blocks later; a tenth of this makes
      # the network chaotic, and rounding errors as large as the logits
      ('moving_variance', 0.2, 0.8),
    ]:
      add(f'{layer}/BatchNorm/{name}', (channels,), low, high)

  before = int(32 * width)
  add_layer('Conv2d_0', 'weights', (3, 3, 3, before), before)
  for number, (channels, _) in enumerate(LAYERS, start=1):
    after = int(channels * width)
    add_layer(f'Conv2d_{number}_depthwise', 'depthwise_weights', (3, 3, before, 1), before)
    add_layer(f'Conv2d_{number}_pointwise', 'weights', (1, 1, before, after), after)
    before = after
  add('Logits/Conv2d_1c_1x1/weights', (1, 1, before, num_classes + 1), -0.2, 0.2)
  add('Logits/Conv2d_1c_1x1/biases', (num_classes + 1,), -1, 1)
  return tensors


@pytest.fixture(scope='module')
def pretrained():
  tensors = load_file(assets.real_weights('mobilenet_v1'))
  return tensors, tf_slim.mobilenet_v1(tensors)


def test_tf_slim_logits_equal_pytorchs():
  tensors = random_tensors()
  rng = np.random.default_rng(1)
  # an odd size and an even one, where 'SAME' pads differently; colours, so that the logits differ
  images = rng.uniform(-1, 1, (3, 1, 1, 3)) + rng.uniform(-0.3, 0.3, (3, 45, 64, 3))
  images = images.astype(np.float32)
  expected = torch_logits(tensors, images)[:, 1:]
  variables = tf_slim.mobilenet_v1(tensors, num_classes=5, width=0.25)
  found = jax.jit(MobileNetV1(num_classes=5, width=0.25).apply)(variables, images)
  assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
  assert np.ptp(expected, axis=0).max() > 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_tf_slim_pretrained_logits(pretrained):
  tensors, variables = pretrained
  folder = assets.assets() / 'tfds'
  apply = jax.jit(MobileNetV1().apply)
  hits = []
  for batch in data.batches(
    'imagenet2012', 'validation[:48]', data_dir=folder, batch_size=8, preprocessing=data.TF_SLIM
  ):
    logits = np.asarray(apply(variables, batch['image']))
    if not hits:
      expected = torch_logits(tensors, batch['image'])[:, 1:]
      assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    hits += list(logits.argmax(-1) == batch['label'])
  assert len(hits) == 48
  assert np.mean(hits) >= 0.85


def test_tf_slim_variables_are_float32():
  variables = tf_slim.mobilenet_v1(random_tensors(), num_classes=5, width=0.25)
  model = MobileNetV1(num_classes=5, width=0.25)
  expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert described(variables) == described(expected)


def test_tf_slim_copies_the_checkpoint():
  tensors = random_tensors()
  variables = tf_slim.mobilenet_v1(tensors, num_classes=5, width=0.25)
  tensors['MobilenetV1/Conv2d_0/weights'][:] = 0
  assert bool((variables['params']['stem']['kernel'] != 0).all())


def test_tf_slim_lists_all_differences():
  tensors = random_tensors()
  del tensors['MobilenetV1/Conv2d_3_pointwise/weights']
  tensors['global_step'] = np.zeros((), np.int64)
  tensors['MobilenetV1/Conv2d_0/BatchNorm/beta'] = np.zeros(9, np.float32)
  with pytest.raises(ValueError) as caught:
    tf_slim.mobilenet_v1(tensors, num_classes=5, width=0.25)
  first, *lines = str(caught.value).splitlines()
  assert '5 classes, width 0.25' in first
  assert [line.strip() for line in lines] == [
    'MobilenetV1/Conv2d_0/BatchNorm/beta: found shape (9,), expected (8,)',
    'MobilenetV1/Conv2d_3_pointwise/weights: not found, expected shape (1, 1, 32, 32)',
    'global_step: found shape (), expected no such tensor',
  ]


def test_tf_slim_refuses_another_width():
  with pytest.raises(
    ValueError, match=re.escape('found shape (3, 3, 3, 8), expected (3, 3, 3, 32)')
  ):
    tf_slim.mobilenet_v1(random_tensors())
