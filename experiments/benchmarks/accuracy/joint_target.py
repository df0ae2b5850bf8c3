"""One joint target against the paper's two, at the same size of the file: one shot, no finetuning.

    python -m experiments.benchmarks.accuracy.joint_target TFDS_FOLDER RESNET.safetensors ...

For every file rate, `compression_rate` alone (`opq_jax.file.rate`), and a pruning rate with a
number of bits for the survivors: for each of some bits, the pruning rate whose file is as large.
BatchNorm corrected from noise; top-1 on CIFAR-10's 10,000 test images; relative squared error of
all compressed weights.
"""

import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax import data
from opq_jax.file import rate as file_rate
from opq_jax.file import writer
from opq_jax.importers import networks
from opq_jax.report import accuracy

RATES = 10.0, 15.0, 20.0
BITS = 2.0, 2.5, 3.0, 4.0
BATCH = 500
STEPS = 12  # of a bisection between pruning rates of 0.1 and 0.98: to 0.02 points


def of_two_targets(variables, bits: float, most_bytes: int):
  """Returns the state of the smallest pruning rate whose file fits; None if 1 % is left unused."""
  low, high, found = 0.1, 0.98, None
  for _ in range(STEPS):
    sparsity = (low + high) / 2
    try:
      allocation = opq_jax.allocate(variables, sparsity=sparsity, bits=bits)
    except ValueError:  # so many bits cannot be spent on so few weights
      high = sparsity
      continue
    state = opq_jax.init_state(variables, allocation)
    size = len(writer.serialize(variables, state))
    if size <= most_bytes:
      high, found = sparsity, state if size >= 0.99 * most_bytes else None
    else:
      low = sparsity
  return found


def compare(path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  name = path.stem.removesuffix('_cifar10')
  network = networks.load(path, name=name, num_classes=10)
  model, variables, source = network[1:]
  batches = list(
    data.batches(
      'cifar10:3.0.2',
      'test',
      data_dir=data_dir,
      batch_size=BATCH,
      preprocessing=source.preprocessing,
    )
  )
  labels = np.concatenate([batch['label'] for batch in batches])
  forward = jax.jit(model.apply)

  def row(rate: float, what: str, state) -> dict[str, object]:
    compressed = opq_jax.apply_compression(variables, state)
    squared = lambda tree: sum(
      float(np.sum(np.square(np.asarray(leaf)))) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1
    )
    error = jax.tree.map(lambda one, other: one - other, variables, compressed)
    corrected = networks.correct_batch_norm(network, compressed)
    logits = np.concatenate([np.asarray(forward(corrected, b['image'])) for b in batches])
    report = opq_jax.size_report(corrected, state)
    return {
      'network': name,
      'asked': f'{rate:g} times smaller',
      'targets': what,
      'file, bytes': report.file,
      'pruned, %': round(100 * report.sparsity, 1),
      'relative squared error': round(squared(error) / squared(variables), 4),
      'top-1, %': round(100 * float(accuracy.hits(logits, labels).mean()), 2),
    }

  for rate in RATES:
    joint = file_rate.at_file_rate(variables, rate)
    yield row(rate, 'one: compression rate', joint.state)
    for bits in BITS:
      state = of_two_targets(variables, bits, joint.file_bytes)
      if state is not None:
        yield row(rate, f'two: sparsity and {bits:g} bits', state)


def main() -> None:
  data_dir, *paths = sys.argv[1:]
  words = ' '.join(pathlib.Path(path).name for path in paths)
  harness.report(
    'joint_target',
    'one joint target against two, files of the same size',
    f'python -m experiments.benchmarks.accuracy.joint_target TFDS_FOLDER {words}',
    [row for path in paths for row in compare(pathlib.Path(path), data_dir)],
  )


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit(__doc__)
  main()
