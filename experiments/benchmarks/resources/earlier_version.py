"""Error feedback and layer by layer on networks, beside an earlier version of this library.

    git worktree add EARLIER COMMIT
    python -m experiments.benchmarks.resources.earlier_version EARLIER TFDS_FOLDER \
      WEIGHTS.safetensors ... [--steps moments 'layer by layer' ...]

Two processes, one a version, take the same steps in turn: second moments of a network's inputs from
unlabelled images, then codes by rounding, by error feedback, and layer by layer (on the grids of
rounding).  BatchNorm is corrected on the same images.  Compared are the bytes of the whole file,
the divergence of the test images' classes from the float network's, and the processor time of the
step, compilation included.  Each file is named as a network (`mobilenet_v1.safetensors`), whose
images `configs/one_shot.py` names.  Rows of other networks and steps are kept; `moments` are what
`feedback` needs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

STEPS = 'moments', 'rounding', 'feedback', 'layer by layer'
BITS = 2.0
# images of 32 pixels, and of 224: as much arithmetic as some minutes of two processors allow
CALIBRATION = {'cifar10': 256, 'imagenet2012': 16}
TEST = {'cifar10': 1000, 'imagenet2012': 100}


class Version:
  """A process that works with one version of the library."""

  def __init__(self, checkout: pathlib.Path, data_dir: str):
    # -P: the folder of this file has modules whose names are those of others
    self._process = subprocess.Popen(
      [sys.executable, '-P', '-W', 'ignore', __file__, '--serve', data_dir],
      cwd=checkout,
      env={**os.environ, 'PYTHONPATH': f'{checkout}:{os.environ.get("PYTHONPATH", "")}'},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def take(self, path: pathlib.Path, step: str) -> dict[str, Any]:
    """Returns what the process has measured at one step of a network."""
    assert self._process.stdin is not None and self._process.stdout is not None
    print(json.dumps([str(path), step]), file=self._process.stdin, flush=True)
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f'{path.name}, {step}: the process has ended')
    found: dict[str, Any] = json.loads(answer)
    return found

  def close(self) -> None:
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def serve(data_dir: str) -> None:
  """Answers one step a line; all imports of the library are those of this process's version."""
  network: _Network | None = None
  place = ''
  for line in sys.stdin:
    path, step = json.loads(line)
    if network is None or path != place:
      place, network = path, _Network(pathlib.Path(path), data_dir)
    print(json.dumps(network.take(step)), flush=True)


class _Network:
  """A network, its images, and what the steps so far have given."""

  def __init__(self, path: pathlib.Path, data_dir: str):
    import jax
    import numpy as np

    from configs import one_shot
    from experiments.benchmarks import one_shot_images
    from opq_jax.importers import networks

    name = path.stem.removesuffix('_cifar10')
    config = one_shot.get_config(name)
    self._network = networks.load(path, name=name, num_classes=config.num_classes)
    dataset = config.dataset.partition(':')[0]
    batches = one_shot_images.batches_of

    def images_of(split: str, count: int) -> Any:
      found = batches(config, self._network, data_dir, split)
      return np.concatenate([batch['image'] for batch in found])[:count]

    self._images = images_of(config.unlabelled_split, CALIBRATION[dataset])
    self._test = np.array_split(images_of(config.split, TEST[dataset]), 4)
    self._forward = jax.jit(self._network.model.apply)
    self._expected = self._logits(self._network.variables)
    self._moments: Any = None

  def _logits(self, variables: Any) -> Any:
    import numpy as np

    return np.concatenate([np.asarray(self._forward(variables, x)) for x in self._test])

  def take(self, step: str) -> dict[str, Any]:
    import jax

    import opq_jax
    from opq_jax import encoders
    from opq_jax.importers import networks
    from opq_jax.report import accuracy, sizes

    fn, variables = self._network.model.apply, self._network.variables
    start = time.process_time()
    if step == 'moments':
      self._moments = opq_jax.network.second_moments(fn, variables, self._images)
      jax.block_until_ready(self._moments)
      return {'seconds': time.process_time() - start}
    if step == 'layer by layer':
      no_moments = jax.tree.map(lambda _: None, variables)
      # on plain grids: the search for the bits ends at grids that differ in the fifth digit, and
      # layers make good the rounding errors before them, so that nothing could be compared
      encoder: Any = encoders.LayerByLayer(fn, self._images, first=encoders.Feedback(no_moments))
      grids = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / BITS))
      tree, state = encoder.choose_codes(variables, grids)
    else:
      encoder = encoders.Rounding() if step == 'rounding' else encoders.Feedback(self._moments)
      tree, state, _ = opq_jax.compress(variables, compression_rate=32 / BITS, encoder=encoder)
    jax.block_until_ready(tree)
    seconds = time.process_time() - start
    corrected = networks.correct_batch_norm(self._network, tree, images=[self._images])
    return {
      'seconds': seconds,
      'bytes': sizes.size_report(corrected, state).file,
      'divergence': accuracy.divergence(self._logits(corrected), self._expected),
    }


def rows_of(
  versions: dict[str, Version], paths: list[pathlib.Path], steps: list[str]
) -> Iterator[dict[str, object]]:
  """Yields a row for every network and step."""
  for path in paths:
    for number, step in enumerate(steps):
      order = list(versions)[:: -1 if number % 2 else 1]
      found = {name: versions[name].take(path, step) for name in order}
      before, now = found['earlier'], found['now']
      row: dict[str, object] = {'network': path.stem.removesuffix('_cifar10'), 'step': step}
      if 'bytes' in now:
        row |= {
          'bytes, earlier': before['bytes'],
          'bytes, now': now['bytes'],
          'bytes, %': round(100 * (now['bytes'] / before['bytes'] - 1), 3),
          'divergence, earlier': float(f'{before["divergence"]:.4g}'),
          'divergence, now': float(f'{now["divergence"]:.4g}'),
        }
      row |= {
        'processor seconds, earlier': round(before['seconds'], 1),
        'processor seconds, now': round(now['seconds'], 1),
        'times': round(now['seconds'] / before['seconds'], 2),
      }
      yield row


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('earlier', type=pathlib.Path, help='a checkout of the earlier version')
  parser.add_argument('data_dir', help='TFDS folder')
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--steps', nargs='+', choices=STEPS, default=list(STEPS))
  arguments = parser.parse_args()
  from experiments.benchmarks import harness

  here = pathlib.Path(__file__).parents[3]
  checkouts = {'earlier': arguments.earlier.absolute(), 'now': here}
  versions = {name: Version(path, arguments.data_dir) for name, path in checkouts.items()}
  rows = []
  for row in rows_of(versions, [path.absolute() for path in arguments.weights], arguments.steps):
    rows.append(row)
    print(json.dumps(row), flush=True)
  for version in versions.values():
    version.close()
  rows = harness.with_earlier('earlier_version', rows, ['network', 'step'])
  networks = list(dict.fromkeys(row['network'] for row in rows))
  rows.sort(key=lambda row: (networks.index(row['network']), STEPS.index(str(row['step']))))
  module = 'experiments.benchmarks.resources.earlier_version'
  harness.report(
    'earlier_version',
    f'networks at {BITS:g} bits a weight, beside an earlier version',
    f'python -m {module} EARLIER TFDS_FOLDER WEIGHTS.safetensors ...',
    rows,
  )


if __name__ == '__main__':
  if sys.argv[1:2] == ['--serve']:
    serve(sys.argv[2])
  else:
    main()
