"""Inference of the Flax networks against PyTorch on the CPU: the same batch, random weights.

    python -m experiments.benchmarks.resources.inference THREADS [NETWORK ...]

The ratio is PyTorch's seconds over ours, medians of calls in turn: above 1, Flax is quicker.
PyTorch's networks are the functional ones of `tests/helpers/torch_networks.py`, run eagerly as its
modules are; their logits must equal ours.  `without library` compiles ours without XLA's fusions
that call the CPU library YNNPACK.

With one thread, seconds are processor time, which other load on the machine does not change.  With
more, they are wall-clock time, and the machine must be idle: PyTorch's threads wait for each other
after every layer, so one thread that shares its core delays all.
"""

import functools
import os
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from experiments.benchmarks import harness
from opq_jax import importers
from tests.helpers import torch_networks as networks

BATCH, CIFAR_BATCH = 8, 128
ROUNDS = 5
LIBRARY_OFF = {'xla_cpu_experimental_ynn_fusion_type': ''}

NETWORKS: dict[str, Callable] = {
  'alexnet': networks.alexnet,
  'vgg16': networks.vgg16,
  'vgg16_bn': networks.vgg16_bn,
  'mobilenet_v1': networks.mobilenet_v1,
  'mobilenet_v2': networks.mobilenet_v2,
  'resnet18': functools.partial(networks.resnet, blocks=(2, 2, 2, 2)),
  'resnet34': functools.partial(networks.resnet, blocks=(3, 4, 6, 3)),
  'resnet50': functools.partial(networks.resnet, blocks=(3, 4, 6, 3), bottleneck=True),
  'resnet101': functools.partial(networks.resnet, blocks=(3, 4, 23, 3), bottleneck=True),
  **{
    f'resnet{depth}': functools.partial(networks.cifar_resnet, depth=depth)
    for depth in (20, 32, 44, 56, 110)
  },
}


def compare(name: str, threads: int) -> dict[str, object]:
  """Returns the row of a network, in Flax and in PyTorch."""
  network = NETWORKS[name]
  is_cifar = getattr(network, 'func', None) is networks.cifar_resnet
  batch, side, classes = (CIFAR_BATCH, 32, 10) if is_cifar else (BATCH, 224, 1000)
  images = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
  tensors = networks.Tensors()
  expected = networks.logits(network, tensors, images, classes)
  model, variables, _ = importers.from_tensors(name, tensors.numpy())
  x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, 3, 1)))
  ours = jax.device_put(images)
  lowered = jax.jit(model.apply).lower(variables, ours)
  plain, without = lowered.compile(), lowered.compile(compiler_options=LIBRARY_OFF)
  for compiled in (plain, without):
    difference = np.abs(np.asarray(compiled(variables, ours)) - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max(), difference

  def theirs():
    with torch.no_grad():
      return network(tensors, x, classes).numpy()

  seconds = harness.in_turn(
    {
      'torch': theirs,
      'flax': lambda: plain(variables, ours),
      'without': lambda: without(variables, ours),
    },
    ROUNDS,
    time.process_time if threads == 1 else time.perf_counter,
  )
  return {
    'network': name,
    'batch': f'{batch} of {side} x {side}',
    'torch / flax': round(seconds['torch'] / seconds['flax'], 2),
    'without library': round(seconds['torch'] / seconds['without'], 2),
  }


def main(threads: int, names: list[str]) -> None:
  # XLA has a thread for every core that it sees where it starts
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  torch.set_num_threads(threads)
  harness.keep_memory()
  rows = []
  for name in names or NETWORKS:
    rows.append(compare(name, threads))
    print(rows[-1], flush=True)
  if names:
    return
  harness.report(
    'inference',
    f'seconds of PyTorch {torch.__version__.partition("+")[0]} over those of Flax',
    f'python -m experiments.benchmarks.resources.inference {threads}',
    rows,
  )


if __name__ == '__main__':
  if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
    sys.exit(__doc__)
  main(int(sys.argv[1]), sys.argv[2:])
