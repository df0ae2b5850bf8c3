"""Inference time of a CIFAR ResNet by kind of operation, by XLA's and PyTorch's profilers.

    python -m experiments.benchmarks.resources.inference_profile [NETWORK ...]

Milliseconds a batch of 128, two threads, least of 15 calls in turn, summed over the operations of a
kind: convolutions, by the side of the images that they give, and all other operations.
XLA's YNNPACK fusions hold BatchNorm, addition and ReLU with the convolutions; without them XLA
has these apart, as PyTorch has.  The machine must be idle.
"""

import os
import pathlib
import re
import sys
import tempfile

import jax
import numpy as np
import torch

from experiments.benchmarks import harness
from experiments.benchmarks.resources.inference import CIFAR_BATCH, LIBRARY_OFF, NETWORKS, networks
from opq_jax import importers

THREADS = 2
WARM_UP, ROUNDS = 2, 15
OTHER = 'all else'
CONVOLUTIONS = {side: f'convolutions, {side} x {side}' for side in (32, 16, 8)}
KINDS = [*CONVOLUTIONS.values(), OTHER]


def kinds_of(text: str) -> dict[str, str]:
  """Returns the kind of every instruction of the compiled program."""
  bodies = re.split(r'\n(?=\S)', text)
  convolving = {
    found[1] for body in bodies if (found := re.match(r'%(\S+) ', body)) and ' convolution(' in body
  }
  kinds = {}
  entry = next(body for body in bodies if body.startswith('ENTRY'))
  for line in entry.splitlines()[1:]:
    if not (found := re.match(r'\s+(?:ROOT )?%(\S+) = \S*?\[([\d,]*)\]\S* ([\w-]+)\(', line)):
      continue
    name, shape, operation = found.groups()
    called = re.search(r'calls=%([^\s,]+)', line)
    is_convolution = operation == 'convolution' or (called and called[1] in convolving)
    dimensions = shape.split(',')
    # XLA fuses the last one with the pooling and the classifier
    side = int(dimensions[1]) if len(dimensions) == 4 else 8
    kinds[name] = CONVOLUTIONS[side] if is_convolution else OTHER
  return kinds


def flax_profile(compiled, arguments) -> dict[str, float]:
  """Kind -> milliseconds of one call."""
  kinds = kinds_of(compiled.as_text())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(compiled(*arguments))
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    events = [
      (event.start_ns, event.end_ns, kinds[event.name])
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes
      for line in plane.lines
      for event in line.events
      if event.name in kinds
    ]
  # one operation runs after the other, on threads that its own event does not tell of: it lasts
  # until the next one begins
  starts, ends, names = zip(*sorted(events), strict=True)
  total = dict.fromkeys(KINDS, 0.0)
  for name, start, end in zip(names, starts, [*starts[1:], max(ends)], strict=True):
    total[name] += (end - start) / 1e6
  return total


def torch_profile(function) -> dict[str, float]:
  """Kind -> milliseconds of one call."""
  activities = [torch.profiler.ProfilerActivity.CPU]
  with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
    function()
  total = dict.fromkeys(KINDS, 0.0)
  for event in profile.key_averages(group_by_input_shape=True):
    kind = OTHER
    if event.key == 'aten::mkldnn_convolution':
      (_, _, height, _), kernel = event.input_shapes[:2]
      strides = {(16, 32): 16, (32, 64): 8}  # where channels change, so does the side
      kind = CONVOLUTIONS[strides.get((kernel[1], kernel[0]), height)]
    total[kind] += event.self_cpu_time_total / 1e3
  return total


def profile(name: str) -> list[dict[str, object]]:
  images = np.random.default_rng(0).normal(size=(CIFAR_BATCH, 32, 32, 3)).astype(np.float32)
  tensors = networks.Tensors()
  networks.logits(NETWORKS[name], tensors, images, 10)
  model, variables, _ = importers.from_tensors(name, tensors.numpy())
  x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, 3, 1)))
  arguments = variables, jax.device_put(images)
  lowered = jax.jit(model.apply).lower(*arguments)

  def theirs():
    with torch.no_grad():
      return NETWORKS[name](tensors, x, 10).numpy()

  plain, without = lowered.compile(), lowered.compile(compiler_options=LIBRARY_OFF)
  profiles = {
    'flax, ms': lambda: flax_profile(plain, arguments),
    'without library, ms': lambda: flax_profile(without, arguments),
    'torch, ms': lambda: torch_profile(theirs),
  }
  found: dict[str, list[dict[str, float]]] = {title: [] for title in profiles}
  for _ in range(WARM_UP + ROUNDS):
    for title, call in profiles.items():
      found[title].append(call())
  columns = {
    title: {k: min(call[k] for call in calls[WARM_UP:]) for k in KINDS}
    for title, calls in found.items()
  }
  rows = [
    {'network': name, 'operations': kind}
    | {title: round(column[kind], 1) for title, column in columns.items()}
    for kind in KINDS
  ]
  sums = {title: round(sum(column.values()), 1) for title, column in columns.items()}
  memory = {
    title: round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
    for title, compiled in (('flax, ms', plain), ('without library, ms', without))
  }
  return [
    *rows,
    {'network': name, 'operations': 'sum'} | sums,
    {'network': name, 'operations': 'temporary memory, MB'} | memory,
  ]


def main(names: list[str]) -> None:
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
  torch.set_num_threads(THREADS)
  harness.keep_memory()
  harness.report(
    'inference_profile',
    f'milliseconds a batch of {CIFAR_BATCH}, {THREADS} threads',
    ' '.join(['python -m experiments.benchmarks.resources.inference_profile', *names]),
    [row for name in names for row in profile(name)],
  )


if __name__ == '__main__':
  main(sys.argv[1:] or ['resnet32', 'resnet56', 'resnet110'])
