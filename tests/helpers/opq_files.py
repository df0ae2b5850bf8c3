"""Small networks with compression states, and the parts of their .opq files."""

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from opq_jax.compression import CompressionState, LeafState, apply_compression, encode
from opq_jax.compression.records import affine_codebook
from opq_jax.core import trees
from opq_jax.file import container, packing
from opq_jax.file import index as file_index


def leaf_state(weights, threshold=0.5, step=0.5, levels=4, offset=0.5):
  """A state as `init_state` makes it; with powers of two every value is exact in any dtype."""
  return LeafState(
    kinds=jnp.asarray((np.abs(np.asarray(weights, np.float32)) > threshold).astype(np.uint8)),
    codebook=affine_codebook(
      jnp.float32(threshold + offset * step), jnp.float32(step), jnp.int32(levels)
    ),
    threshold=jnp.float32(threshold),
    step=jnp.float32(step),
    levels=jnp.int32(levels),
    dtype=weights.dtype,
  )


def state_of(params, compressible=lambda leaf: np.ndim(leaf) >= 2):
  return CompressionState(
    jax.tree.map(lambda leaf: leaf_state(leaf) if compressible(leaf) else None, params)
  )


def laplace(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).laplace(size=shape).astype(dtype)


def network():
  return {
    'params': {
      'conv': {'kernel': laplace(3, 3, 4, 8), 'bias': laplace(8)},
      'dense': {'kernel': laplace(16, 10, seed=1, dtype=ml_dtypes.bfloat16)},
      'half': {'kernel': laplace(6, 5, seed=2, dtype=np.float16)},
    },
    'batch_stats': {'mean': laplace(8, seed=3), 'var': laplace(8, seed=4) ** 2},
    'steps': np.int64(1 << 40),
  }


def small():
  params = {'a': laplace(12, 5), 'b': [laplace(7, seed=1), laplace(4, 4, seed=2)], 'c': np.int8(3)}
  return params, state_of(params)


def same_bits(first, second):
  first, second = np.asarray(first), np.asarray(second)
  return (
    first.dtype == second.dtype
    and first.shape == second.shape
    and first.tobytes() == second.tobytes()
  )


def with_escapes(record, places):
  """The state with these weights stored as they are."""
  kinds = np.array(record.kinds)
  kinds[places] = 2
  return dataclasses.replace(record, kinds=jnp.asarray(kinds))


def escaping(dtype=np.float32, shape=(30, 20), **grid):
  """A leaf with outliers of both signs, which escape with one weight that would be pruned."""
  weights = laplace(*shape)
  weights[0, :3], weights[-1, -1], weights[4, 4] = (40, -50, 30), 60, 0.125
  params = {'bias': laplace(3), 'w': weights.astype(dtype)}
  record = leaf_state(params['w'], **grid)
  places = np.abs(weights) > 20
  places[4, 4] = True
  return params, CompressionState({'bias': None, 'w': with_escapes(record, places)})


def version_of(data):
  return json.loads(parts(data)[0][8:])['__metadata__']['version']


def parts(data):
  """The header of a file, with its length, and where each tensor lies behind it."""
  end = 8 + int.from_bytes(data[:8], 'little')
  tensors = json.loads(data[8:end])
  return data[:end], {k: v['data_offsets'] for k, v in tensors.items() if k != '__metadata__'}


def rebuilt(data, edit):
  """The file with another index, under checksums that are right."""
  header, offsets = parts(data)
  body = data[len(header) :]
  table, codes, blocks = (body[slice(*offsets[k])] for k in ('grids', 'codes', 'uncompressed'))
  side = [body[slice(*offsets['files'])]] if 'files' in offsets else []
  text = edit(packing.unpack(body[slice(*offsets['index'])], 1 << 20).decode()).encode()
  index = packing.pack(text)
  sizes = (len(table) // 12, len(index), len(codes), len(blocks), *map(len, side))
  header = container.header(sizes, zlib.crc32(index, zlib.crc32(table)), version_of(data))
  return b''.join([header, table, index, codes, blocks, *side])


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for name, leaf in trees.named_leaves(first).items():
    assert same_bits(leaf, trees.named_leaves(second)[name]), name


def assert_contract(params, state, loaded, loaded_state):
  """What a file promises, leaf by leaf, so that no jit narrows a leaf of 64 bits."""
  states = trees.records(params, state.tree, LeafState)
  new_leaves = trees.named_leaves(loaded)
  new_states = trees.records(loaded, loaded_state.tree, LeafState)
  assert set(trees.named_leaves(params)) == set(new_leaves)
  new_states = dict(zip(new_leaves, new_states, strict=True))
  for (name, leaf), record in zip(trees.named_leaves(params).items(), states, strict=True):
    new, new_record = new_leaves[name], new_states[name]
    assert type(new) is np.ndarray
    if record is None:
      assert new_record is None and same_bits(leaf, new), name
      continue
    expected, kept = CompressionState(record), CompressionState(new_record)
    assert same_bits(apply_compression(leaf, expected), new), name
    assert same_bits(apply_compression(new, kept), new), name
    assert same_bits(encode(leaf, expected), encode(new, kept)), name
    assert record.dtype == new_record.dtype
    for field in ('codebook', 'threshold', 'step', 'levels', 'kinds'):
      assert same_bits(getattr(record, field), getattr(new_record, field)), (name, field)


def index_text(data):
  header, offsets = parts(data)
  index = data[len(header) :][slice(*offsets['index'])]
  return packing.unpack(index, file_index.MAX_INDEX).decode()


def index_size(data):
  """Bytes of the index once it is unpacked."""
  return len(index_text(data))


def edited(**changes):
  return lambda text: json.dumps({**json.loads(text), **changes})


def replaced(old, new):
  def edit(text):
    assert old in text
    return text.replace(old, new, 1)

  return edit
