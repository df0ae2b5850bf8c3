"""Seconds of each part of the library on the device that JAX finds: an accelerator, or the CPU.

    python -m experiments.benchmarks.resources.accelerator [--seconds 300] [--batch N] [--layers N]

    allocate            ResNet-50's shapes: pruning and codebooks of all leaves
    apply               the same: decoded values of all weights, under jit
    finetuning step     ResNet-50 in bfloat16, 224 pixels, with frozen masks and codebooks; and the
                        same step of the float network
    calibrated run      a random Llama of SmolLM2-135M's layers, 4,096 random tokens, error feedback
                        block after block, from a folder to a file

The first call of a part compiles; `again` is the median of three further ones.  A part that would
begin later than `--seconds` is named and left out.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.language_models import random_folder
from opq_jax import encoders, finetuning, language, models, weights

RATE = 16.0
TOKENS = 4096

Part = Callable[[], Any]


def whole_tree() -> dict[str, Part]:
  """Returns the parts that take a tree of ResNet-50's shapes."""
  params = harness.random_tree(harness.resnet50_shapes())
  allocate = lambda: opq_jax.allocate(params, compression_rate=RATE)
  # made when it is asked for: the first call of `allocate` is the one that compiles
  state = functools.cache(lambda: opq_jax.init_state(params, allocate()))
  apply = jax.jit(opq_jax.apply_compression)
  return {'allocate': allocate, 'apply': lambda: apply(params, state())}


def steps(model: nn.Module, batch: int, side: int = 224) -> dict[str, Part]:
  """Returns one step of finetuning, of the compressed network and of the float one."""
  images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
  variables = model.init(jax.random.key(1), images[:1])
  data = {'image': images, 'label': jnp.zeros(batch, jnp.int32)}
  allocation = opq_jax.allocate(variables['params'], compression_rate=RATE)
  state = opq_jax.init_state(variables['params'], allocation)
  optimizer = optax.sgd(0.01, momentum=0.9)
  step = jax.jit(
    lambda at, state: finetuning.train_step(
      at, state, data, apply_fn=model.apply, optimizer=optimizer
    )
  )
  begin = finetuning.init_train_state(variables, optimizer, jax.random.key(2))
  return {
    'finetuning step': lambda: step(begin, state),
    'finetuning step, float': lambda: step(begin, None),
  }


def calibrated(layers: int, size: str = '135M', vocabulary: int | None = None) -> dict[str, Part]:
  """Returns a calibrated run of a random Llama, from disk to disk."""
  config = random_folder.config(size, layers, vocabulary)

  def run() -> None:
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch) / 'network'
      random_folder.write(folder, config)
      network = language.stored_network(
        models.from_config(config), weights.open_folder(folder).leaves
      )
      language.compress_calibrated(
        network,
        weights.open_weights(folder),
        folder / 'network.opq',
        language.at_random(config['vocab_size'], TOKENS, 256),
        encoder=encoders.Feedback({}),
        bits_per_weight=4,
        channel_axis=weights.channel_axis,
      )

  return {f'calibrated run, {layers} layers': run}


def timed(part: Part, again: int) -> tuple[float, float | None]:
  """Returns seconds of the first call, and the median of some more; None of none."""
  seconds = []
  for _ in range(1 + again):
    start = time.perf_counter()
    jax.block_until_ready(part())
    seconds.append(time.perf_counter() - start)
  return seconds[0], statistics.median(seconds[1:]) if again else None


def rows_of(
  parts: list[tuple[Callable[[], dict[str, Part]], int]], limit: float
) -> list[dict[str, object]]:
  """Returns the seconds of all parts that begin within a time.

  Args:
    parts: functions that return parts, and how often each is called once more.
    limit: seconds after which no part begins.
  """
  begin, device, rows = time.perf_counter(), jax.devices()[0], []
  for made, again in parts:
    if time.perf_counter() - begin > limit:
      print(f'left out, after {limit:g} s: {made}')
      continue
    for name, part in made().items():
      first, then = timed(part, again)
      row: dict[str, object] = {
        'device': device.device_kind,
        'part': name,
        'first, s': float(f'{first:.3g}'),
        'again, s': '' if then is None else float(f'{then:.3g}'),
      }
      rows.append(row)
      print(row, flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  is_cpu = jax.default_backend() == 'cpu'
  parser.add_argument('--seconds', type=float, default=300, help='the run ends within about these')
  parser.add_argument('--batch', type=int, default=4 if is_cpu else 64, help='of finetuning')
  parser.add_argument('--layers', type=int, default=4 if is_cpu else 30, help='of the Llama')
  arguments = parser.parse_args()
  # the last one takes the longest
  parts: list[tuple[Callable[[], dict[str, Part]], int]] = [
    (whole_tree, 3),
    (lambda: steps(models.create('resnet50', dtype=jnp.bfloat16), arguments.batch), 3),
    (lambda: calibrated(arguments.layers), 0),
  ]
  rows = rows_of(parts, arguments.seconds / 2)
  harness.report(
    'accelerator',
    'seconds on a device',
    'python -m experiments.benchmarks.resources.accelerator',
    harness.with_earlier('accelerator', rows, ['device', 'part']),
  )


if __name__ == '__main__':
  main()
