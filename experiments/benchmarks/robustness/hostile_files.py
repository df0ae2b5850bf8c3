"""Hostile files: outcomes of damaged and crafted bytes in everything that reads files.

    python -m experiments.benchmarks.robustness.hostile_files [MUTATIONS_OF_EACH_KIND] \
      [--kinds 'opq, slices' ...]

Every mutation is read in a watched process, so that crashes, and reads of more than `LIMIT`
seconds, are counted.  A mutation is drawn by its kind and number alone, so some kinds may be run
by themselves: rows of the others are kept.  The kinds:

    opq            mutations of an .opq file
    opq, bytes     every byte of it with every other value
    opq, resealed  mutations under corrected checksums, so that they reach the parsers and the
                   coder; in the index, of its text
    opq, escapes   mutations of an .opq file of version 2, with escaped weights; and resealed
    opq, slices    mutations of one with stacks of slices and moved axes; and resealed
    opq, FIELD     mutations of the file of `tests/golden` with ties, moved axes along a trellis,
                   scales of outputs, rotated inputs, or side files; of one with palettes; and
                   resealed
    escapes        mutations of a section of escaped weights, half of them under correct checksums
    codes          mutations of payloads, random tables and random words for the ANS decoder; with
                   and without contexts, and along a trellis
    safetensors .. mutations of the same tree in a format that `opq_jax.weights.read_weights` reads
    compress, ...  commands on damaged and lying files and folders, in `hostile_commands`
    export, ...
    decompress, ...

An outcome is one of

    refused   a ValueError; of a command, one line, exit code 2, and everything as it was
    original  the arrays of the undamaged file, bit for bit
    other     another tree.  In a format without checksums (safetensors, msgpack, HDF5) the bytes
              simply hold other numbers.  A resealed .opq file, or section of escaped weights, must
              be written and read again bit for bit, and one of rotated leaves be the same leaf by
              leaf.  A command has written an output that can be read
    wrong     anything else: a failure, as are crashes and hangs
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.robustness import hostile_commands
from experiments.benchmarks.robustness.hostile_commands import COMMANDS
from experiments.benchmarks.robustness.hostile_kinds import FIELDS, kind_of, same_arrays
from experiments.benchmarks.robustness.mutated_bytes import MUTATIONS, mutated, resealed

MODULE = 'experiments.benchmarks.robustness.hostile_files'
ROOT = pathlib.Path(__file__).parents[3]

LIMIT = 10.0  # seconds of one read, far above the slowest one on a busy machine
_COMPILING = 60.0  # of one command, which may compile programs for shapes that it has not seen
_START = 300.0  # seconds up to a process's first read, which imports and compiles
KINDS = (
  *('opq', 'opq, bytes', 'opq, resealed', 'opq, escapes', 'opq, escapes, resealed'),
  *('opq, slices', 'opq, slices, resealed'),
  *(f'opq, {field}{end}' for field in FIELDS for end in ('', ', resealed')),
  *('codes', 'codes, contexts', 'codes, trellis', 'escapes'),
  *('safetensors', 'npz', 'msgpack', 'h5', 'keras'),
  *COMMANDS,
)
OUTCOMES = 'refused', 'original', 'other', 'wrong'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('count', nargs='?', type=int, default=10_000, help='mutations of a kind')
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
  parser.add_argument('--begin', type=int, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  kinds, count = arguments.kinds, arguments.count
  if arguments.begin is not None:
    worker(kinds[0], arguments.begin, count)
    return
  rows: list[dict[str, object]] = []
  for kind in kinds:
    rows.append({'kind': kind, **watched(kind, count)})
    print(rows[-1], file=sys.stderr)
  rows = harness.with_earlier('hostile_files', rows, ['kind'])
  rows.sort(key=lambda row: KINDS.index(str(row['kind'])))
  command = f'python -m {MODULE} {count}'
  harness.report('hostile_files', 'mutations tried, and their outcomes', command, rows)
  if any(row['wrong'] or row['crashes'] or row['hangs'] for row in rows):
    sys.exit('found outcomes that must not be')


def watched(kind: str, count: int) -> dict[str, Any]:
  """Counts the outcomes of a kind; after a crash or hang, a new process tries the next mutation."""
  total: collections.Counter[str] = collections.Counter(dict.fromkeys(OUTCOMES, 0))
  failures = collections.Counter(crashes=0, hangs=0)
  slowest, peak = 0.0, 0.0
  begin: int | None = 0
  while begin is not None:
    with tempfile.TemporaryFile('w+') as output:
      command = [sys.executable, '-m', MODULE, str(count), '--kinds', kind, '--begin', str(begin)]
      process = subprocess.Popen(command, stdout=output, cwd=ROOT)
      size, since, is_hung = 0, time.monotonic(), False
      while process.poll() is None:
        time.sleep(0.05)
        if (written := os.fstat(output.fileno()).st_size) != size:
          size, since = written, time.monotonic()
        elif time.monotonic() - since > (3 * _COMPILING if size else _START):
          is_hung = True
          process.kill()
          process.wait()
      output.seek(0)
      lines = [json.loads(line) for line in output if line.endswith('\n')]
    done = [line for line in lines if 'outcome' in line]
    total.update(line['outcome'] for line in done)
    slowest = max([slowest, *(line['seconds'] for line in done)])
    ends = [line['peak'] for line in lines if 'peak' in line]
    peak = max([peak, *ends])
    for line in done:
      if line['outcome'] == 'wrong':
        print(kind, line, file=sys.stderr)
    begin = None if ends else begin + len(done) + 1
    if not ends:
      print(kind, begin - 1, f'exit {process.returncode}', file=sys.stderr)
      failures['hangs' if is_hung else 'crashes'] += 1
  tried = sum(total.values()) + sum(failures.values())
  return {
    'tried': tried,
    **total,
    **failures,
    'slowest, s': round(slowest, 2),
    'peak, MiB': round(peak),
  }


def worker(kind: str, begin: int, count: int) -> None:
  """Tries mutations begin ... count - 1, prints a line of JSON for each, last the memory growth."""
  before = None
  for number, outcome, seconds in tried(kind, begin, count):
    print(json.dumps({'number': number, 'outcome': outcome, 'seconds': seconds}), flush=True)
    before = before or _peak()
  print(json.dumps({'peak': _peak() - (before or _peak())}), flush=True)


def tried(kind: str, begin: int, count: int) -> Iterator[tuple[int, str, float]]:
  """Yields number, outcome and seconds of every mutation of a kind."""
  with tempfile.TemporaryDirectory() as folder:
    original, read, check = kind_of(kind, pathlib.Path(folder))
    expected = read(original)
    if kind == 'opq, bytes':
      count = 255 * len(original)
    for number in range(begin, count):
      if kind == 'opq, bytes':
        other = bytearray(original)
        other[number // 255] ^= number % 255 + 1
        data = bytes(other)
      else:
        rng = random.Random(f'{kind} {number}')
        data = damaged_by(kind)(original, rng)
      start = time.perf_counter()
      try:
        arrays = read(data)
      except ValueError:
        outcome = 'refused'
      except Exception as error:
        outcome = 'wrong'
        print(kind, number, repr(error), file=sys.stderr)
      else:
        outcome = 'read'
      seconds = time.perf_counter() - start
      if outcome == 'read':
        outcome = 'original' if same_arrays(arrays, expected) else check(data, arrays)
      limit = _COMPILING if kind in COMMANDS else LIMIT
      yield number, 'wrong' if seconds > limit else outcome, round(seconds, 4)


def damaged_by(kind: str) -> Callable[[bytes, random.Random], bytes]:
  """Returns what damages the bytes of a kind."""
  if kind in COMMANDS:
    return functools.partial(hostile_commands.damaged, kind)
  return resealed if kind.endswith('resealed') else MUTATIONS.get(kind, mutated)


def _peak() -> float:
  """Returns the largest resident memory so far, in MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == '__main__':
  main()
