"""The corrections of PyTorch modules: moments and biases against networks written out by hand."""

import copy
import sys
import warnings

import flax.linen as linen
import jax
import numpy as np
import pytest
import safetensors.torch

import opq_jax
from opq_jax import cli, correction
from opq_jax.correction import natural_noise

torch = pytest.importorskip('torch')
nn = torch.nn

SHAPE = 32, 3, 8, 8


def drawn(module, seed=0):
  """The module with weights, biases and statistics as training leaves them: none is 0 or 1."""
  generator = torch.Generator().manual_seed(seed)
  for name, tensor in module.state_dict().items():
    if tensor.is_floating_point():
      low, high = (0.5, 1.5) if name.endswith('var') or tensor.ndim == 1 else (-0.6, 0.6)
      tensor.uniform_(low, high, generator=generator)
  return module


def rough(module, levels=3):
  """A copy whose weights of two axes or more are rounded."""
  copied = copy.deepcopy(module)
  for tensor in copied.state_dict().values():
    if tensor.ndim > 1:
      tensor.copy_((tensor * levels).round() / levels)
  return copied


def convolutional():
  """Normalized convolutions, grouped and depthwise too; dropout, and a bias before the first."""
  return drawn(
    nn.Sequential(
      nn.Conv2d(3, 8, 3),
      nn.BatchNorm2d(8),
      nn.ReLU(),
      nn.Conv2d(8, 8, 3, groups=8, bias=False),
      nn.BatchNorm2d(8),
      nn.ReLU6(),
      nn.Conv2d(8, 12, 1, groups=2, bias=False),
      nn.BatchNorm2d(12),
      nn.Dropout(0.5),
      nn.AdaptiveAvgPool2d(1),
      nn.Flatten(),
      nn.Linear(12, 5),
    )
  )


NORMS = 1, 4, 7


def batch_run(module, x):
  """Moments at every normalization and the mean output, in training mode and by its formula."""
  moments = []
  for layer in module:
    if isinstance(layer, nn.BatchNorm2d):
      mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
      moments.append((mean, var))
      view = lambda v: v.reshape(1, -1, 1, 1)
      x = (x - view(mean)) / view(var + layer.eps).sqrt() * view(layer.weight) + view(layer.bias)
    elif not isinstance(layer, nn.Dropout):
      x = layer(x)
  return moments, x.mean(0)


def changed(module, other):
  """Names of the tensors that differ."""
  pairs = zip(module.state_dict().items(), other.state_dict().values(), strict=True)
  return {name for (name, one), two in pairs if not torch.equal(one, two)}


