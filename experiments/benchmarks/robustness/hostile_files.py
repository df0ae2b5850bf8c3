"""Hostile files: what becomes of damaged and crafted bytes in everything that reads files.

    python -m experiments.benchmarks.robustness.hostile_files [MUTATIONS_OF_EACH_KIND]

Every mutation is read in a process that is watched: a crash, or a read of more than `LIMIT`
seconds, is counted and not survived.  The kinds:

    opq            mutations of an .opq file
    opq, bytes     every byte of it with every other value
    opq, resealed  mutations under checksums made right again, so that they reach the parsers and
                   the coder; in the index, of its text
    opq, escapes   mutations of an .opq file of version 2, with escaped weights; and resealed
    escapes        mutations of a section of escaped weights, half of them under the right checksum
    codes          mutations of payloads, random tables and random words for the ANS decoder; with
                   and without contexts, and along a trellis
    others         mutations of the same tree in a format that `opq_jax.weights.read_weights` reads

An outcome is one of

    refused   a ValueError
    original  the arrays of the undamaged file, bit for bit
    other     another tree.  Of a format without checksums of its own (safetensors, msgpack, HDF5)
              that is what the bytes say.  A resealed .opq file is another file; then it must be
              one that `opq_jax.save` writes again and `opq_jax.load` reads again, bit for bit; and
              so is a resealed section of escaped weights
    wrong     anything else: a failure, as are crashes and hangs
"""

import collections
import io
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

import opq_jax
from experiments.benchmarks import harness
from opq_jax.coding import escapes
from opq_jax.coding import payload as entropy_coding
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.records import affine_codebook
from opq_jax.core import trees
from opq_jax.file import index as file_index
from opq_jax.file import reader, writer
from opq_jax.weights import read_weights

MODULE = 'experiments.benchmarks.robustness.hostile_files'
ROOT = pathlib.Path(__file__).parents[3]

LIMIT = 10.0  # seconds of one read
_START = 300.0  # seconds of a process up to its first
KINDS = (
  *('opq', 'opq, bytes', 'opq, resealed', 'opq, escapes', 'opq, escapes, resealed'),
  *('codes', 'codes, contexts', 'codes, trellis', 'escapes'),
  *('safetensors', 'npz', 'msgpack', 'h5', 'keras'),
)
OUTCOMES = 'refused', 'original', 'other', 'wrong'


def main(count: int) -> None:
  rows: list[dict[str, object]] = []
  for kind in KINDS:
    rows.append({'kind': kind, **watched(kind, count)})
    print(rows[-1], file=sys.stderr)
  command = f'python -m {MODULE} {count}'
  harness.report('hostile_files', 'mutations tried, and their outcomes', command, rows)
  if any(row['wrong'] or row['crashes'] or row['hangs'] for row in rows):
    sys.exit('found outcomes that must not be')


def watched(kind: str, count: int) -> dict[str, Any]:
  """Outcomes of all mutations of a kind; a process that crashes or hangs goes on with the next."""
  total: collections.Counter[str] = collections.Counter(dict.fromkeys(OUTCOMES, 0))
  failures = collections.Counter(crashes=0, hangs=0)
  slowest, peak = 0.0, 0.0
  begin: int | None = 0
  while begin is not None:
    with tempfile.TemporaryFile('w+') as output:
      command = [sys.executable, '-m', MODULE, kind, str(begin), str(count)]
      process = subprocess.Popen(command, stdout=output, cwd=ROOT)
      size, since, is_hung = 0, time.monotonic(), False
      while process.poll() is None:
        time.sleep(0.05)
        if (now := os.fstat(output.fileno()).st_size) != size:
          size, since = now, time.monotonic()
        elif time.monotonic() - since > (3 * LIMIT if size else _START):
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
  """Tries mutations begin ... count - 1, a line of JSON each; and its growth of memory at last."""
  before = None
  for number, outcome, seconds in tried(kind, begin, count):
    print(json.dumps({'number': number, 'outcome': outcome, 'seconds': seconds}), flush=True)
    before = before or _peak()
  print(json.dumps({'peak': _peak() - (before or _peak())}), flush=True)


