"""Trains, compresses, finetunes, writes and reads a small network, for `opq demo`.

The data are the handwritten digits of scikit-learn (`pip install opq_jax[demo]`): 1,797 images of
8 x 8 pixels, which the package contains, so nothing is downloaded.
"""

import dataclasses
import os
import tempfile
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from opq_jax import finetuning
from opq_jax.allocation import allocate
from opq_jax.compression import CompressionState, apply_compression, init_state
from opq_jax.core import temporaries, trees
from opq_jax.core.extras import require
from opq_jax.core.trees import PyTree
from opq_jax.correction import correct_batch_norm
from opq_jax.file import reader, writer
from opq_jax.weights import write_safetensors

_TEST = 597  # test images: a third of 1,797, so that 1,200 are left for training
_BATCH = 60  # images: a divisor of 1,200
_PEAK_RATE = 0.003  # learning rate of Adam at the start; finetuning uses a third of it
_NOISE_SHAPE = (128, 8, 8, 1)  # noise batch of the BatchNorm correction, in the images' shape
_WIDTH = 100  # columns where stdout is no terminal


@dataclasses.dataclass(frozen=True)
class Row:
  """One network of the table.

  Attributes:
    network: its description.
    accuracy: top-1 accuracy on the test images, in [0, 1].
    size: size of its file, in bytes.
    rate: size of the float network's file over this size.
  """

  network: str
  accuracy: float
  size: int
  rate: float


class DigitNet(nn.Module):
  """Three convolutions and two dense layers; 160,000 parameters."""

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch 8 8 1'], train: bool = False
  ) -> Float[Array, 'batch 10']:
    norm = lambda x: nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    for features in (32, 64, 128):
      x = norm(nn.Conv(features, (3, 3), use_bias=False)(x))
      if features > 32:
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = norm(nn.Dense(128, use_bias=False)(x.reshape(len(x), -1)))
    return nn.Dense(10)(x)


def run(
  seed: int = 0,
  rate: float = 40.0,
  output: str | os.PathLike[str] | None = None,
  *,
  epochs: int = 12,
) -> list[Row]:
  """Trains, compresses, finetunes, writes, reads and evaluates a network, and prints a table.

  Args:
    seed: of everything random: which images are held out, the first weights, the batches.
    rate: `compression_rate` of `opq_jax.allocate`.
    output: path of the .opq file; by default it is deleted at the end.
    epochs: epochs of training; finetuning takes half as many.

  Returns:
    The rows of the table.

  Raises:
    ValueError: scikit-learn is missing, or `opq_jax.allocate` refuses the rate.
    RuntimeError: a leaf read from the file differs from the leaf written.
  """
  console = Console()
  if not console.is_terminal:
    console = Console(width=_WIDTH)
  train, test = _digits(seed)
  model = DigitNet()
  variables = jax.jit(model.init)(jax.random.key(seed), train[0][:1])
  trained = _train(model, variables, None, train, seed, epochs, _PEAK_RATE, console)
  variables = {'params': trained.params, 'batch_stats': trained.batch_stats}

  # the library's part of the demo
  allocation = allocate(variables, compression_rate=rate)
  state = init_state(variables, allocation)
  compressed = apply_compression(variables, state)
  key = jax.random.key(seed)
  corrected = correct_batch_norm(model.apply, variables, compressed, key, _NOISE_SHAPE)
  params_state = CompressionState(state.tree['params'])
  trained = _train(
    model, corrected, params_state, train, seed, epochs // 2, _PEAK_RATE / 3, console
  )
  finetuned, state = finetuning.network(trained, params_state)

  # the weights are arguments, so one program serves every network
  logits = jax.jit(model.apply)
  images, labels = test
  accuracy = lambda network: float(np.mean(np.argmax(logits(network, images), axis=-1) == labels))
  with tempfile.TemporaryDirectory() as folder, temporaries.registered(folder):
    floats, path = Path(folder) / 'network.safetensors', Path(output or f'{folder}/network.opq')
    write_safetensors(floats, variables)
    writer.save(path, finetuned, state)
    loaded, _ = reader.load(path)
    sizes = [
      floats.stat().st_size,
      len(writer.serialize(compressed, state)),
      len(writer.serialize(corrected, state)),
      *[path.stat().st_size] * 2,
    ]
  _check_identical(loaded, finetuned)
  networks = {
    'float32, as trained': variables,
    'pruned + quantized': compressed,
    '+ BatchNorm corrected': corrected,
    '+ finetuned': finetuned,
    'the same, from its file': loaded,
  }
  rows = [
    Row(name, accuracy(network), size, sizes[0] / size)
    for (name, network), size in zip(networks.items(), sizes, strict=True)
  ]
  weights = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  console.print(_report(rows, weights, rate, output))
  return rows