@pytest.mark.parametrize('source', ['noise', 'inputs'])
def test_torch_follows_equation(source):
  module = convolutional()
  compressed = rough(module)
  module.train()
  before = [copy.deepcopy(net.state_dict()) for net in (module, compressed)]
  noise = natural_noise(jax.random.key(3), (32, 8, 8, 3))
  batches = [torch.from_numpy(np.moveaxis(np.asarray(noise), 3, 1).copy())]
  if source == 'noise':
    corrected = correction.torch(module, compressed, SHAPE, seed=3)
  else:
    batches.append(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)))
    corrected = correction.torch(module, compressed, inputs=iter(batches))
  with torch.no_grad():
    runs = [[batch_run(net, x) for x in batches] for net in (module, compressed)]
  mean = lambda values: sum(values) / len(values)
  for place, number in enumerate(NORMS):
    m0, m1 = (mean([moments[place][0] for moments, _ in run]) for run in runs)
    v0, v1 = (mean([moments[place][1] for moments, _ in run]) for run in runs)
    old, new = module[number], corrected[number]
    torch.testing.assert_close(new.running_mean, old.running_mean + m1 - m0)
    torch.testing.assert_close(new.running_var, old.running_var * (v1 / v0).clip(0.05, 4))
    assert (new.running_var / old.running_var - 1).abs().max() > 0.05
  y0, y1 = (mean([output for _, output in run]) for run in runs)
  torch.testing.assert_close(corrected[-1].bias, compressed[-1].bias + y0 - y1)
  moved = {f'{number}.running_{name}' for number in NORMS for name in ('mean', 'var')}
  assert changed(corrected, compressed) == moved | {'11.bias'}
  # both modules are as they were, and a second correction starts from the float statistics
  for net, old in zip((module, compressed), before, strict=True):
    assert net.training and all(torch.equal(old[k], v) for k, v in net.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
  again = correction.torch(module, corrected, inputs=batches)
  torch.testing.assert_close(again.state_dict(), corrected.state_dict())


class Linen(linen.Module):
  """The JAX twin of a module of two dense layers around BatchNorm."""

  @linen.compact
  def __call__(self, x, train=False):
    x = linen.Dense(8, name='first')(x)
    x = linen.BatchNorm(use_running_average=not train, name='norm')(x)
    return linen.Dense(3, name='last')(linen.relu(x))


def test_torch_agrees_with_jax():
  module = drawn(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
  compressed = rough(module)
  x = torch.rand((64, 6), generator=torch.Generator().manual_seed(0))

  def variables(net):
    first, norm, _, last = net
    dense = lambda layer: {
      'kernel': layer.weight.detach().numpy().T,
      'bias': layer.bias.detach().numpy(),
    }
    affine = {'scale': norm.weight.detach().numpy(), 'bias': norm.bias.detach().numpy()}
    statistics = {'mean': norm.running_mean.numpy(), 'var': norm.running_var.numpy()}
    return {
      'params': {'first': dense(first), 'norm': affine, 'last': dense(last)},
      'batch_stats': {'norm': statistics},
    }

  expected = correction.correct_on_images(
    Linen().apply, *map(variables, (module, compressed)), [x.numpy()]
  )
  found = variables(correction.torch(module, compressed, inputs=[x]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


class Frozen(nn.Module):
  """A normalization that is no BatchNorm of PyTorch, as detection networks have it."""

  def __init__(self, size):
    super().__init__()
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
      self.register_buffer(name, torch.ones(size))

  def forward(self, x):
    scale = self.weight * (self.running_var + 1e-5).rsqrt()
    shift = self.bias - self.running_mean * scale
    return x * scale[:, None, None] + shift[:, None, None]


def test_torch_knows_statistics_by_name():
  """Normalizations of any class have the same correction; half precision is measured in float32."""
  ours = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), Frozen(6))
  theirs = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
  drawn(theirs)
  ours.load_state_dict(theirs.state_dict(), strict=False)
  found, expected = (correction.torch(net, rough(net), SHAPE) for net in (ours, theirs))
  for name in ('running_mean', 'running_var'):
    torch.testing.assert_close(getattr(found[1], name), getattr(expected[1], name))
  half = correction.torch(ours.bfloat16(), rough(ours), SHAPE)
  assert half[1].running_var.dtype == torch.bfloat16
  torch.testing.assert_close(half[1].running_var.float(), found[1].running_var, rtol=0.1, atol=0.01)


def test_torch_names_what_stays():
  module = convolutional()
  module[3].weight.data[:2] = 0
  module.unused = nn.BatchNorm1d(4)
  module.forward = lambda x: nn.Sequential(*list(module)[:-1])(x)
  compressed = copy.deepcopy(module)
  compressed.forward = lambda x: nn.Sequential(*list(compressed)[:-1])(x)
  compressed[0].weight.data.mul_(0.5)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    corrected = correction.torch(module, compressed, SHAPE)
  texts = [str(one.message) for one in told]
  assert texts == [
    'channels without variance in the float module keep their running_var: 4: 2 of 8',
    'statistics that no forward pass has used stay as they are: unused',
  ]
  assert all(one.filename == __file__ for one in told)
  assert torch.equal(corrected[4].running_var[:2], module[4].running_var[:2])
  assert torch.isfinite(torch.cat([t.flatten() for t in corrected.state_dict().values()])).all()


def test_torch_corrects_biases():
  """Of a network without statistics: every layer's mean output is the original one again."""

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv = nn.Conv1d(4, 16, 3, padding=1, groups=4)
      self.encoder = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.1)
      self.free = nn.Linear(16, 16, bias=False)
      self.own = nn.ParameterDict({'weight': torch.zeros(16, 16), 'bias': torch.zeros(16)})
      self.twice = nn.Linear(16, 16)
      self.up = nn.ConvTranspose1d(16, 6, 2)

    def forward(self, x, scale=1):
      x = self.encoder(self.conv(x).mT)
      x = nn.functional.linear(torch.relu(self.free(x)), self.own['weight'], self.own['bias'])
      return self.up(self.twice(self.twice(x)).mT) * 1 * scale

  module = drawn(Network()).eval()
  compressed = rough(module)
  x = torch.rand((64, 4, 10), generator=torch.Generator().manual_seed(0))
  with pytest.warns(
    UserWarning, match='stay as they are: encoder.self_attn.in_proj_bias, own.bias, twice.bias'
  ):
    corrected = correction.torch(module, compressed, inputs=[x])
  names = {'conv', 'encoder.self_attn.out_proj', 'encoder.linear1', 'encoder.linear2', 'up'}
  assert changed(corrected, compressed) == {f'{name}.bias' for name in names}

  def means(net):
    found = {}

    def hook(name, axis):
      def after(part, args, output):
        output = output[0] if isinstance(output, tuple) else output
        found[name] = output.mean([a for a in range(3) if a != axis])

      return after

    parts = dict(net.named_modules())
    handles = [
      parts[name.removesuffix('.out_proj')].register_forward_hook(
        hook(name, 1 if name in ('conv', 'up') else 2)
      )
      for name in names
    ]
    with torch.no_grad():
      net(x)
    for handle in handles:
      handle.remove()
    return found

  expected, off, found = map(means, (module, compressed, corrected))
  for name in names:
    assert (off[name] - expected[name]).abs().max() > 0.01
    torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
  # a mapping is keyword arguments; of several batches, the mean
  with pytest.warns(UserWarning, match='in_proj_bias'):
    both = correction.torch(module, compressed, inputs=[(x, 1), {'x': x, 'scale': 1}])
  torch.testing.assert_close(both.state_dict(), corrected.state_dict())


def test_torch_finds_biases_by_derivative():
  """Layers of any class; not one that applies more than its bias, nor a bias of two layers."""

  class Transposed(nn.Module):
    def __init__(self):
      super().__init__()
      self.weight, self.bias = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
      return torch.addmm(self.bias, x, self.weight)

  class Fused(nn.Linear):
    def forward(self, x):
      return super().forward(x).relu()

  shared, normed = nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
  shared.bias = nn.Linear(8, 8).bias
  twin = nn.Linear(8, 8)
  twin.bias = shared.bias
  module = nn.Sequential(
    Transposed(), nn.LayerNorm(8), Fused(8, 8), shared, twin, normed, nn.GELU(), nn.Linear(8, 1)
  )
  drawn(module)
  x = torch.rand((64, 6), generator=torch.Generator().manual_seed(0))
  with pytest.warns(UserWarning, match='stay as they are: 2.bias, 3.bias, 4.bias$'):
    corrected = correction.torch(module, rough(module), inputs=[x])
  assert changed(corrected, rough(module)) == {'0.bias', '5.bias', '7.bias'}
  with torch.no_grad():
    torch.testing.assert_close(corrected(x).mean(0), module(x).mean(0))


def test_torch_refuses():
  module = convolutional()
  compressed = rough(module)
  plain = nn.Sequential(nn.Linear(4, 4))
  images = torch.zeros(SHAPE)
  for found, arguments, options in (
    ('compressed_module: found float_module itself', (module, module, SHAPE), {}),
    ('float_module: found dict', ({}, module, SHAPE), {}),
    (
      '  0.bias: found float32 of shape .5,., expected float32 of shape .4,.',
      (plain, nn.Sequential(nn.Linear(4, 5)), SHAPE),
      {},
    ),
    ('shape, inputs: found none', (module, compressed), {}),
    ('shape, inputs: found both', (module, compressed, SHAPE), {'inputs': [images]}),
    ('shape: found .1, 3, 8, 8.', (module, compressed, (1, *SHAPE[1:])), {}),
    ('shape: found a module without running_mean', (plain, rough(plain), (8, 4)), {}),
    ('found a batch of type list', (module, compressed), {'inputs': [[images, 0]]}),
    ('found no batch', (module, compressed), {'inputs': []}),
    ('found 0 batches and no bias', (plain, rough(plain)), {'inputs': []}),
    (
      '1: found an input whose mean or variance is not finite',
      (module, compressed),
      {'inputs': [images / 0]},
    ),
  ):
    with pytest.raises(ValueError, match=found):
      correction.torch(*arguments, **options)


def test_torch_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match=r'correction\.torch: needs torch.*opq_jax\[torch\]'):
    correction.torch(None, None, SHAPE)


