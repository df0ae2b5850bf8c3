"""Seconds and peak memory of `opq compress` over the size of a language model.

    python -m experiments.benchmarks.language_models.sizes [--sizes 135M 1B 3B] \
      [--ways plain feedback trellis] [--tokens 2048] [--folder A_LARGE_DISK]

Folders of random Llama weights in bfloat16, in shards on disk.  Every run is a process of its own,
whose peak resident set is read at its end (VmHWM): libraries, compilers and all.  The ways:

    plain      costs from 512 random tokens, rounded codes
    feedback   the same, and error feedback calibrated with random tokens, block after block
    trellis    the same, with codes along a trellis

Processor time is of all cores.  Rows of other sizes and ways are kept.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.language_models import random_folder

ROOT = pathlib.Path(__file__).parents[3]
BITS = 4
WAYS = {
  'plain': [],
  'feedback': ['--calibration', 'random', '--calibration-tokens'],
  'trellis': ['--trellis', '--calibration', 'random', '--calibration-tokens'],
}


def status(field: str) -> int:
  """Returns a field of this process's memory status, in bytes."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(folder: str, output: str, options: list[str]) -> dict[str, float]:
  """Compresses a folder in this process, and returns what that took."""
  from opq_jax import cli

  seconds, processor = time.perf_counter(), time.process_time()
  code = cli.main(['compress', folder, output, '--bits-per-weight', str(BITS), '--json', *options])
  if code:
    raise SystemExit(code)
  return {
    'seconds': time.perf_counter() - seconds,
    'processor': time.process_time() - processor,
    'peak': status('VmHWM'),
    'file': pathlib.Path(output).stat().st_size,
  }


def measured(folder: pathlib.Path, output: pathlib.Path, options: list[str]) -> dict[str, float]:
  """Returns `measure` of a process of its own."""
  module = 'experiments.benchmarks.language_models.sizes'
  command = [sys.executable, '-m', module, '--measure', str(folder), str(output), *options]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
  found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
  return found


def row_of(
  size: str, weights: int, way: str, tokens: int, found: dict[str, float]
) -> dict[str, Any]:
  """Returns a row of the results."""
  return {
    'network': size,
    'weights, M': round(weights / 1e6),
    'way': way,
    'tokens': tokens if WAYS[way] else '',
    'seconds': round(found['seconds']),
    'processor seconds': round(found['processor']),
    'peak, MiB': round(found['peak'] / 2**20),
    'file, MB': round(found['file'] / 1e6, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--sizes', nargs='+', choices=random_folder.SIZES, default=list(random_folder.SIZES)
  )
  parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
  parser.add_argument('--tokens', type=int, default=2048, help='for calibration')
  parser.add_argument('--folder', help='where the networks are written for a while')
  arguments = parser.parse_args()
  rows = []
  for size in arguments.sizes:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
      folder = pathlib.Path(scratch) / 'network'
      weights = random_folder.write(folder, random_folder.config(size))
      for way in arguments.ways:
        options = [*WAYS[way], str(arguments.tokens)] if WAYS[way] else []
        found = measured(folder, pathlib.Path(scratch) / 'network.opq', options)
        rows.append(row_of(size, weights, way, arguments.tokens, found))
        print(rows[-1], flush=True)
        kept = harness.with_earlier('language_model_sizes', rows, ['network', 'way'])
        harness.report(
          'language_model_sizes',
          f'opq compress at {BITS} bits a weight, random Llama weights',
          'python -m experiments.benchmarks.language_models.sizes',
          sorted(kept, key=lambda row: (row['weights, M'], list(WAYS).index(str(row['way'])))),
        )


if __name__ == '__main__':
  if sys.argv[1:2] == ['--measure']:
    print('\n' + json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4:])))
  else:
    main()
