"""Processor time of reading whole .opq files, in Python and in JavaScript.

    python -m experiments.benchmarks.resources.reading NET.opq [NET.opq ...]

Python is a fresh process that opens the file and reads every leaf, imports included; beside it, one
that imports NumPy alone.  JavaScript is one process of Node.js that decodes the file again and
again: the first time, and the median of later ones, when its compiler has done its work.  Seconds
of all threads together.  Both must return the same, byte for byte.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

from experiments.benchmarks import harness
from experiments.benchmarks.robustness.second_decoder import DECODER, outcomes
from opq_jax.file.reader import OpqFile

MODULE = 'experiments.benchmarks.resources.reading'
ROUNDS = 9

_PYTHON = """
import sys
from opq_jax.file.reader import OpqFile
with OpqFile(sys.argv[1]) as file:
  for name in file:
    file[name]
"""

_JAVASCRIPT = """
import {readFileSync} from 'node:fs';
const [decoder, path, rounds] = process.argv.slice(1);
const {openOpq} = await import(decoder);
const bytes = readFileSync(path);
const seconds = [];
for (let round = 0; round < Number(rounds); round++) {
  const before = process.cpuUsage();
  const file = openOpq(bytes);
  for (const name of file.names) file.leaf(name);
  const {user, system} = process.cpuUsage(before);
  seconds.push((user + system) / 1e6);
}
console.log(JSON.stringify(seconds));
"""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('files', nargs='+', metavar='NET.opq')
  paths = [pathlib.Path(path) for path in parser.parse_args().files]
  names = ' '.join(path.name for path in paths)
  rows = [measured(path) for path in paths]
  title = 'processor seconds of reading every leaf'
  harness.report('reading', title, f'python -m {MODULE} {names}', rows)


def measured(path: pathlib.Path) -> dict[str, object]:
  """Returns the row of a file."""
  with OpqFile(path) as file:
    weights = sum(array.size for array in file.values())
  # in turn, so that a slow moment affects both
  codes = _PYTHON, 'import numpy'
  seconds = [[child_seconds([sys.executable, '-c', c, str(path)]) for c in codes] for _ in range(7)]
  in_python, numpy_alone = map(min, zip(*seconds, strict=True))
  script = ['node', '--input-type=module', '-e', _JAVASCRIPT]
  run = subprocess.run(
    [*script, str(DECODER), str(path), str(ROUNDS)], stdout=subprocess.PIPE, check=True
  )
  first, *later = json.loads(run.stdout)
  warm = sorted(later)[len(later) // 2]
  return {
    'file': path.name,
    'bytes': path.stat().st_size,
    'weights': weights,
    'arrays': next(outcomes([path.read_bytes()]))[0],
    'Python, fresh process, s': round(in_python, 2),
    'import numpy alone, s': round(numpy_alone, 2),
    'JavaScript, first time, s': round(first, 2),
    'JavaScript, warm, s': round(warm, 2),
    'JavaScript, warm, million weights a second': round(weights / warm / 1e6, 1),
  }


def child_seconds(command: list[str]) -> float:
  """Returns the processor seconds of a command."""
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = used()
  subprocess.run(command, check=True)
  return used() - before


if __name__ == '__main__':
  main()
