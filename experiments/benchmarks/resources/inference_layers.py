"""Single layers on one core, which explain the lowest ratios of `inference`.

    python -m experiments.benchmarks.resources.inference_layers

Milliseconds of processor time, medians of calls in turn: the last pooling of VGG-16 with the two
dense layers that follow, batch 8, and the 3x3 convolutions of a CIFAR ResNet's stages, batch 128.
"""

import functools
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jaxtyping import Array

from experiments.benchmarks import harness
from experiments.benchmarks.resources.inference import LIBRARY_OFF
from opq_jax.models import layers

ROUNDS = 9


def pool_and_dense(pool, x: Array, first: Array, second: Array) -> Array:
  x = pool(nn.relu(x + 1)).reshape(x.shape[0], -1)
  return nn.relu(nn.relu(x @ first) @ second)


def conv(x: Array, kernel: Array) -> Array:
  dims = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=dims)


def compiled(function, *arguments, **options):
  """Returns a layer as a call without arguments."""
  run = jax.jit(function).lower(*arguments).compile(compiler_options=options)
  return lambda: run(*arguments)


def row(what: str, functions) -> dict[str, object]:
  seconds = harness.in_turn(functions, ROUNDS, time.process_time)
  return {'what': what} | {name: round(1e3 * value, 2) for name, value in seconds.items()}


def main() -> None:
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
  torch.set_num_threads(1)
  harness.keep_memory()
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(
    rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[:-1]) ** 0.5)
  )
  rows = []

  arguments = draw(8, 14, 14, 512), draw(25088, 4096), draw(4096, 4096)
  pools = {
    'nn.max_pool': lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    'layers.max_pool_by_two': layers.max_pool_by_two,
  }
  for name, pool in pools.items():
    function = functools.partial(pool_and_dense, pool)
    rows.append(
      row(
        f'{name}, two dense layers',
        {
          'flax, ms': compiled(function, *arguments),
          'without library, ms': compiled(function, *arguments, **LIBRARY_OFF),
        },
      )
    )

  for side, channels in ((32, 16), (16, 32), (8, 64)):
    x, kernel = draw(128, side, side, channels), draw(3, 3, channels, channels)
    theirs = [
      torch.from_numpy(np.asarray(array).transpose(axes).copy())
      for array, axes in ((x, (0, 3, 1, 2)), (kernel, (3, 2, 0, 1)))
    ]
    functions = {
      'flax, ms': compiled(conv, x, kernel),
      'without library, ms': compiled(conv, x, kernel, **LIBRARY_OFF),
      'torch, ms': lambda theirs=theirs: torch.nn.functional.conv2d(*theirs, padding=1).numpy(),
    }
    rows.append(row(f'3x3 convolution, {channels} channels, {side} x {side}', functions))

  harness.report(
    'inference_layers',
    'single layers, milliseconds of processor time',
    'python -m experiments.benchmarks.resources.inference_layers',
    rows,
  )


if __name__ == '__main__':
  main()
