"""Biases of PyTorch's layers, moved so that every layer's mean output is again the original one."""

import collections
import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opq_jax.core import messages
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


def correct(
  float_module: nn.Module, compressed_module: _Module, batches: Iterable[Arguments]
) -> _Module:
  """Does what `opq_jax.correction.torch` says of modules without normalizations."""
  layers: dict[str, OutputBias] = {}
  total: dict[str, Tensor] = {}
  count = 0
  for arguments in batches:
    if not count:
      layers = _layers(float_module, arguments)
    for bias, shift in _shifts(float_module, compressed_module, layers, arguments).items():
      total[bias] = total[bias] + shift if bias in total else shift
    count += 1
  if not total:
    raise ValueError(
      f'found {count} batches and no bias of a layer, expected a batch at least, and a layer with '
      'a bias that is added to its output'
    )
  corrected = copy.deepcopy(compressed_module)
  with torch.no_grad():
    for bias, shift in total.items():
      tensor = corrected.get_parameter(bias)
      tensor.add_((shift / count).to(tensor.dtype))
  others = [name for name in _bias_names(float_module) if name not in total]
  if others:
    messages.warn(
      'biases that are not added, once, to the output of a layer stay as they are: '
      f'{messages.listed(others, _MAX_NAMED)}'
    )
  return corrected


def _is_layer(part: nn.Module) -> bool:
  """Returns whether a part has a matrix or kernel of its own, parametrized or not."""
  return any(
    tensor.ndim > 1
    for name, tensor in part.named_parameters()
    if '.' not in name or name.startswith('parametrizations.')
  )


def _bias_names(module: nn.Module) -> list[str]:
  """Returns the names of the biases of layers; those of LayerNorm follow no product."""
  return [
    f'{place}.{name}' if place else name
    for place, part in module.named_modules()
    if _is_layer(part)
    for name, tensor in part.named_parameters(recurse=False)
    if 'bias' in name and tensor.ndim == 1
  ]


def _layers(module: nn.Module, arguments: Arguments) -> dict[str, OutputBias]:
  """Returns the bias of each layer that one forward pass calls once, by name of the layer.

  A layer's bias is its own, or that of a part that it reads instead of calling it, as attention
  does with its last projection.
  """
  found: dict[str, OutputBias] = {}
  calls: collections.Counter[str] = collections.Counter()
  inside: list[str] = []  # the layer that is examined, whose own call is not counted

  def after_call(name: str) -> Any:
    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
      if inside:
        return
      calls[name] += 1
      features = first_tensor(output)
      if calls[name] > 1 or features is None:
        return
      inside.append(name)
      idle = [child for child, _ in part.named_children() if not calls[_joined(name, child)]]
      names = [
        candidate
        for candidate, tensor in part.named_parameters()
        if tensor.ndim == 1 and len(tensor) in features.shape
        if '.' not in candidate or candidate.rpartition('.')[0] in idle
      ]
      bias = output_bias(part, Arguments(args, kwargs), names) if _is_layer(part) else None
      if bias is not None:
        found[name] = bias._replace(name=_joined(name, bias.name))
      inside.pop()

    return hook

  handles = [
    part.register_forward_hook(after_call(name), with_kwargs=True)
    for name, part in module.named_modules()
  ]
  with evaluated(module), hooked(handles):
    module(*arguments.positional, **arguments.named)
  # one tensor may be the bias of several layers
  owners = collections.Counter(id(module.get_parameter(layer.name)) for layer in found.values())
  is_single = lambda layer: owners[id(module.get_parameter(layer.name))] == 1
  return {name: layer for name, layer in found.items() if calls[name] == 1 and is_single(layer)}


def _shifts(
  float_module: nn.Module,
  compressed_module: nn.Module,
  layers: dict[str, OutputBias],
  arguments: Arguments,
) -> dict[str, Tensor]:
  """Returns what one batch adds to each bias, from the first layer to the last."""
  means: dict[str, Tensor] = {}
  shifts: dict[str, Tensor] = {}

  def measured(name: str) -> Any:
    def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
      means[name] = mean_along(features_of(name, output), layers[name].axis)

    return hook

  def shifted(name: str) -> Any:
    def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
      features, axis = features_of(name, output), layers[name].axis
      shift = means[name] - mean_along(features, axis)
      shifts[layers[name].name] = shift
      shape = [-1 if place == axis else 1 for place in range(features.ndim)]
      moved = features + shift.to(features.dtype).reshape(shape)
      return moved if isinstance(output, Tensor) else type(output)([moved, *output[1:]])

    return hook

  for module, hook in ((float_module, measured), (compressed_module, shifted)):
    parts = dict(module.named_modules())
    handles = [parts[name].register_forward_hook(hook(name)) for name in layers]
    with evaluated(module), hooked(handles):
      module(*arguments.positional, **arguments.named)
  return shifts


def _joined(place: str, name: str) -> str:
  return f'{place}.{name}' if place else name
