"""The JavaScript decoder against the Python reader: the same arrays, or an error of both.

    python -m experiments.benchmarks.robustness.second_decoder [FILES_OF_EACH_KIND] \
      [--kinds random resealed ...]

Files are drawn by `random_files`, those of every kind by their number alone:

    random     as drawn: all that a file holds must be the same, byte for byte
    damaged    mutations of them
    resealed   mutations under corrected checksums, so that they reach the parsers and the coder;
               in the index, of its text

An outcome is one of

    same       both return all arrays, codes, metadata and side files, byte for byte the same
    refused    both refuse the file
    differ     anything else: a failure, as is an error of the decoder that is no refusal

and a file on which the decoder takes more than `LIMIT` processor seconds is a hang.  Node.js must
be installed.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.robustness.mutated_bytes import mutated, resealed
from experiments.benchmarks.robustness.random_files import random_file
from opq_jax.file.reader import OpqFile

MODULE = 'experiments.benchmarks.robustness.second_decoder'
ROOT = pathlib.Path(__file__).parents[3]
DECODER = ROOT / 'opq_jax' / 'report' / 'javascript' / 'opq.mjs'
SCRIPT = pathlib.Path(__file__).with_suffix('.mjs')

LIMIT = 10.0  # processor seconds of one file, far above the slowest one
_PATIENCE = 600.0  # seconds of a bundle on a busy machine, after which its process is ended
_BUNDLE = 250  # files that one process decodes

KINDS: dict[str, Callable[[bytes, int], bytes]] = {
  'random': lambda data, number: data,
  'damaged': lambda data, number: mutated(data, random.Random(f'damaged {number}')),
  'resealed': lambda data, number: resealed(data, random.Random(f'resealed {number}')),
}
"""The kinds of files, made of a random file and its number."""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('count', nargs='?', type=int, default=10_000, help='files of a kind')
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=[*KINDS])
  arguments = parser.parse_args()
  rows = counted(arguments.kinds, arguments.count)
  rows = harness.with_earlier('second_decoder', rows, ['kind'])
  rows.sort(key=lambda row: [*KINDS].index(str(row['kind'])))
  command = f'python -m {MODULE} {arguments.count}'
  title = 'files read by the JavaScript decoder and the Python reader'
  harness.report('second_decoder', title, command, rows)
  is_wrong = lambda row: (
    row['differ'] or row['hangs'] or (row['kind'] == 'random' and row['refused'])
  )
  if any(map(is_wrong, rows)):
    sys.exit('found outcomes that must not be')


def counted(kinds: Sequence[str], count: int) -> list[dict[str, Any]]:
  """Returns a row for each kind: how often each outcome occurs among its first files."""
  total = {kind: collections.Counter(same=0, refused=0, differ=0, hangs=0) for kind in kinds}
  slowest = dict.fromkeys(kinds, 0.0)
  for begin in range(0, count, _BUNDLE):
    numbers = range(begin, min(begin + _BUNDLE, count))
    files = [random_file(number) for number in numbers]
    for kind in kinds:
      made = [KINDS[kind](data, number) for number, data in zip(numbers, files, strict=True)]
      for number, (outcome, seconds) in zip(numbers, outcomes(made), strict=True):
        total[kind][outcome] += 1
        slowest[kind] = max(slowest[kind], seconds)
        if outcome not in ('same', 'refused'):
          print(kind, number, outcome, file=sys.stderr)
  return [
    {'kind': kind, 'files': count, **total[kind], 'slowest, s': round(slowest[kind], 2)}
    for kind in kinds
  ]


def outcomes(files: list[bytes]) -> Iterator[tuple[str, float]]:
  """Yields the outcome of every file, and the seconds that the JavaScript decoder takes."""
  lines = decoded(files)
  for data, line in zip(files, lines, strict=True):
    outcome = 'same' if 'digest' in line else 'refused'
    if line.get('digest') != digest(data) or line.get('type', 'Error') != 'Error':
      outcome = 'differ'
      print(line, file=sys.stderr)
    yield ('hangs' if line['seconds'] >= LIMIT else outcome), line['seconds']


def decoded(files: list[bytes]) -> list[dict[str, Any]]:
  """Returns what the JavaScript decoder makes of every file: `digest`, or `error` and `type`."""
  lines: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as folder:
    while len(lines) < len(files):
      bundle = pathlib.Path(folder, 'bundle')
      rest = files[len(lines) :]
      bundle.write_bytes(b''.join(struct.pack('<I', len(data)) + data for data in rest))
      command = ['node', str(SCRIPT), str(DECODER), str(bundle)]
      try:
        run = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=_PATIENCE)
        output, end = run.stdout, {'error': f'exit {run.returncode}', 'type': 'crash'}
      except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b'', {'error': 'no end', 'type': 'hang'}
      lines += [json.loads(line) for line in output.splitlines(keepends=True) if line[-1:] == b'\n']
      if len(lines) < len(files):
        # the file that the process did not come back from
        lines.append({**end, 'seconds': LIMIT})
  return lines


def digest(data: bytes) -> str | None:
  """Returns the digest of all that a file holds, as the script makes it; None where refused."""
  found = hashlib.sha256()

  def text(string: str) -> None:
    units = string.encode('utf-16-le', 'surrogatepass')
    found.update(f'{len(units) // 2}:'.encode() + units)

  def content(part: bytes) -> None:
    found.update(f'{len(part)}:'.encode() + part)

  try:
    with OpqFile(data) as file:
      in_order = lambda key: key.encode('utf-16-be', 'surrogatepass')
      for key in sorted(file.metadata, key=in_order):
        text(key)
        text(file.metadata[key])
      for name, array in file.items():
        text(name)
        text(f'{array.dtype.name}[{",".join(map(str, array.shape))}]')
        content(array.tobytes())
        if file.grids(name):
          content(file.codes(name).tobytes())
      for name, part in file.read_side_files().items():
        text(name)
        content(part)
  except ValueError:
    return None
  return found.hexdigest()


if __name__ == '__main__':
  main()
