"""The demonstration page on photographs: classes and logits beside JAX's, bytes and seconds.

    python -m experiments.benchmarks.export.demo_page FILE.opq PACKAGE DATA_DIR

FILE.opq is of `opq compress --model` with 1000 classes, PACKAGE the unpacked npm package
onnxruntime-web, DATA_DIR a folder of TFDS with imagenet2012.  Chromium opens the page, and gets
each photograph as PNG.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

from experiments.benchmarks import harness
from experiments.demo_page import make
from opq_jax import data
from opq_jax.core import trees
from opq_jax.importers import networks
from tests.helpers import demo_pages

MODULE = 'experiments.benchmarks.export.demo_page'
SPLIT = 'train+validation'


def row_of(file: pathlib.Path, package: pathlib.Path, data_dir: str) -> dict[str, object]:
  """Runs the page on all photographs; returns what it has answered, and what it takes."""
  network = networks.load(file)
  forward = jax.jit(network.model.apply)
  examples = data.source('imagenet2012', SPLIT, data_dir)
  cropped = dataclasses.replace(network.source.preprocessing, resize=None)
  differences, largest, same, same_pixels, right, times = [], 0.0, 0, 0, 0, []
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch, 'page')
    make.write(file, package, folder)
    with demo_pages.opened(folder, pathlib.Path(scratch, 'profile')) as page:
      opening = demo_pages.seconds(page)
      for number in range(len(examples)):
        example = examples[number]
        path = pathlib.Path(scratch, f'{number}.png')
        Image.fromarray(example['image']).save(path)
        logits, pixels = demo_pages.answer(page, path)
        times.append(demo_pages.seconds(page)['run the network'])
        image = network.source.preprocessing(example['image'])
        expected = np.asarray(forward(network.variables, image[None]))[0]
        seen = cropped(pixels)
        same_pixels += np.array_equal(seen, image)
        largest = max(largest, float(np.abs(expected).max()))
        differences.append(float(np.abs(logits - expected).max()))
        same += int(logits.argmax() == expected.argmax())
        right += int(logits.argmax() == example['label'])
    sizes = {name: (folder / name).stat().st_size for name in ('network.opq', 'network.onnx')}
    runtime = sum(path.stat().st_size for path in (folder / 'runtime').glob('*wasm*'))
  version = json.loads((package / 'package.json').read_text())['version']
  floats = sum(np.asarray(leaf).nbytes for leaf in trees.named_leaves(network.variables).values())
  return {
    'network': network.name,
    'photographs': len(examples),
    'same pixels': same_pixels,
    'same top-1': same,
    'right': right,
    'largest logit': round(largest, 1),
    'largest difference': f'{max(differences):.1e}',
    'floats': floats,
    '.opq': sizes['network.opq'],
    'program': sizes['network.onnx'],
    f'onnxruntime-web {version}': runtime,
    'decode, s': round(opening['decode the weights'], 2),
    'open, s': round(opening['open the network'], 2),
    'run, s': round(statistics.median(times), 3),
  }


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('file', type=pathlib.Path)
  parser.add_argument('package', type=pathlib.Path)
  parser.add_argument('data_dir')
  options = parser.parse_args(arguments)
  row = row_of(options.file, options.package, options.data_dir)
  command = f'python -m {MODULE} FILE.opq PACKAGE DATA_DIR'
  harness.report('demo_page', 'A compressed network in a browser', command, [row])


if __name__ == '__main__':
  main(sys.argv[1:])
