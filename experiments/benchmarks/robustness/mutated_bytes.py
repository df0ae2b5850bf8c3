"""Damaged and crafted bytes: random mutations, some of them under correct checksums."""

import json
import random
import zlib
from collections.abc import Callable

from opq_jax.file import container, packing, side_files
from opq_jax.file import index as file_index


def mutated(data: bytes, rng: random.Random) -> bytes:
  """Returns bytes with one to four flips, runs, insertions, removals, repetitions, truncations."""
  damaged = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    position = rng.randrange(len(damaged) + 1)
    run = rng.choice((1, 2, 4, 8, rng.randrange(1, 64)))
    noise = rng.choice((bytes(run), b'\xff' * run, rng.randbytes(run), b'9' * run))
    match rng.randrange(7):
      case 0 | 1 if position < len(damaged):
        damaged[position] ^= 1 << rng.randrange(8)
      case 2:
        damaged[position : position + run] = noise
      case 3:
        damaged[position:position] = noise
      case 4:
        del damaged[position : position + run]
      case 5:
        damaged[position:position] = damaged[position : position + run]
      case 6:
        del damaged[max(position, 1) :]
  return bytes(damaged)


def resealed(data: bytes, rng: random.Random) -> bytes:
  """Returns an .opq file with one part mutated, under correct sizes and checksums."""
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end])
  table, index, codes, blocks, *side = (
    data[end + part['data_offsets'][0] : end + part['data_offsets'][1]]
    for name, part in header.items()
    if name != '__metadata__'
  )
  text = packing.unpack(index, file_index.MAX_INDEX)
  match rng.randrange(5 if side else 4):
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
    case 4:
      carried = json.loads(text)['files']
      files = side_files.unpacked_files(side_files.from_json(carried), side[0])
      name = rng.choice(list(files))
      # of a text, and under its new size: so that it reaches whoever reads the file
      files[rng.choice((name, name, '../a', f'{name}/a', 'Config.json'))] = mutated(
        files[name], rng
      )
      content = json.loads(text)
      joined = b''.join(files[other] for other in sorted(files))
      side = [packing.pack_text(joined)]
      sizes_of = {other: len(files[other]) for other in sorted(files)}
      content['files'] = [len(side[0]), zlib.crc32(side[0]), sizes_of]
      text = json.dumps(content).encode()
  index = packing.pack(text)
  sizes = len(table) // 12, len(index), len(codes), len(blocks), *map(len, side)
  version = header['__metadata__']['version']
  sealed = container.header(sizes, zlib.crc32(index, zlib.crc32(table)), version)
  return b''.join([sealed, table, index, codes, blocks, *side])


def _noise_or_mutation(data: bytes, rng: random.Random) -> bytes:
  """Returns a mutated payload, or random words behind none, a part or all of its table."""
  if rng.randrange(2):
    return mutated(data, rng)
  table = data[: rng.choice((0, 20, 30, len(data) // 2))]
  return table + rng.randbytes(rng.choice((4, 40, 400)))


def resealed_section(data: bytes, rng: random.Random) -> bytes:
  """Returns a mutated section of escaped weights, half of them under a correct checksum."""
  if rng.randrange(2):
    return mutated(data, rng)
  body = mutated(data[:-4], rng)
  return body + zlib.crc32(body).to_bytes(4, 'little')


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
  'escapes': resealed_section,
  'codes': _noise_or_mutation,
  'codes, contexts': _noise_or_mutation,
  'codes, trellis': _noise_or_mutation,
}
