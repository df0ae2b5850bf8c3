"""Codes along a trellis with error feedback, by both versions of the encoder.

    python -m experiments.benchmarks.accuracy.trellis_versions TFDS_FOLDER WEIGHTS.safetensors ...

Version 1 encodes the whole network at every step of the search for its bits; version 2 begins with
an estimate from some outputs of every leaf (`opq_jax.encoders.Trellis`).  Moments, and the
correction of BatchNorm, are from noise with the spectrum of photographs.
"""

import functools
import pathlib
from collections.abc import Iterator

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax import encoders
from opq_jax.importers import networks
from opq_jax.report import sizes

BITS = {'resnet20': 1.5, 'mobilenet_v1': 2.5}


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  variables, images = network.variables, [networks.noise_images(network)]
  batches_of = functools.partial(one_shot_images.batches_of, config, network, data_dir)
  judge = one_shot_images.Judge(network, batches_of(config.split))
  moments = opq_jax.network.mean_moments(network.model.apply, variables, images)
  for version in (1, 2):
    encoder = encoders.Trellis(moments, version=version)
    found = opq_jax.compress(variables, bits_per_weight=BITS[name], encoder=encoder)
    corrected = networks.correct_batch_norm(network, found.params, images=images)
    yield {
      'network': name,
      'bits per weight': BITS[name],
      'version': version,
      'file, bytes': f'{sizes.size_report(corrected, found.state).file:,}',
    } | one_shot_images.cells(judge.scores(corrected))


if __name__ == '__main__':
  one_shot_images.main(
    'accuracy.trellis_versions', 'versions of codes along a trellis', compare, __doc__
  )