def test_torch_from_file_to_file(tmp_path, monkeypatch):
  """As the guide has it: checkpoint, `opq compress`, `opq decompress`, correction, both files."""
  monkeypatch.chdir(tmp_path)
  layers = lambda: [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32)]
  module, again = drawn(nn.Sequential(*layers())), nn.Sequential(*layers())
  torch.save(module.state_dict(), 'net.pt')
  assert cli.main(['compress', 'net.pt', 'net.opq', '--bits-per-weight', '2']) == 0
  assert cli.main(['decompress', 'net.opq', 'plain.safetensors']) == 0
  again.load_state_dict(safetensors.torch.load_file('plain.safetensors'))
  corrected = correction.torch(module, again, (64, 32))
  assert changed(corrected, again) == {'1.running_mean', '1.running_var', '3.bias'}
  params, state = opq_jax.load('net.opq')
  params |= {name: tensor.numpy() for name, tensor in corrected.state_dict().items()}
  opq_jax.save('corrected.opq', params, state)
  assert cli.main(['decompress', 'corrected.opq', 'corrected.safetensors']) == 0
  loaded = safetensors.torch.load_file('corrected.safetensors')
  assert all(torch.equal(loaded[name], t) for name, t in corrected.state_dict().items())
  size = lambda name: (tmp_path / name).stat().st_size
  assert abs(size('corrected.opq') - size('net.opq')) < 300
