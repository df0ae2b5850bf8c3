"""Indexes and grids that no reader may take, under checksums that are right."""

import zlib

import numpy as np

from opq_jax.file import container
from tests.helpers.opq_files import edited, parts, replaced, version_of


def with_grids(data, grids):
  """The file with other grids under a checksum that is right."""
  header, offsets = parts(data)
  table = np.array(grids, '<f4').tobytes()
  sizes = [offsets[name][1] - offsets[name][0] for name in container.TENSORS]
  body = data[len(header) :]
  checksum = zlib.crc32(body[slice(*offsets['index'])], zlib.crc32(table))
  header = container.header((sizes[0] // 12, *sizes[1:]), checksum, version_of(data))
  return header + table + body[len(table) :]


GRIDS = [
  *[(np.nan, 0.75, 0.5), (0.5, np.nan, 0.5), (0.5, 0.75, np.nan)],
  *[(np.inf, 0.75, 0.5), (0.5, np.inf, 0.5), (0.5, 0.75, np.inf)],
  *[(0.5, 0.75, -0.5), (0.5, 0.75, 0), (-1, 0.75, 0.5), (0.5, 3e38, 3e38)],
  *[(0.5, 0.75, 0.7), (0.5, 0.75, 1e-45), (0.5, 16777216.0, 0.5)],
  (0.5, -0.75, 0.5),
]
"""Threshold, first value and step of leaf `b/1` of `opq_files.small`, of four levels."""


def nested(begin, end, depth):
  return f'{{"blocks":[],"metadata":{{}},"tree":{begin * depth}null{end * depth}}}'


LEAF_A, LEAF_B0 = '"a":"float32[12,5] 4 ', '"float32[7]"'

INDEXES = {
  'no JSON': lambda text: text[:-1],
  'no object': lambda text: '[]',
  'NaN': edited(blocks=[float('nan'), 1]),
  'no tree': lambda text: text.replace('"tree"', '"tee"'),
  'key twice': replaced('"c":', '"a":'),
  'name twice': replaced('"c":', '"b/0":'),
  'huge leaf': replaced(LEAF_A, '"a":"float32[999999999999,5] 4 '),
  'overflow': replaced(LEAF_A, f'"a":"float32[{",".join(["4294967296"] * 3)}] 4 '),
  'huge integer': replaced(LEAF_A, f'"a":"float32[{"9" * 5000}] 4 '),
  'negative dimension': replaced(LEAF_A, '"a":"float32[-12,-5] 4 '),
  'too many dimensions': replaced(LEAF_A, f'"a":"float32[{"1," * 69}60] 4 '),
  'other shape': replaced(LEAF_A, '"a":"float32[12,6] 4 '),
  'no weights': replaced(LEAF_A, '"a":"float32[0] 4 '),
  'other digits': replaced(LEAF_A, '"a":"float32[١٢,5] 4 '),
  'levels below codes': replaced(LEAF_A, '"a":"float32[12,5] 2 '),
  'too many levels': replaced(LEAF_A, '"a":"float32[12,5] 128 '),
  'integers compressed': replaced(LEAF_A, '"a":"int32[12,5] 4 '),
  'more bytes': replaced(LEAF_A, '"a":"float32[12,5] 4 9'),
  'no levels': replaced(LEAF_A, '"a":"float32[12,5] '),
  'objects': replaced(LEAF_B0, '"object[7]"'),
  'unknown dtype': replaced(LEAF_B0, '"float33[7]"'),
  'longer leaf': replaced(LEAF_B0, '"float32[8]"'),
  'very long leaf': replaced(LEAF_B0, '"float32[99999999999999]"'),
  'longest leaf': replaced(LEAF_B0, '"float64[999999999999999999]"'),
  'more rows': replaced(LEAF_B0, '"float32[7] 4 1"'),
  'number for a leaf': replaced(LEAF_B0, '7'),
  'unknown container': replaced('["list"', '["set"'),
  'empty container': replaced('["list"', '[["list"]'),
  'bad key': replaced('"c":', '":c":'),
  'key with zeros': replaced('"c":', '":03":'),
  'no blocks': edited(blocks=[]),
  'half a block': edited(blocks=[30]),
  'negative block': edited(blocks=[-5, 0]),
  'many blocks': edited(blocks=[0, 0] * 5),
  'true': edited(blocks=[True, 0]),
  'metadata': edited(metadata={'a': 1}),
  'unknown key': edited(palette=[]),
  'side files of version 1': edited(files=[0, 0, {'a': 0}]),
  'no ASCII': replaced('"metadata":{}', '"metadata":{"é":""}'),
  'deep lists': lambda text: nested('["list",', ']', 9000),
  'deep dicts': lambda text: nested('{"a":', '}', 9000),
}
"""Edits of the text of the index of `opq_files.small`."""
