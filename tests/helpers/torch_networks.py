"""The networks in plain PyTorch, written from their papers and independent of `opq_jax.models`.

A network is a function of a `Tensors` and a batch.  It asks for its weights by the names that its
source gives them: from a real file, or drawn at random, so that one run makes a whole state dict.
"""

import numpy as np
import pytest

torch = pytest.importorskip('torch')
F = torch.nn.functional


class Tensors(dict):
  """Tensors by name; one that is missing is drawn, small enough that the image is still felt."""

  def __init__(self, tensors=None, tensorflow=False):
    super().__init__({name: torch.from_numpy(np.array(t)) for name, t in (tensors or {}).items()})
    self.rng = np.random.default_rng(0)
    self.epsilon = 0.001 if tensorflow else 1e-5
    self.tensorflow = tensorflow

  def get(self, name, shape, low, high):
    if name not in self:
      self[name] = torch.from_numpy(self.rng.uniform(low, high, shape).astype(np.float32))
    return self[name]

  def weights(self, name, shape, bias):
    limit = np.sqrt(6 / np.prod(shape[1:]))
    weight = self.get(f'{name}.weight', shape, -limit, limit)
    return weight, self.get(f'{name}.bias', shape[:1], -0.3, 0.3) if bias else None

  def conv(self, name, x, features, size, stride=1, padding=None, groups=1, bias=False):
    shape = (features, x.shape[1] // groups, size, size)
    weight, bias = self.weights(name, shape, bias)
    if self.tensorflow:
      pads = []
      for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
      x, padding = F.pad(x, pads), 0
    padding = size // 2 if padding is None else padding
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)

  def norm(self, name, x):
    vector = lambda leaf, low, high: self.get(f'{name}.{leaf}', x.shape[1:2], low, high)
    mean, var = vector('running_mean', -0.3, 0.3), vector('running_var', 0.5, 1.5)
    weight, bias = vector('weight', 0.5, 1.5), vector('bias', -0.3, 0.5)
    return F.batch_norm(x, mean, var, weight, bias, eps=self.epsilon)

  def dense(self, name, x, features):
    return F.linear(x, *self.weights(name, (features, x.shape[1]), True))

  def numpy(self):
    return {name: tensor.numpy() for name, tensor in self.items()}


def alexnet(t, x, classes, hidden=4096):
  for place, features, size, stride, padding in [
    (0, 64, 11, 4, 2),
    (3, 192, 5, 1, 2),
    (6, 384, 3, 1, 1),
    (8, 256, 3, 1, 1),
    (10, 256, 3, 1, 1),
  ]:
    x = F.relu(t.conv(f'features.{place}', x, features, size, stride, padding, bias=True))
    if place in (0, 3, 10):
      x = F.max_pool2d(x, 3, 2)
  x = F.adaptive_avg_pool2d(x, 6).flatten(1)
  x = F.relu(t.dense('classifier.1', x, hidden))
  x = F.relu(t.dense('classifier.4', x, hidden))
  return t.dense('classifier.6', x, classes)


def vgg16(t, x, classes, batch_norm=False, hidden=4096):
  place = 0
  for entry in [64, 64, 'M', 128, 128, 'M', *[256] * 3, 'M', *[512] * 3, 'M', *[512] * 3, 'M']:
    if entry == 'M':
      x = F.max_pool2d(x, 2)
      place += 1
      continue
    x = t.conv(f'features.{place}', x, entry, 3, bias=True)
    if batch_norm:
      x = t.norm(f'features.{place + 1}', x)
    x = F.relu(x)
    place += 3 if batch_norm else 2
  x = F.adaptive_avg_pool2d(x, 7).flatten(1)
  x = F.relu(t.dense('classifier.0', x, hidden))
  x = F.relu(t.dense('classifier.3', x, hidden))
  return t.dense('classifier.6', x, classes)


def vgg16_bn(t, x, classes, hidden=4096):
  return vgg16(t, x, classes, True, hidden)


