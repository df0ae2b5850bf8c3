"""What works for which framework, and what error feedback gains there: every cell is a run.

    python -m experiments.benchmarks.accuracy.support_matrix            # some minutes on a CPU
    python -m experiments.benchmarks.accuracy.support_matrix --train    # trains the networks anew

The networks are `tests.helpers.frameworks`: small ones of every framework, trained on the
handwritten digits of scikit-learn, with 256 training images as calibration inputs and judged on 297
held-out ones.  The cells are `tests.helpers.support_cells`, all at 3 bits per weight.  A percentage
is the squared error of the logits relative to their energy; numbers without a unit are mean
divergences from the float network, in nats.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness
from opq_jax.weights import write_safetensors
from tests.helpers import framework_modules, frameworks, support_cells

EPOCHS, BATCH, PEAK, DECAY = 40, 100, 3e-3, 0.05  # of training


def initial() -> dict[str, tuple[Callable[..., Any], Any]]:
  """Returns (fn, initial parameters) of the networks that are trained, by the name of the file."""
  x, key = frameworks.calibration_inputs(2), jax.random.key(0)
  of_linen = lambda model: (model.apply, model.init(key, x))
  return {
    'cnn': of_linen(framework_modules.Cnn()),
    'transformer': of_linen(framework_modules.Transformer()),
    'experts': of_linen(framework_modules.Transformer('experts')),
    'plain': (framework_modules.plain, plain_params(key)),
  }


def plain_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Draws the parameters of `framework_modules.plain`."""
  shapes = {'hidden_0': (64, 96), 'hidden_1': (96, 96), 'head': (framework_modules.CLASSES, 96)}
  init = nn.initializers.normal(1 / 8)
  keys = jax.random.split(key, len(shapes))
  biases = {'hidden_0': 96, 'hidden_1': 96, 'head': framework_modules.CLASSES}
  return {
    name: {'w': init(key, shape), 'b': jnp.zeros(biases[name])}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def train(fn: Callable[..., Any], variables: Any) -> Any:
  """Returns trained variables; images are moved by up to a pixel."""
  images, labels = (part[frameworks.TEST :] for part in frameworks.digits())
  has_statistics = isinstance(variables, dict) and 'batch_stats' in variables
  params = variables['params'] if has_statistics else variables
  statistics = variables['batch_stats'] if has_statistics else {}
  steps = len(labels) // BATCH
  optimizer = optax.adamw(optax.cosine_decay_schedule(PEAK, EPOCHS * steps), weight_decay=DECAY)

  def loss(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    if has_statistics:
      of_network = {'params': params, 'batch_stats': statistics}
      logits, updated = fn(of_network, x, train=True, mutable=['batch_stats'])
      statistics = updated['batch_stats']
    else:
      logits = fn(params, x)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return entropy.mean(), statistics

  @jax.jit
  def step(params: Any, statistics: Any, memory: Any, x: jax.Array, y: jax.Array) -> Any:
    gradient, statistics = jax.grad(loss, has_aux=True)(params, statistics, x, y)
    updates, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, updates), statistics, memory

  memory, rng = optimizer.init(params), np.random.default_rng(0)
  for _ in range(EPOCHS):
    for batch in rng.permutation(len(labels))[: steps * BATCH].reshape(steps, BATCH):
      x = np.roll(images[batch], rng.integers(-1, 2, 2), (1, 2))
      params, statistics, memory = step(params, statistics, memory, x, labels[batch])
  return {'params': params, 'batch_stats': statistics} if has_statistics else params


def train_all() -> None:
  """Trains the networks, and writes them where `frameworks` reads them."""
  for name, (fn, variables) in initial().items():
    start = time.perf_counter()
    trained = train(fn, variables)
    x, y = frameworks.held_out()
    top_1 = float((fn(trained, x).argmax(-1) == y).mean())
    print(f'{name}: top-1 {top_1:.1%}, {time.perf_counter() - start:.0f} s')
    frameworks.TRAINED.mkdir(exist_ok=True)
    write_safetensors(frameworks.TRAINED / f'{name}.safetensors', trained)


def rows() -> list[dict[str, object]]:
  """Runs every cell; raises AssertionError where one does not do what it should."""
  found = []
  for name in frameworks.NETWORKS:
    row: dict[str, object] = {'network': name}
    for column in support_cells.CELLS:
      row[column], notes = support_cells.cell(name, column)
      for note in notes:
        print(f'{name}, {column}: {note}')
    found.append(row)
  return found


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  if '--train' in sys.argv[1:]:
    train_all()
  command = 'python -m experiments.benchmarks.accuracy.support_matrix'
  harness.report('support_matrix', 'what works where', command, rows())
