"""The number of synthetic images against the steps for each: error of the codes on real images.

    python -m experiments.benchmarks.accuracy.synthetic_images TFDS_FOLDER WEIGHTS.safetensors ...

`opq_jax.correction.synthetic_inputs` takes a forward and a backward pass a step, so the cost of a
setting is images times steps.  The moments of each setting give codes along a trellis, all on the
grids of one allocation.

The measure is the divergence from the float network's answers on held-out images, both networks on
batch statistics: summed over networks with a single compressed leaf, and for all leaves at once.
The sum separates settings better, since it excludes errors that happen to cancel between leaves.
Leaves with less than a hundredth of the weights are left out of the sum.  Each file is named as a
network with images of `configs/one_shot.py:NETWORK`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax.compression import LeafState
from opq_jax.core import trees
from opq_jax.importers import networks
from opq_jax.report import accuracy

BITS = {'resnet20': 1.1, 'resnet32': 1.1}  # a weight, where some points are lost; others
OTHER_BITS = 2.0
SETTINGS = (0.5, 10), (1, 5), (2, 2), (4, 1)  # times as many images, and steps
IMAGES = {'resnet20': 256, 'resnet32': 256}  # times 1; of others
OTHER_IMAGES = 64
JUDGED = 512  # images, or half of those that there are


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  variables, apply_fn = network.variables, network.model.apply
  batches = one_shot_images.batches_of(config, network, data_dir, config.split)
  images = np.concatenate([batch['image'] for batch in batches])
  images = np.split(images[-min(JUDGED, len(images) // 2) :], 4)
  answers = jax.jit(lambda tree, x: apply_fn(tree, x, train=True, mutable=['batch_stats'])[0])
  logits = lambda tree: np.concatenate([np.asarray(answers(tree, batch)) for batch in images])
  reference = logits(variables)
  divergence = lambda tree: accuracy.divergence(logits(tree), reference)

  bits = BITS.get(name, OTHER_BITS)
  state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / bits))
  records = trees.records(variables, state.tree, LeafState)
  leaves = trees.named_leaves(variables)
  coded = [path for path, record in zip(leaves, records, strict=True) if record is not None]
  weights = sum(leaves[path].size for path in coded)
  large = [path for path in coded if leaves[path].size >= weights / 100]

  def scores(moments: Any) -> dict[str, object]:
    tree, _ = opq_jax.encoders.Trellis(moments).choose_codes(variables, state)
    found = trees.named_leaves(tree)
    one_by_one = [divergence(trees.replaced(variables, {path: found[path]})) for path in large]
    return {
      'one leaf at a time, nats': round(sum(one_by_one), 4),
      'all leaves, nats': round(divergence(tree), 4),
    }

  row: dict[str, object] = {'network': name, 'bits per weight': bits}
  yield row | {'images': 'none', 'steps': ''} | scores(None)
  (examples, side, *_), *_ = (
    batch.shape for batch in jax.eval_shape(lambda: networks.synthetic_batches(network))
  )
  for times, steps in SETTINGS:
    count = round(times * IMAGES.get(name, OTHER_IMAGES) / examples)
    synthetic = [
      opq_jax.correction.synthetic_inputs(
        apply_fn, variables, key, (examples, side, side, 3), steps=steps
      )
      for key in jax.random.split(jax.random.key(0), count)
    ]
    moments = opq_jax.network.mean_moments(apply_fn, variables, synthetic)
    yield row | {'images': count * examples, 'steps': steps} | scores(moments)


if __name__ == '__main__':
  title = 'feedback from more and less of synthetic images'
  one_shot_images.main('accuracy.synthetic_images', title, compare, __doc__)
