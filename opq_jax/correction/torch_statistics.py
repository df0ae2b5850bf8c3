"""Running statistics of PyTorch's normalizations, moved to fit compressed weights."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opq_jax.core import messages
from opq_jax.core.messages import listed
from opq_jax.correction.batch_norm import RATIO_BOUNDS
from opq_jax.correction.torch_modules import (
  Arguments,
  OutputBias,
  evaluated,
  features_of,
  first_tensor,
  hooked,
  mean_along,
  output_bias,
)

_Module = TypeVar('_Module', bound=nn.Module)
_MAX_NAMED = 5  # parts that a message lists
_STATISTICS = ('running_mean', 'running_var')
# largest standard deviation of a constant channel relative to its mean: rounding in float32
_CONSTANT = 1e-6


def normalizations(module: nn.Module) -> dict[str, nn.Module]:
  """Returns the parts of a module that have a running mean and a running variance, by name."""
  return {
    name: part
    for name, part in module.named_modules()
    if all(getattr(part._buffers.get(each), 'ndim', 0) == 1 for each in _STATISTICS)
  }


def correct(
  float_module: nn.Module, compressed_module: _Module, batches: Iterable[Arguments]
) -> _Module:
  """Does what `opq_jax.correction.torch` says of modules with normalizations."""
  before, after = _Moments(float_module), _Moments(compressed_module)
  bias: OutputBias | None = None
  for number, arguments in enumerate(batches):
    if number == 0:
      bias = before.last_bias(arguments)
    for moments in (before, after):
      moments.add(arguments, bias)
  old = normalizations(float_module)
  used = [name for name in old if name in before.means and name in after.means]
  if not used:
    raise ValueError(
      f'found no batch, or no call of {listed(old, _MAX_NAMED)} by the forward pass, expected a '
      'batch at least and a call of some normalization'
    )
  corrected = copy.deepcopy(compressed_module)
  new, constant = normalizations(corrected), {}
  with torch.no_grad():
    for name in used:
      (m0, v0), (m1, v1) = before.means[name].value(), after.means[name].value()
      _check_finite(name, m0, v0, m1, v1)
      is_constant = v0 <= (_CONSTANT * m0).square()
      ratio = torch.where(is_constant, 1, v1 / v0).clip(*RATIO_BOUNDS)
      mean, var = (old[name].get_buffer(each) for each in _STATISTICS)
      new[name].get_buffer('running_mean').copy_(mean + (m1 - m0))
      new[name].get_buffer('running_var').copy_(var * ratio)
      if is_constant.any():
        constant[name] = f'{name}: {int(is_constant.sum())} of {len(is_constant)}'
    if bias is not None:
      (y0,), (y1,) = before.output.value(), after.output.value()
      tensor = corrected.get_parameter(bias.name)
      tensor.add_((y0 - y1).to(tensor.dtype))
  if constant:
    messages.warn(
      'channels without variance in the float module keep their running_var: '
      f'{listed(constant.values(), _MAX_NAMED)}'
    )
  if len(used) < len(old):
    idle = [name for name in old if name not in used]
    messages.warn(
      f'statistics that no forward pass has used stay as they are: {listed(idle, _MAX_NAMED)}'
    )
  return corrected


def _check_finite(name: str, *moments: Tensor) -> None:
  if not all(bool(torch.isfinite(moment).all()) for moment in moments):
    raise ValueError(
      f'{name or "module"}: found an input whose mean or variance is not finite, expected finite '
      'ones; float16 modules overflow easily: correct them in float32'
    )


class _Mean:
  """The mean of tensors that come one after the other."""

  def __init__(self) -> None:
    self._total: tuple[Any, ...] = ()
    self._count = 0

  def add(self, *values: Tensor) -> None:
    old = self._total or [0] * len(values)
    self._total = tuple(one + another for one, another in zip(old, values, strict=True))
    self._count += 1

  def value(self) -> tuple[Tensor, ...]:
    return tuple(total / self._count for total in self._total)


class _Moments:
  """The moments of one module on the batches, all of its normalizations on batch statistics.

  Attributes:
    means: of mean and variance at the input of every normalization, by name.
    output: mean of the module's output along the axis of its last bias.
  """

  def __init__(self, module: nn.Module):
    self.means: dict[str, _Mean] = {}
    self.output = _Mean()
    self._module = module

  def add(self, arguments: Arguments, bias: OutputBias | None) -> None:
    """Runs the module on one more batch."""
    with self._on_batch_statistics(self.means):
      output = self._module(*arguments.positional, **arguments.named)
    if bias is not None:
      self.output.add(mean_along(features_of('output', output), bias.axis))

  def last_bias(self, arguments: Arguments) -> OutputBias | None:
    """Returns the bias of the module's output, None where it has none or is not one tensor."""
    with self._on_batch_statistics({}):
      output = self._module(*arguments.positional, **arguments.named)
      if not isinstance(output, Tensor) or first_tensor(output) is None:
        return None
      names = [
        name
        for name, tensor in self._module.named_parameters()
        if tensor.ndim == 1 and tensor.is_floating_point() and len(tensor) in output.shape[1:]
      ]
      return output_bias(self._module, arguments, names)

  @contextlib.contextmanager
  def _on_batch_statistics(self, means: dict[str, _Mean]) -> Iterator[None]:
    """Gives every normalization the batch's own moments, and collects them.

    In evaluation mode a normalization divides by the statistics in its buffers: these are replaced
    just before it is called, so that nothing is assumed of its class.
    """
    parts = normalizations(self._module)
    kept = [(part, {name: part._buffers[name] for name in _STATISTICS}) for part in parts.values()]

    def before_call(name: str) -> Any:
      def hook(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0].detach()
        mean, var = _batch_moments(name, x, len(part.running_mean))
        means.setdefault(name, _Mean()).add(mean, var)
        part.running_mean, part.running_var = (
          moment.to(part.running_mean.dtype) for moment in (mean, var)
        )

      return hook

    handles = [
      part.register_forward_pre_hook(before_call(name), with_kwargs=True)
      for name, part in parts.items()
    ]
    try:
      with evaluated(self._module), hooked(handles):
        yield
    finally:
      for part, buffers in kept:
        part._buffers.update(buffers)


def _batch_moments(name: str, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
  """Returns mean and variance of a normalization's input per channel, in float32 at least."""
  axis = next((axis for axis in (1, x.ndim - 1) if x.ndim > 1 and x.shape[axis] == size), None)
  if axis is None:
    raise ValueError(
      f'{name}: found an input of shape {tuple(x.shape)}, expected {size} channels at axis 1'
    )
  others = [other for other in range(x.ndim) if other != axis]
  wide = x if x.dtype == torch.float64 else x.float()
  var, mean = torch.var_mean(wide, others, correction=0)
  return mean, var
