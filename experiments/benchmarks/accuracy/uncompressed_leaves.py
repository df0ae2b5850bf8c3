r"""Bytes of BatchNorm and biases in a file, and accuracy with fewer bits for them.

    python -m experiments.benchmarks.accuracy.uncompressed_leaves \
      TFDS_FOLDER WEIGHTS.safetensors ...

Networks at 2 bits a weight, BatchNorm corrected from noise; each file named as a network
(`mobilenet_v1.safetensors`), with the images of `configs/one_shot.py:NETWORK`.  `folded` is
`opq_jax.correction.fold_batch_norm`, bfloat16 and float16 are
`opq_jax.correction.round_uncompressed`.  `same answer` is the share of images on which
the answer is that of the unchanged network.
"""

import pathlib
import sys

import opq_jax
from configs import one_shot
from experiments.benchmarks import harness, one_shot_images
from opq_jax.importers import networks
from opq_jax.report import accuracy, sizes

BITS = 2.0


def compare(name: str, path: pathlib.Path, data_dir: str) -> list[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  model, variables = network.model, network.variables
  batches = one_shot_images.batches_of(config, network, data_dir, config.split)
  judge = one_shot_images.Judge(network, batches)

  state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / BITS))
  compressed = opq_jax.apply_compression(variables, state)
  corrected = networks.correct_batch_norm(network, compressed)
  folded = opq_jax.correction.fold_batch_norm(corrected, epsilon=model.epsilon)
  variants = {'as it is': corrected, 'folded': folded}
  for dtype in ('bfloat16', 'float16'):
    variants[dtype] = opq_jax.correction.round_uncompressed(corrected, dtype)
    variants[f'folded, {dtype}'] = opq_jax.correction.round_uncompressed(folded, dtype)

  before = judge.logits(corrected)
  rows = []
  for what, tree in variants.items():
    report = sizes.size_report(tree, state)
    scores = accuracy.scores(judge.logits(tree), judge.labels, before)
    rows.append(
      {
        'network': name,
        'BatchNorm and biases': what,
        'file, bytes': report.file,
        'times smaller': round(report.file_rate, 2),
        'top-1, %': round(100 * scores['top1'], 2),
        'same answer, %': round(100 * scores['agreement'], 2),
      }
    )
  return rows


def main() -> None:
  data_dir, *paths = sys.argv[1:]
  rows = []
  for path in map(pathlib.Path, paths):
    name = path.stem.removesuffix('_cifar10')
    rows += compare(name, path, data_dir)
  words = ' '.join(pathlib.Path(path).name for path in paths)
  harness.report(
    'uncompressed_leaves',
    f'what is not compressed, networks at {BITS:g} bits a weight',
    f'python -m experiments.benchmarks.accuracy.uncompressed_leaves TFDS_FOLDER {words}',
    rows,
  )


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit(__doc__)
  main()
