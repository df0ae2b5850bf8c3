"""Accuracy at equal bytes by the choice of codes: plain rounding, error feedback, layer by layer.

    python -m experiments.benchmarks.accuracy.error_feedback TFDS_FOLDER WEIGHTS.safetensors ...

`feedback` is `opq_jax.encoders.Feedback`, with moments of the float network's layer inputs.
`layer by layer` is `opq_jax.encoders.LayerByLayer` on the grids of `feedback`.  Moments and the
correction of BatchNorm use the same inputs: noise with the spectrum of photographs, synthetic
images (`opq_jax.correction.synthetic_inputs`), or the unlabelled images of
`configs/one_shot.py:NETWORK`.  Each file is named as a network (`mobilenet_v1.safetensors`).
"""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax import encoders
from opq_jax.importers import networks
from opq_jax.report import sizes

BITS = {'resnet20': (2.0, 1.5, 1.0), 'resnet32': (2.0, 1.5, 1.0)}
PHOTOGRAPHS = (2.5, 2.0)


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  model, variables = network.model, network.variables

  batches_of = functools.partial(one_shot_images.batches_of, config, network, data_dir)
  judge = one_shot_images.Judge(network, batches_of(config.split))
  images_of = {
    'noise': [networks.noise_images(network)],
    'synthetic images': networks.synthetic_batches(network),
    'images': [batch['image'] for batch in batches_of(config.unlabelled_split)],
  }
  matrices = {
    kind: opq_jax.network.mean_moments(model.apply, variables, images)
    for kind, images in images_of.items()
  }

  for bits in BITS.get(name, PHOTOGRAPHS):
    state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / bits))
    for kind, images in images_of.items():
      feedback = encoders.Feedback(matrices[kind])
      coded, coded_state, allocation = opq_jax.compress(
        variables, compression_rate=32 / bits, encoder=feedback
      )
      grids = opq_jax.init_state(variables, allocation)
      layer_by_layer = encoders.LayerByLayer(model.apply, np.concatenate(images), first=feedback)
      for codes, tree, its in (
        ('each weight', opq_jax.apply_compression(variables, state), state),
        ('feedback', coded, coded_state),
        (
          'layer by layer',
          *layer_by_layer.choose_codes(variables, grids),
        ),
      ):
        corrected = networks.correct_batch_norm(network, tree, images=images)
        yield {
          'network': name,
          'bits per weight': bits,
          'from': kind,
          'codes': codes,
          'file, bytes': f'{sizes.size_report(corrected, its).file:,}',
        } | one_shot_images.cells(judge.scores(corrected))


if __name__ == '__main__':
  one_shot_images.main('accuracy.error_feedback', 'the choice of codes', compare, __doc__)