def _digits(seed: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """Returns (images, labels) of training and of test, images standardised, [count, 8, 8, 1]."""
  datasets = require('sklearn.datasets', 'demo', 'opq demo')
  pixels, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(labels))
  images = pixels[order].reshape(-1, 8, 8, 1).astype(np.float32)
  labels = labels[order].astype(np.int32)
  # standardised by the training images alone, to the mean and variance of the correction's noise
  training = images[_TEST:]
  images = (images - training.mean()) / training.std()
  split = lambda part: (jnp.asarray(images[part]), jnp.asarray(labels[part]))
  return split(slice(_TEST, None)), split(slice(None, _TEST))


def _train(
  model: nn.Module,
  variables: PyTree,
  state: CompressionState | None,
  train: tuple[Array, Array],
  seed: int,
  epochs: int,
  peak: float,
  console: Console,
) -> finetuning.TrainState:
  """Trains; with a compression state, finetunes latent weights."""
  images, labels = train
  steps = len(labels) // _BATCH
  optimizer = optax.adamw(optax.cosine_decay_schedule(peak, epochs * steps))
  train_state = finetuning.init_train_state(variables, optimizer, jax.random.key(seed))
  # one step per call: XLA's CPU backend runs convolutions inside a scan several times slower
  step = jax.jit(partial(finetuning.train_step, apply_fn=model.apply, optimizer=optimizer))
  title = 'training on handwritten digits' if state is None else 'finetuning, masks frozen'
  columns = TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn()
  rng = np.random.default_rng(seed)
  with Progress(*columns, console=console, transient=True) as progress:
    task = progress.add_task(title, total=epochs)
    for _ in range(epochs):
      for batch in rng.permutation(len(labels))[: steps * _BATCH].reshape(steps, _BATCH):
        examples = {'image': images[batch], 'label': labels[batch]}
        train_state, metrics = step(train_state, state, examples)
      loss = float(metrics['loss'])
      progress.update(task, advance=1, description=f'{title}, loss {loss:.3f}')
  return train_state


def _check_identical(loaded: PyTree, written: PyTree) -> None:
  """Raises RuntimeError unless all leaves that were read are those written, bit for bit."""
  expected = trees.named_leaves(written)
  found = trees.named_leaves(loaded)
  same = lambda a, b: np.asarray(a).dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes()
  differing = [
    name
    for name in sorted(expected.keys() | found.keys())
    if name not in expected
    or name not in found
    or not same(found[name], np.asarray(expected[name]))
  ]
  if differing:
    raise RuntimeError(f'the file gave back other values of {differing}, expected the same bits')


def _report(
  rows: list[Row], weights: int, rate: float, output: str | os.PathLike[str] | None
) -> Group:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('network')
  for name in ('test accuracy', 'size, KB', 'times smaller'):
    table.add_column(name, justify='right')
  for row in rows:
    table.add_row(row.network, f'{row.accuracy:.1%}', f'{row.size / 1000:.1f}', f'{row.rate:.1f}')
  summary = (
    f'{weights:,} parameters, {32 / rate:g} bits per weight instead of 32: pruned, quantized and '
    f'corrected without any data, then finetuned with masks and codebooks frozen. The network read '
    f'from the file is the finetuned one bit for bit. Accuracy is on {_TEST} held-out images.'
  )
  path = output or 'small.opq'
  next_steps = (
    f'Next: opq compress your_model.safetensors small.opq; in Python, opq_jax.load({str(path)!r})'
  )
  return Group(table, Text(summary), Text(next_steps))
