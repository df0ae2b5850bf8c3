"""The shares that symbols have of 2**24 are those of the specification, for ever."""

import itertools
import json
import pathlib

import constriction
import numpy as np
import pytest

from opq_jax.coding import frequencies
from tests.helpers import plain_reader

VECTORS = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'shares.json').read_text())


@pytest.fixture(params=VECTORS, ids=lambda vector: f'{vector["precision"]}-{len(vector["shares"])}')
def vector(request):
  """A table of frequencies, and what constriction made of it when the vector was frozen."""
  return request.param


def table_of(vector):
  bits = frequencies.to_bits(bytes.fromhex(vector['table']), 1 << 12)
  return frequencies.read_table(bits, 0)[0]


def test_vectors_cover_tables():
  assert {vector['precision'] for vector in VECTORS} == set(range(1, 17))
  counts = {len(vector['shares']) for vector in VECTORS}
  assert min(counts) == 2 and max(counts) > 200


def test_table_has_frequencies(vector):
  table = table_of(vector)
  assert table.precision == vector['precision']
  assert table.symbols.tolist() == vector['symbols']
  assert table.frequencies.tolist() == vector['frequencies']


def test_shares_follow_the_rule(vector):
  """left[s] = floor(F_s (2**24 - m) / 2**P) + s, in whole numbers; the plain reader has it too."""
  occurring = [f for f in vector['frequencies'] if f]
  count, sums = len(occurring), [0, *itertools.accumulate(occurring)]
  left = [f * ((1 << 24) - count) // (1 << vector['precision']) + s for s, f in enumerate(sums)]
  assert np.diff([*left[:-1], 1 << 24]).tolist() == vector['shares']
  used = {s: f for s, f in zip(vector['symbols'], vector['frequencies'], strict=True) if f}
  _, bounds, bits = plain_reader.bounds_24((used, vector['precision']))
  assert bits == 24 and np.diff(bounds).tolist() == vector['shares']


def test_constriction_has_the_shares(vector):
  """The first and the last slot of every symbol, as the installed constriction decodes them."""
  table = table_of(vector)
  ends = np.cumsum(vector['shares'])
  slots = np.stack([ends - vector['shares'], ends - 1], 1)
  expected = np.repeat(table.symbols[table.frequencies > 0], 2)
  found = []
  for slot in slots.reshape(-1).tolist():
    coder = constriction.stream.stack.AnsCoder(np.array([slot, 1], np.uint32))
    out = np.zeros(1, np.int8)
    table.decode(coder, out)
    found.append(int(out[0]))
  assert found == expected.tolist()


def test_words_hold_the_symbols(vector):
  table, coded = table_of(vector), np.array(vector['coded'], np.int8)
  out = np.zeros(coded.size, np.int8)
  table.decode(constriction.stream.stack.AnsCoder(np.array(vector['words'], np.uint32)), out)
  assert out.tolist() == coded.tolist()
  coder = constriction.stream.stack.AnsCoder()
  table.encode(coder, coded)
  assert coder.get_compressed().tolist() == vector['words']
  # and the decoder of the specification
  data = np.array(vector['words'], '<u4').tobytes()
  used = {s: f for s, f in zip(vector['symbols'], vector['frequencies'], strict=True) if f}
  plain = plain_reader.Coder(data)
  bounds = plain_reader.bounds_24((used, vector['precision']))
  assert [plain.take(*bounds) for _ in coded] == coded.tolist()
