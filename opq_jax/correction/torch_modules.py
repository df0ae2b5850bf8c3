"""PyTorch modules as the corrections see them: compared, called, and put back as they were."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opq_jax.core import messages


class Arguments(NamedTuple):
  """The arguments of one forward call."""

  positional: tuple[Any, ...]
  named: dict[str, Any]


class OutputBias(NamedTuple):
  """A bias of a module's output.

  Attributes:
    name: of the parameter in the module.
    axis: of the output that it is added along.
  """

  name: str
  axis: int


def batch_arguments(batch: Any) -> Arguments:
  """Returns a batch as arguments.

  Raises:
    ValueError: it is no tensor, tuple or mapping.
  """
  if isinstance(batch, Mapping):
    return Arguments((), dict(batch))
  if isinstance(batch, Tensor):
    # a tensor in the place of a list of batches would be iterated over its examples
    if batch.ndim == 0:
      raise ValueError('inputs: found a number, expected batches such as [tensor]')
    return Arguments((batch,), {})
  if type(batch) is tuple:
    return Arguments(batch, {})
  raise ValueError(
    f'inputs: found a batch of type {type(batch).__name__}, expected a tensor, a tuple of '
    'arguments or a mapping of keyword arguments; of a loader with labels: (x for x, _ in loader)'
  )


def check_same_modules(first: nn.Module, second: nn.Module) -> None:
  """Raises ValueError unless two modules have tensors of the same names, shapes and dtypes."""
  for label, module in (('float_module', first), ('compressed_module', second)):
    if not isinstance(module, nn.Module):
      raise ValueError(f'{label}: found {type(module).__name__}, expected a torch.nn.Module')
  if first is second:
    raise ValueError(
      'compressed_module: found float_module itself, expected another instance with the '
      'compressed weights'
    )
  expected, found = ({name: _description(t) for name, t in _tensors(m)} for m in (first, second))
  if lines := messages.differences(found, expected):
    raise ValueError('\n'.join(['compressed_module has not the tensors of float_module:', *lines]))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
  yield from module.named_parameters(remove_duplicate=False)
  yield from module.named_buffers(remove_duplicate=False)


def _description(tensor: Tensor) -> str:
  return f'{str(tensor.dtype).removeprefix("torch.")} of shape {tuple(tensor.shape)}'


@contextlib.contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
  """Puts all parts of a module into evaluation mode, without gradients, for a while.

  Only the flags are set: a module's own `train` method may do more than that.
  """
  flags = [(part, part.training) for part in module.modules()]
  try:
    for part, _ in flags:
      part.training = False
    with torch.no_grad():
      yield
  finally:
    for part, is_training in flags:
      part.training = is_training


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
  """Removes hooks at the end."""
  try:
    yield
  finally:
    for handle in handles:
      handle.remove()


def first_tensor(output: Any) -> Tensor | None:
  """Returns an output, or the first of several, if it is a floating tensor of two axes or more."""
  if isinstance(output, tuple | list) and output:
    output = output[0]
  is_features = isinstance(output, Tensor) and output.ndim > 1 and output.is_floating_point()
  return output if is_features else None


def features_of(name: str, output: Any) -> Tensor:
  """Returns `first_tensor` of a part that has had one on an earlier batch."""
  features = first_tensor(output)
  if features is None:
    raise ValueError(f'{name}: found no floating tensor on a later batch, expected one as before')
  return features


def mean_along(output: Tensor, axis: int) -> Tensor:
  """Returns the mean over all axes but one, in float32 at least."""
  others = [other for other in range(output.ndim) if other != axis]
  wide = output.double() if output.dtype == torch.float64 else output.float()
  return wide.mean(others)


def output_bias(module: nn.Module, arguments: Arguments, names: list[str]) -> OutputBias | None:
  """Returns the first of some parameters that is a bias of a module's output.

  A vector b is a bias where output = b + f(all other parameters), with the same b at every place.
  The derivative by it is then the sum of the output's derivatives over all places.  One derivative
  along random whole numbers tells: only the identity, in all likelihood, returns their sum.

  Args:
    module: called once.
    arguments: of the call.
    names: of vectors of the module.
  """
  if not names:
    return None
  parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}
  vectors = [parameters[name].requires_grad_() for name in names]
  with torch.enable_grad():
    called = torch.func.functional_call(module, parameters, arguments.positional, arguments.named)
    output = first_tensor(called)
    if output is None or not output.requires_grad:
      return None
    numbers = torch.randint(1, 128, output.shape, generator=torch.Generator().manual_seed(0))
    along = numbers.to(output.device, output.dtype)
    derivatives = torch.autograd.grad(output, vectors, along, allow_unused=True)
  for name, derivative in zip(names, derivatives, strict=True):
    for axis in (output.ndim - 1, 1, 0):
      if derivative is not None and derivative.shape == output.shape[axis : axis + 1]:
        places = output.numel() // output.shape[axis]
        found, expected = derivative.float() / places, mean_along(along, axis)
        precision = 16 * torch.finfo(derivative.dtype).eps
        if torch.allclose(found, expected.float(), rtol=precision, atol=0):
          return OutputBias(name, axis)
  return None
