"""The change of top-1 by compression on 200 and on 500 photographs, as a paired difference.

    python -m experiments.benchmarks.accuracy.photographs TFDS_FOLDER WEIGHTS.safetensors ...

Each file is named as a network (`mobilenet_v1.safetensors`).  The 200 photographs are those of
`configs/one_shot.py`, which the networks were probably trained on.  The 500 of imagenet_nips2017
are not from ImageNet's own files.  No image and no label takes part in the compression: codes along
a trellis whose moments are of synthetic images, on which BatchNorm is corrected too, and the plain
codes, corrected from noise.
"""

import pathlib
from collections.abc import Iterator

import jax

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax.importers import networks
from opq_jax.report import accuracy

RATES = 8, 12  # times smaller, the kernels' payload
SPLITS = {
  'imagenet2012': one_shot.IMAGENET['split'],
  'imagenet_nips2017': 'validation',
}


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  judges = {}
  for dataset, split in SPLITS.items():
    config.dataset = dataset
    batches = one_shot_images.batches_of(config, network, data_dir, split)
    judges[dataset] = one_shot_images.Judge(network, batches)
  images = networks.synthetic_batches(network)
  moments = opq_jax.network.mean_moments(network.model.apply, network.variables, images)
  float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(network.variables))

  for rate in RATES:
    for codes, encoder, inputs in (
      ('plain', opq_jax.encoders.Rounding(), None),
      ('trellis, feedback', opq_jax.encoders.Trellis(moments), images),
    ):
      coded = opq_jax.compress(network.variables, compression_rate=rate, encoder=encoder)
      tree = networks.correct_batch_norm(network, coded.params, images=inputs)
      size = len(opq_jax.file.writer.serialize(tree, coded.state))
      for dataset, judge in judges.items():
        right = accuracy.hits(judge.logits(tree), judge.labels)
        reference = accuracy.hits(judge.reference, judge.labels)
        found = accuracy.paired(right, reference)
        change, low, high = (100 * x for x in (found.difference, found.low, found.high))
        yield {
          'network': name,
          'codes': codes,
          'file, bytes': size,
          'file, times smaller': round(float_bytes / size, 2),
          'photographs': f'{len(right)} of {dataset}',
          'float32, %': round(100 * float(reference.mean()), 1),
          'compressed, %': round(100 * float(right.mean()), 1),
          'gained': found.gained,
          'lost': found.lost,
          'change, points (95 %, paired)': f'{change:+.1f} ({low:+.1f} to {high:+.1f})',
          "McNemar's exact p": float(f'{found.p_value:.2g}'),
        }


if __name__ == '__main__':
  title = 'top-1 of compressed networks against float32, on the same photographs'
  one_shot_images.main('accuracy.photographs', title, compare, __doc__)