def resnet(t, x, classes, blocks, bottleneck=False, stride_first=False):
  """torchvision's names."""
  x = F.relu(t.norm('bn1', t.conv('conv1', x, 64, 7, 2)))
  x = F.max_pool2d(x, 3, 2, 1)
  for stage, count in enumerate(blocks):
    for number in range(count):
      block = f'layer{stage + 1}.{number}'
      stride = 2 if stage and not number else 1
      inside = 64 * 2**stage
      layer = lambda n, y, *how, b=block: t.norm(f'{b}.bn{n}', t.conv(f'{b}.conv{n}', y, *how))
      if bottleneck:
        outside = 4 * inside
        y = F.relu(layer(1, x, inside, 1, stride if stride_first else 1))
        y = F.relu(layer(2, y, inside, 3, 1 if stride_first else stride))
        y = layer(3, y, outside, 1)
      else:
        outside = inside
        y = layer(2, F.relu(layer(1, x, inside, 3, stride)), inside, 3)
      if x.shape != y.shape:
        x = t.conv(f'{block}.downsample.0', x, outside, 1, stride)
        x = t.norm(f'{block}.downsample.1', x)
      x = F.relu(x + y)
  return t.dense('fc', x.mean((2, 3)), classes)


def cifar_resnet(t, x, classes, depth):
  """Option A; the names of akamaster/pytorch_resnet_cifar10."""
  x = F.relu(t.norm('bn1', t.conv('conv1', x, 16, 3)))
  for stage, features in enumerate((16, 32, 64)):
    for number in range((depth - 2) // 6):
      block = f'layer{stage + 1}.{number}'
      stride = 2 if stage and not number else 1
      y = F.relu(t.norm(f'{block}.bn1', t.conv(f'{block}.conv1', x, features, 3, stride)))
      y = t.norm(f'{block}.bn2', t.conv(f'{block}.conv2', y, features, 3))
      if stride == 2:
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, features // 4, features // 4))
      x = F.relu(x + y)
  return t.dense('linear', x.mean((2, 3)), classes)


def mobilenet_v1(t, x, classes, width=1.0, source='timm'):
  """timm's names or Hugging Face's."""
  channels = lambda n: max(int(n * width), 8)

  def layer(x, timm, huggingface, features, *how):
    module = f'mobilenet_v1.{huggingface}'
    conv, norm = timm if source == 'timm' else (f'{module}.convolution', f'{module}.normalization')
    return F.relu6(t.norm(norm, t.conv(conv, x, features, *how)))

  x = layer(x, ('conv_stem', 'bn1'), 'conv_stem', channels(32), 3, 2)
  place = 0
  stages = [[64], [128, 128], [256, 256], [512] * 6, [1024] * 2]
  for stage, widths in enumerate(stages):
    for number, features in enumerate(widths):
      block = f'blocks.{stage}.{number}'
      deep = (x.shape[1], 3, 2 if stage and not number else 1, None, x.shape[1])
      x = layer(x, (f'{block}.conv_dw', f'{block}.bn1'), f'layer.{place}', *deep)
      names = (f'{block}.conv_pw', f'{block}.bn2')
      x = layer(x, names, f'layer.{place + 1}', channels(features), 1)
      place += 2
  return t.dense('classifier', x.mean((2, 3)), classes)


def mobilenet_v2(t, x, classes, width=1.0):
  """torchvision's names."""

  def channels(count):
    rounded = max(8, int(count * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * count * width else rounded

  def layer(name, x, features, *how):
    return F.relu6(t.norm(f'{name}.1', t.conv(f'{name}.0', x, features, *how)))

  x = layer('features.0', x, channels(32), 3, 2)
  number = 0
  for expansion, features, count, first in [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
  ]:
    for repeat in range(count):
      number += 1
      block, place = f'features.{number}.conv', 0
      y, hidden = x, x.shape[1] * expansion
      if expansion != 1:
        y = layer(f'{block}.0', y, hidden, 1)
        place = 1
      y = layer(f'{block}.{place}', y, hidden, 3, 1 if repeat else first, None, hidden)
      y = t.conv(f'{block}.{place + 1}', y, channels(features), 1)
      y = t.norm(f'{block}.{place + 2}', y)
      x = x + y if x.shape == y.shape else y
  x = layer('features.18', x, max(1280, channels(1280)), 1)
  return t.dense('classifier.1', x.mean((2, 3)), classes)


def logits(network, tensors, images, *arguments, **options):
  """Of NHWC images, as an array."""
  x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, 3, 1)))
  with torch.no_grad():
    return network(tensors, x, *arguments, **options).numpy()
