"""Imported PyTorch weights give PyTorch's logits, and go home again bit for bit."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import pytest

from opq_jax import data, importers
from opq_jax.weights import read_weights
from tests.helpers import assets
from tests.helpers import torch_networks as networks

torch = pytest.importorskip('torch')
CLASSES = 7


class Case(NamedTuple):
  """A network in `opq_jax.models` and in PyTorch.

  Attributes:
    name: the network in `opq_jax.models`.
    source: the framework whose tensor names `network` uses.
    network: the network in `torch_networks`.
    network_options: options of that function.
    options: options of the network in `opq_jax.models`.
    tensorflow: whether it pads like TensorFlow, with the epsilon of TensorFlow's MobileNets.
    size: height and width of the images; odd if the network takes odd sizes.
  """

  name: str
  source: str
  network: Callable
  network_options: Mapping = MappingProxyType({})
  options: Mapping = MappingProxyType({})
  tensorflow: bool = False
  size: tuple[int, int] = (45, 64)


SMALL = {'hidden': 24}
RESNET50 = {'blocks': (3, 4, 6, 3), 'bottleneck': True}
CASES = [
  Case('alexnet', 'torchvision', networks.alexnet, SMALL, SMALL, size=(224, 224)),
  Case('alexnet', 'torchvision', networks.alexnet, SMALL, SMALL, size=(99, 131)),
  Case('vgg16', 'torchvision', networks.vgg16, SMALL, SMALL, size=(97, 64)),
  Case('vgg16_bn', 'torchvision', networks.vgg16_bn, SMALL, SMALL, size=(97, 64)),
  Case('mobilenet_v1', 'timm', networks.mobilenet_v1),
  *[
    Case(
      name,
      'huggingface',
      networks.mobilenet_v1,
      {'width': width, 'source': 'huggingface'},
      tensorflow=True,
    )
    for name, width in (('mobilenet_v1_075', 0.75), ('mobilenet_v1_050', 0.5))
  ],
  Case('mobilenet_v2', 'torchvision', networks.mobilenet_v2),
  Case(
    'mobilenet_v2',
    'torchvision',
    networks.mobilenet_v2,
    {'width': 0.35},
    {'width': 0.35, 'padding': 'SAME', 'epsilon': 0.001},
    tensorflow=True,
  ),
  Case('resnet18', 'torchvision', networks.resnet, {'blocks': (2, 2, 2, 2)}),
  Case('resnet34', 'torchvision', networks.resnet, {'blocks': (3, 4, 6, 3)}),
  Case('resnet50', 'torchvision', networks.resnet, RESNET50),
  Case(
    'resnet50',
    'torchvision',
    networks.resnet,
    RESNET50 | {'stride_first': True},
    {'stride_first': True},
  ),
  Case('resnet101', 'torchvision', networks.resnet, RESNET50 | {'blocks': (3, 4, 23, 3)}),
  *[
    Case(f'resnet{depth}', 'akamaster', networks.cifar_resnet, {'depth': depth}, size=(32, 27))
    for depth in (20, 32, 44, 56, 110)
  ],
]


def images(height, width):
  """Patterns and colours, so that the logits differ."""
  rng = np.random.default_rng(1)
  colours, patterns = rng.normal(0, 1, (3, 1, 1, 3)), rng.normal(0, 0.5, (3, height, width, 3))
  return (colours + patterns).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join([*case[:2], *case.options]))
def test_from_tensors_logits_equal_pytorchs(case):
  name, source, network, network_options, options, tensorflow, size = case
  tensors = networks.Tensors(tensorflow=tensorflow)
  expected = networks.logits(network, tensors, images(*size), CLASSES, **network_options)
  state_dict = tensors.numpy()
  counters = {
    key.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for key in state_dict
    if key.endswith('running_mean')
  }
  model, variables, found = importers.from_tensors(name, state_dict | counters, **options)
  assert found.name == source
  assert model.num_classes == CLASSES
  difference = np.abs(jax.jit(model.apply)(variables, images(*size)) - expected).max()
  assert difference <= 1e-4 * np.abs(expected).max()
  assert np.ptp(expected, axis=0).max() > 0.05 * np.abs(expected).max()

  returned = importers.to_tensors(name, variables, source, **options)
  assert returned.keys() == state_dict.keys()
  for key, tensor in returned.items():
    assert tensor.dtype == np.float32 and tensor.flags.c_contiguous and tensor.flags.writeable
    np.testing.assert_array_equal(tensor, state_dict[key], key)


@pytest.mark.parametrize(
  ('name', 'config', 'network'),
  [
    ('resnet50', 'ResNetConfig', 'ResNetForImageClassification'),
    ('mobilenet_v1', 'MobileNetV1Config', 'MobileNetV1ForImageClassification'),
    ('mobilenet_v2', 'MobileNetV2Config', 'MobileNetV2ForImageClassification'),
  ],
)
def test_from_tensors_equals_transformers(name, config, network):
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


@pytest.mark.slow
def test_mobilenet_v2_pretrained_logits():
  model, variables, source = importers.load('mobilenet_v2', assets.real_weights('mobilenet_v2'))
  tensors = networks.Tensors(read_weights(assets.real_weights('mobilenet_v2')))
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
