"""Accuracy by the objective that divides the bits among layers, with and without error feedback.

    python -m experiments.benchmarks.accuracy.objectives TFDS_FOLDER WEIGHTS.safetensors ...

Each file is named as a network (`mobilenet_v1.safetensors`) and judged on the images of
`configs/one_shot.py:NETWORK`, for CIFAR-10 on the first 5,000.  Codes are chosen by
`opq_jax.encoders.Feedback` with moments of noise, and by plain rounding; BatchNorm is corrected by
`opq_jax.correction.correct_batch_norm`.  `divergence` is the mean Kullback-Leibler divergence from
the float network's answers, in nats: on few images it is less noisy than top-1.
"""

import pathlib
from collections.abc import Iterator

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax.allocation import OBJECTIVES
from opq_jax.file import writer
from opq_jax.importers import networks

BITS = 2.0, 1.25  # per weight
IMAGES = 5000


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  variables = network.variables
  batches = one_shot_images.batches_of(config, network, data_dir, config.split)
  judge = one_shot_images.Judge(network, batches[: IMAGES // config.batch_size])
  images = networks.noise_images(network)
  moments = opq_jax.network.second_moments(network.model.apply, variables, images)
  for bits in BITS:
    for objective in OBJECTIVES:
      options = {'compression_rate': 32 / bits, 'objective': objective}
      state = opq_jax.init_state(variables, opq_jax.allocate(variables, **options))
      feedback = opq_jax.encoders.Feedback(moments)
      coded, coded_state, _ = opq_jax.compress(variables, encoder=feedback, **options)
      for codes, tree, its in (
        ('each weight', opq_jax.apply_compression(variables, state), state),
        ('feedback', coded, coded_state),
      ):
        corrected = networks.correct_batch_norm(network, tree)
        yield {
          'network': name,
          'bits per weight': bits,
          'codes': codes,
          'objective': objective,
          'file, bytes': f'{len(writer.serialize(corrected, its)):,}',
        } | one_shot_images.cells(judge.scores(corrected))


if __name__ == '__main__':
  one_shot_images.main(
    'accuracy.objectives', 'the objective, with and without feedback', compare, __doc__
  )
