"""Step time and memory with compression and without, and images a second of the loader.

    python -m experiments.benchmarks.resources.finetuning [network:side:batch ...] [data_dir]

By default resnet20:32:128.  Steps are run in turn in one process.  Memory is what XLA plans for
arguments, results and temporaries of one step, not donated.  Variables of the environment are read
when a process starts, so further processes time the first network's step with and without each, in
turn: huge pages of memory (Linux with glibc 2.35 or later), and convolutions of Eigen in place of
YNNPACK's (JAX 0.12 or later).  With a TFDS folder, the loader reads its cifar10 (held in memory)
and imagenet2012 (decoded from JPEG) while the training thread is idle.
"""

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import opq_jax
from experiments.benchmarks import harness
from opq_jax import data, finetuning, models
from opq_jax.data import augmentation, streams

OPTIMIZER = optax.sgd(0.01, momentum=0.9)


def step_rows(name: str, side: int, batch_size: int, rounds: int) -> list[dict[str, object]]:
  seconds, planned, masks = measured(name, side, batch_size, rounds)
  what = f'{name}, {side} px, batch {batch_size}'
  return [
    {
      'what': f'{what}: step with compression, to without',
      'ratio': round(seconds['with'] / seconds['without'], 3),
      'of': f'{batch_size / seconds["without"]:.0f} images/s',
    },
    {
      'what': f'{what}: planned memory less the masks, to without',
      'ratio': round((planned['with'] - masks) / planned['without'], 4),
      'of': f'{planned["without"] / 1e6:.0f} MB',
    },
  ]


def environments() -> dict[str, dict[str, str]]:
  """Returns variables that this machine and this version of JAX know, by what they compare."""
  known = {}
  library, version = platform.libc_ver()
  if library == 'glibc' and tuple(map(int, version.split('.'))) >= (2, 35):
    known['in huge pages of memory, to without'] = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  if jax.__version_info__ >= (0, 12):  # a flag that XLA does not know ends the process
    own = "with Eigen's convolutions, to YNNPACK's"
    known[own] = {'XLA_FLAGS': '--xla_cpu_experimental_ynn_fusion_type='}
  return known


def environment_rows(name: str, side: int, batch_size: int) -> list[dict[str, object]]:
  """Compares steps with compression in processes with variables of the environment and without."""
  command = [sys.executable, '-m', 'experiments.benchmarks.resources.finetuning', '--seconds']
  rows = []
  for what, variables in environments().items():
    seconds: dict[str, list[float]] = {'with': [], 'without': []}
    for _ in range(3):
      for which, values in seconds.items():
        environment = {key: value for key, value in os.environ.items() if key not in variables}
        child = subprocess.run(
          [*command, f'{name}:{side}:{batch_size}'],
          env=environment | (variables if which == 'with' else {}),
          stdout=subprocess.PIPE,
          check=True,
        )
        values.append(float(child.stdout))
    own, plain = (statistics.median(values) for values in seconds.values())
    rows.append(
      {
        'what': f'{name}, {side} px, batch {batch_size}: step {what}',
        'ratio': round(own / plain, 3),
        'of': f'{batch_size / plain:.0f} images/s',
      }
    )
  return rows


class Measured(NamedTuple):
  """Seconds and planned bytes of a step 'with' and 'without' compression; bytes of the masks."""

  seconds: dict[str, float]
  planned: dict[str, int]
  masks: int


def measured(name: str, side: int, batch_size: int, rounds: int) -> Measured:
  model = models.create(name)
  image = jnp.zeros((1, side, side, 3))
  variables = jax.jit(model.init)(jax.random.key(0), image)
  params = variables['params']
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  train_state = finetuning.init_train_state(variables, OPTIMIZER, jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.normal(size=(batch_size, side, side, 3)), jnp.float32),
    'label': jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32),
  }
  step = jax.jit(
    functools.partial(finetuning.train_step, apply_fn=model.apply, optimizer=OPTIMIZER)
  )
  compiled = {
    'with': step.lower(train_state, state, batch).compile(),
    'without': step.lower(train_state, None, batch).compile(),
  }
  seconds = harness.in_turn(
    {
      'with': lambda: compiled['with'](train_state, state, batch),
      'without': lambda: compiled['without'](train_state, None, batch),
    },
    rounds=rounds,
  )
  planned = {kind: _planned_bytes(executable) for kind, executable in compiled.items()}
  masks = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.dtype == bool)
  return Measured(seconds, planned, masks)


def _planned_bytes(executable: jax.stages.Compiled) -> int:
  analysis = executable.memory_analysis()
  return (
    analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
  )


def loader_rows(data_dir: str) -> list[dict[str, object]]:
  cifar = streams.in_memory(data.source('cifar10', 'train[:10000]', data_dir))
  imagenet = data.source('imagenet2012', 'train', data_dir)
  rows = []
  for what, examples, preprocessing, view, batches in (
    ('cifar10, in memory', cifar, data.CIFAR, augmentation.PadCropFlip(), 200),
    ('imagenet2012, 224 px', imagenet, data.TORCHVISION, augmentation.RandomResizedCrop(), 6),
  ):
    stream = streams.stream(
      examples, batch_size=128, preprocessing=preprocessing, augmentation=view, threads=2
    )
    next(stream)
    start = time.perf_counter()
    for _ in range(batches):
      next(stream)
    speed = 128 * batches / (time.perf_counter() - start)
    rows.append({'what': f'loader: {what}', 'of': f'{speed:.0f} images/s'})
  return rows


def main() -> None:
  if sys.argv[1:2] == ['--seconds']:
    name, side, batch_size = sys.argv[2].split(':')
    print(measured(name, int(side), int(batch_size), rounds=5).seconds['with'])
    return
  rows = []
  words = [word for word in sys.argv[1:] if word.count(':') == 2] or ['resnet20:32:128']
  networks = [
    (name, int(side), int(size)) for name, side, size in (word.split(':') for word in words)
  ]
  for name, side, size in networks:
    # a step of a large network is long enough to be timed fewer times
    rows += step_rows(name, side, size, rounds=5 if side > 32 else 11)
  rows += environment_rows(*networks[0])
  for folder in [word for word in sys.argv[1:] if word.count(':') != 2]:
    rows += loader_rows(folder)
  words = [word if word.count(':') == 2 else 'TFDS_FOLDER' for word in sys.argv[1:]]
  command = ' '.join(['python -m experiments.benchmarks.resources.finetuning', *words])
  harness.report('finetuning', 'Finetuning', command, rows)


if __name__ == '__main__':
  main()