def tried(kind: str, begin: int, count: int) -> Iterator[tuple[int, str, float]]:
  """Number, outcome and seconds of every mutation of a kind."""
  with tempfile.TemporaryDirectory() as folder:
    original, read, check = _kind(kind, pathlib.Path(folder))
    expected = read(original)
    if kind == 'opq, bytes':
      count = 255 * len(original)
    for number in range(begin, count):
      if kind == 'opq, bytes':
        damaged = bytearray(original)
        damaged[number // 255] ^= number % 255 + 1
        data = bytes(damaged)
      else:
        rng = random.Random(f'{kind} {number}')
        data = _MUTATE.get(kind, mutated)(original, rng)
      start = time.perf_counter()
      try:
        found = read(data)
      except ValueError:
        outcome = 'refused'
      except Exception as error:
        outcome = 'wrong'
        print(kind, number, repr(error), file=sys.stderr)
      else:
        outcome = 'original' if _same(found, expected) else check(data, found)
      seconds = time.perf_counter() - start
      yield number, 'wrong' if seconds > LIMIT else outcome, round(seconds, 4)


def mutated(data: bytes, rng: random.Random) -> bytes:
  """One to four flips, runs, insertions, removals, repetitions or a truncation."""
  damaged = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    at = rng.randrange(len(damaged) + 1)
    run = rng.choice((1, 2, 4, 8, rng.randrange(1, 64)))
    noise = rng.choice((bytes(run), b'\xff' * run, rng.randbytes(run), b'9' * run))
    match rng.randrange(7):
      case 0 | 1 if at < len(damaged):
        damaged[at] ^= 1 << rng.randrange(8)
      case 2:
        damaged[at : at + run] = noise
      case 3:
        damaged[at:at] = noise
      case 4:
        del damaged[at : at + run]
      case 5:
        damaged[at:at] = damaged[at : at + run]
      case 6:
        del damaged[max(at, 1) :]
  return bytes(damaged)


def resealed(data: bytes, rng: random.Random) -> bytes:
  """A mutation of one part of an .opq file, under sizes and checksums that are right."""
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end])
  table, index, codes, blocks = (
    data[end + header[name]['data_offsets'][0] : end + header[name]['data_offsets'][1]]
    for name in file_index.TENSORS
  )
  text = file_index.unpack(index, file_index.MAX_INDEX)
  match rng.randrange(4):
    case 0:
      table = mutated(table, rng)
      table = table[: len(table) // 12 * 12]
    case 1:
      text = mutated(text, rng)
    case 2:
      codes = mutated(codes, rng)[: len(codes)].ljust(len(codes), b'\1')
    case 3:
      blocks = mutated(blocks, rng)
      content = json.loads(text)
      content['blocks'] = [len(blocks), zlib.crc32(blocks)]
      text = json.dumps(content).encode()
  index = file_index.pack(text)
  sizes = len(table) // 12, len(index), len(codes), len(blocks)
  version = header['__metadata__']['version']
  sealed = file_index.header(sizes, zlib.crc32(index, zlib.crc32(table)), version)
  return sealed + table + index + codes + blocks


def _noise_or_mutation(data: bytes, rng: random.Random) -> bytes:
  if rng.randrange(2):
    return mutated(data, rng)
  # a table that is right, before words that are not; or nothing that is right
  table = data[: rng.choice((0, 20, 30, len(data) // 2))]
  return table + rng.randbytes(rng.choice((4, 40, 400)))


def resealed_section(data: bytes, rng: random.Random) -> bytes:
  """A mutation of a section of escaped weights, maybe under a checksum that is right."""
  if rng.randrange(2):
    return mutated(data, rng)
  body = mutated(data[:-4], rng)
  return body + zlib.crc32(body).to_bytes(4, 'little')


_MUTATE = {
  'opq, resealed': resealed,
  'opq, escapes, resealed': resealed,
  'escapes': resealed_section,
  'codes': _noise_or_mutation,
  'codes, contexts': _noise_or_mutation,
  'codes, trellis': _noise_or_mutation,
}


def tree() -> dict[str, np.ndarray]:
  """Three dtypes, kernels and vectors, and a leaf without elements."""
  draw = np.random.default_rng(0).laplace
  return {
    'conv/kernel': draw(size=(3, 3, 2, 4)).astype(np.float32),
    'dense/kernel': draw(size=(6, 5)).astype(np.float32),
    'dense/bias': draw(size=5).astype(np.float32),
    'empty/bias': np.zeros((0, 2), np.float32),
    'half/kernel': draw(size=(4, 3)).astype(np.float16),
    'steps/count': np.array(7, np.int32),
  }


def opq_file(has_escapes: bool) -> bytes:
  """The tree as an .opq file, with a leaf of bfloat16, a list, metadata, and maybe escapes."""
  params = tree()
  params['brain'] = [params['conv/kernel'].astype(ml_dtypes.bfloat16), None]
  book = affine_codebook(jnp.float32(0.625), jnp.float32(0.25), jnp.int32(5))
  grid = {'threshold': np.float32(0.5), 'step': np.float32(0.25), 'levels': np.int32(5)}

  def leaf_state(path: Any, leaf: np.ndarray) -> LeafState | None:
    if 'kernel' not in str(path) and leaf.dtype != ml_dtypes.bfloat16:
      return None
    kinds = (np.abs(leaf.astype(np.float32)) > 0.5).astype(np.uint8)
    if has_escapes:
      kinds[np.abs(leaf.astype(np.float32)) > 1.75] = 2
    return LeafState(kinds=kinds, codebook=book, dtype=leaf.dtype, **grid)

  state = CompressionState(jax.tree_util.tree_map_with_path(leaf_state, params))
  return writer.serialize(params, state, {'from': 'experiments', 'é': '[{"'})


def _kind(
  kind: str, folder: pathlib.Path
) -> tuple[bytes, Callable[[bytes], Any], Callable[[bytes, Any], str]]:
  """The original bytes of a kind, how they are read, and what an accepted other tree is."""
  if kind == 'escapes':
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(4000, 60, replace=False))
    values = rng.laplace(size=60).astype(np.float32)
    read = lambda data: escapes.decode(data, 4000, 60, np.dtype(np.float32))
    again = lambda _, found: 'other' if _same(read(escapes.encode(*found)), found) else 'wrong'
    return escapes.encode(positions, values), read, again
  if kind.startswith('codes'):
    weights = np.random.default_rng(0).laplace(size=(3, 3, 8, 16)).astype(np.float32)
    if 'contexts' in kind:  # worth having where neighbours are alike
      weights = np.cumsum(np.cumsum(weights, 0), 1) / 4
    codes = np.rint(2 * weights).astype(np.int8)
    if 'trellis' in kind:
      state = opq_jax.init_state(weights, opq_jax.allocate(weights, compression_rate=12.0))
      coded = opq_jax.encoders.Trellis().choose_codes(weights, state)
      codes = np.asarray(opq_jax.encode(*coded))
    read = lambda data: entropy_coding.decode_codes(data, codes.shape)
    payload = entropy_coding.encode_codes(codes, contexts=kind != 'codes')
    return payload, read, lambda *_: 'wrong'
  if kind.startswith('opq'):
    check = _saved_again if 'resealed' in kind else lambda *_: 'wrong'
    return opq_file('escapes' in kind), opq_jax.load, check
  path = folder / f'net.{kind}'
  _write(path, tree())

  def read(data: bytes) -> Any:
    path.write_bytes(data)
    return read_weights(path)

  return path.read_bytes(), read, lambda *_: 'other'


def _write(path: pathlib.Path, params: dict[str, np.ndarray]) -> None:
  match path.suffix:
    case '.safetensors':
      path.write_bytes(safetensors.numpy.save(params))
    case '.npz':
      np.savez_compressed(path, **params)
    case '.msgpack':
      path.write_bytes(flax.serialization.to_bytes(params))
    case '.h5' | '.keras':
      import zipfile

      import h5py

      buffer = io.BytesIO()
      with h5py.File(buffer, 'w') as file:
        for number, (name, leaf) in enumerate(params.items()):
          layer, weight = name.split('/')
          options = (
            {'compression': 'gzip', 'chunks': leaf.shape} if leaf.ndim > 1 < leaf.size else {}
          )
          if path.suffix == '.h5':
            file.create_dataset(f'{layer}/{layer}/{weight}:0', data=leaf, **options)
          else:
            kind = f'dense_{number}'
            file.create_dataset(f'layers/{kind}/vars/{int(weight == "bias")}', data=leaf, **options)
            file[f'layers/{kind}/vars'].attrs['name'] = f'{layer}_{weight}'
      if path.suffix == '.h5':
        path.write_bytes(buffer.getvalue())
        return
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('config.json', json.dumps({'config': {'layers': []}}))
        archive.writestr('model.weights.h5', buffer.getvalue())


def _saved_again(data: bytes, found: Any) -> str:
  """Whether a resealed file that loads is one that could have been written."""
  again = reader.load(writer.serialize(*found))
  return 'other' if _same(again, found) else 'wrong'


def _same(found: Any, expected: Any) -> bool:
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  return found.keys() == expected.keys() and all(
    (found[name].dtype, found[name].shape, found[name].tobytes())
    == (leaf.dtype, leaf.shape, leaf.tobytes())
    for name, leaf in expected.items()
  )


def _peak() -> float:
  """Largest resident memory so far, MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == '__main__':
  if len(sys.argv) == 4:
    worker(sys.argv[1], *map(int, sys.argv[2:]))
  else:
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
