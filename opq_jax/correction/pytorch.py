"""Corrects compressed PyTorch modules, from noise or from unlabelled inputs.

PyTorch is imported by the call, and needs the extra `torch`.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from opq_jax.core import extras
from opq_jax.correction.noise import natural_noise

if TYPE_CHECKING:
  from torch import Tensor, nn

_Module = TypeVar('_Module', bound='nn.Module')


def torch(
  float_module: _Module,
  compressed_module: _Module,
  shape: Sequence[int] | None = None,
  *,
  inputs: Iterable[Any] | None = None,
  seed: int = 0,
) -> _Module:
  """Corrects a compressed PyTorch module by its difference from the float one.

  What `correct_batch_norm` and `correct_on_images` do for JAX functions, by forward hooks.  A
  normalization is every module that has the buffers `running_mean` and `running_var`: BatchNorm in
  all its forms, also frozen.  With normalizations, both modules run on the same inputs, in
  evaluation mode but with every normalization on the statistics of the batch.  Its input has mean
  m0 and variance v0 in the float module, m1 and v1 in the compressed one; y0 and y1 are the mean
  outputs of the modules.  Then

      running mean      <-  running mean + m1 - m0
      running variance  <-  running variance * clip(v1 / v0, 0.05, 4)      (unchanged where v0 = 0)
      last bias         <-  last bias - (y1 - y0)

  of the float module's running mean and variance, so that a second correction changes nothing.  The
  last bias is a parameter b with output = b + f(all other parameters), found by its derivative;
  without one, no bias is changed.

  Without normalizations, noise can be compared with nothing, and real inputs correct the biases
  from the first layer to the last.  A layer is a module with a weight of two axes or more and a
  bias that is added to its output (found by its derivative): linear layers, convolutions with any
  groups, attention.  Its output has the mean z0 in the float module, and z1 in the compressed one,
  whose earlier layers are corrected already:

      bias  <-  bias + z0 - z1                                  averaged over the batches

  Args:
    float_module: the original network.  Both modules stay as they are.
    compressed_module: the same network with compressed weights: another instance, with the state
      dict that `opq decompress` wrote, on the same device.
    shape: of a batch of noise of mean 0 and variance 1, such as (16, 3, 224, 224) or
      (128, 3, 32, 32); of four axes it is `natural_noise`.  Only for networks with normalizations
      that read standardised inputs; of another scale, pass noise of that scale as `inputs`.
    inputs: batches of unlabelled inputs in the place of noise, prepared as the network expects
      them: each a tensor, a tuple of arguments, or a mapping of keyword arguments.
    seed: of the noise.

  Returns:
    A copy of `compressed_module` with corrected statistics and last bias, or corrected biases.

  Raises:
    ValueError: PyTorch is not installed; the modules differ in the names, shapes or dtypes of their
      tensors; not exactly one of shape and inputs is given; a batch is of no known form; there is
      nothing to correct.

  Warns:
    UserWarning: names channels without variance, whose running variance stays as it is, and
      statistics and biases that no forward pass has used, or used more than once.

  >>> import pytest
  >>> nn = pytest.importorskip('torch.nn')
  >>> network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
  >>> halved = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
  >>> half = lambda tensor: tensor / 2 if tensor.ndim == 2 else tensor
  >>> names = halved.load_state_dict({k: half(t) for k, t in network.state_dict().items()})
  >>> corrected = torch(network, halved, (64, 4))
  >>> [round(var, 3) for var in corrected[1].running_var.tolist()]  # of halved inputs
  [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
  """
  extras.require('torch', 'torch', 'opq_jax.correction.torch')
  from opq_jax.correction import torch_biases, torch_statistics
  from opq_jax.correction.torch_modules import batch_arguments, check_same_modules

  check_same_modules(float_module, compressed_module)
  if (shape is None) == (inputs is None):
    found = 'none' if shape is None else 'both'
    raise ValueError(f'shape, inputs: found {found}, expected one of them')
  has_statistics = bool(torch_statistics.normalizations(float_module))
  if shape is not None and not has_statistics:
    raise ValueError(
      'shape: found a module without running_mean and running_var, with which noise could be '
      'compared; expected inputs=[…], batches of unlabelled inputs'
    )
  batches = [_noise(float_module, shape, seed)] if shape is not None else inputs
  correct = torch_statistics.correct if has_statistics else torch_biases.correct
  return correct(float_module, compressed_module, map(batch_arguments, batches or ()))


def _noise(module: 'nn.Module', shape: Sequence[int], seed: int) -> 'Tensor':
  """Draws noise on the device and in the dtype of a module, channels at axis 1."""
  from torch import from_numpy

  shape = tuple(shape)
  if len(shape) < 2 or shape[0] < 2 or any(size < 1 for size in shape):
    raise ValueError(
      f'shape: found {shape}, expected (examples, channels, …) with at least 2 examples'
    )
  key = jax.random.key(seed)
  if len(shape) == 4:
    channels_last = natural_noise(key, (shape[0], *shape[2:], shape[1]))
    noise = np.moveaxis(np.asarray(channels_last), -1, 1)
  else:
    noise = np.asarray(jax.random.normal(key, shape))
  like = next(tensor for tensor in module.parameters() if tensor.is_floating_point())
  return from_numpy(np.array(noise, order='C')).to(like.device, like.dtype)
