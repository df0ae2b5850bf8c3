"""Writes `.opq` files: a compressed network in few bytes, exact and checked.

`opq_jax.file.index` describes the format.
"""

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import tree_util
from jaxtyping import Int8, Shaped

from opq_jax.coding import encode_codes, escapes
from opq_jax.compression import CompressionState, LeafState, slice_of
from opq_jax.compression import encode as encode_weights
from opq_jax.core import files, trees
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.core.ties import Candidate, Tie, tied
from opq_jax.core.trees import PyTree, slice_name
from opq_jax.file import checks, leaf_entries, packing, plain_trees
from opq_jax.file.front import VERSIONS, front_bytes
from opq_jax.file.grids import Grid

TIED_VERSION = '2'
"""The least version of a file in which a leaf is an earlier one again."""


def save(
  path: str | os.PathLike[str],
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
) -> None:
  """Writes a compressed network to an `.opq` file.

  The file appears whole or not at all: it is written beside its place and moved there, and a file
  of that name stays until then.  The same input makes the same bytes.

  Args:
    path: of the file; `.opq` is the customary suffix.
    params: the tree, with latent weights or compressed ones: the file holds
      `apply_compression(params, state)`.
    state: its kinds and codebooks.
    metadata: a few strings, which `OpqFile(path).metadata` returns.
    contexts: whether codes are coded with contexts (`opq_jax.coding.encode_codes`); False encodes
      6 to 60 times faster into a larger file.

  Raises:
    ValueError: `state` was made for another tree; a leaf is no numeric array; a compressed leaf
      holds NaN or an infinity; a key is neither str nor int; or a leaf's dtype is too coarse for
      its codebook, so that compressing the stored values again would change them.  Nothing is
      written then.

  >>> import tempfile, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> params = {'kernel': kernel, 'bias': np.zeros(32, np.float32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save(f'{folder}/small.opq', params, state)
  ...   loaded, _ = opq_jax.load(f'{folder}/small.opq')
  >>> compressed = opq_jax.apply_compression(params, state)
  >>> bool((loaded['kernel'] == compressed['kernel']).all())
  True
  """
  files.write_bytes(path, serialize(params, state, metadata, contexts=contexts))


def serialize(
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
) -> bytes:
  """Returns the bytes of the file that `save` would write; `load` and `OpqFile` take them as well.

  Args:
    params, state, metadata, contexts: as for `save`.

  Raises:
    ValueError: as `save`.
  """
  metadata = checked_metadata(metadata)
  leaf_states = trees.records(params, state.tree, LeafState)
  # by name: a namedtuple becomes a dict, whose leaves may come in another order
  records = dict(zip(trees.named_leaves(params), leaf_states, strict=True))
  tree = plain_tree(params)
  plain_trees.check_names(tree)
  specs, grids, raw, versions = [], [], bytearray(), ['1']
  payloads: list[bytes] = []
  arrays = {name: host_array(name, leaf) for name, leaf in trees.named_leaves(tree).items()}
  ties, numbers = tied_leaves(arrays, records), {name: i for i, name in enumerate(arrays)}
  for name, array in arrays.items():
    record = records[name]
    if name in ties:
      first, is_transposed = ties[name]
      specs.append(leaf_entries.tied_spec(array.dtype, array.shape, numbers[first], is_transposed))
      versions.append(TIED_VERSION)
      continue
    if record is None:
      raw += bytes(-len(raw) % array.dtype.itemsize) + array.tobytes()
      specs.append(leaf_entries.spec(array.dtype, array.shape))
      continue
    coded = coded_slices(name, array, record)
    written = write_leaf(coded, array.shape, record.slices, payloads.append, contexts=contexts)
    grids += written.grids
    specs.append(written.spec)
    versions.append(written.version)

  # in blocks, so that a reader of one leaf unpacks no more than the blocks it lies in; `lzma` works
  # without the interpreter's lock
  pieces = [raw[start : start + packing.BLOCK] for start in range(0, len(raw), packing.BLOCK)]
  with ThreadPoolExecutor() as pool:
    blocks = list(pool.map(lambda piece: packing.pack(piece, packing.FLOAT_PERIOD), pieces))
  front = front_bytes(
    jax.tree.unflatten(jax.tree.structure(tree), specs),
    grids,
    sum(map(len, payloads)),
    [(len(block), zlib.crc32(block)) for block in blocks],
    metadata,
    max(versions),
  )
  return b''.join([front, *payloads, *blocks])


def tied_leaves(
  arrays: Mapping[str, Shaped[np.ndarray, '...']], records: Mapping[str, LeafState | None]
) -> dict[str, Tie]:
  """Returns the compressed leaves that are an earlier one again, in values, grid and kinds.

  Args:
    arrays: the leaves by name, on the host.
    records: their states.
  """

  def candidates() -> Iterator[Candidate]:
    for name, array in arrays.items():
      if (record := records[name]) is not None:
        grid = [record.threshold, record.step, record.levels, record.codebook]
        bits = b''.join(np.asarray(number).tobytes() for number in grid)
        # a leaf with slices is no transpose
        shape = array.shape if record.slices else sorted(array.shape)
        facts = array.dtype, *shape, record.slices, bits
        yield Candidate(name, facts, None, functools.partial(_identity, array))

  ties = {}
  for name, tie in tied(candidates()).items():
    first, own = (np.asarray(_record(records, leaf).kinds) for leaf in (tie.first, name))
    if tie.is_transposed and _record(records, name).slices:
      continue
    # latent weights may be equal where masks are not
    if np.array_equal(first.T if tie.is_transposed else first, own):
      ties[name] = tie
  return ties


def _identity(array: Shaped[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
  return array


def _record(records: Mapping[str, LeafState | None], name: str) -> LeafState:
  record = records[name]
  assert record is not None
  return record


def plain_tree(node: PyTree, path: tree_util.KeyPath = ()) -> PyTree:
  """Returns a tree with dicts in place of all containers but lists, tuples and None.

  Args:
    node: any pytree.
    path: of the node in the whole tree, for messages.

  Raises:
    ValueError: a key is neither str nor int.

  >>> import collections
  >>> plain_tree([collections.namedtuple('Layer', 'kernel bias')(1, None), (2,)])
  [{'kernel': 1, 'bias': None}, (2,)]
  """
  if node is None:
    return None
  # any node but the first counts as a leaf: the children alone, with one key each
  children = tree_util.tree_leaves_with_path(node, is_leaf=lambda inner: inner is not node)
  if len(children) == 1 and children[0][0] == ():
    return node
  plain = {}
  for (key,), child in children:
    plain_key = key.key if isinstance(key, tree_util.DictKey) else trees.path_name((key,))
    if type(plain_key) not in (str, int):
      name, kind = trees.path_name((*path, key)), type(plain_key).__name__
      raise ValueError(f'{name}: found a key of type {kind}, expected str or int')
    plain[plain_key] = plain_tree(child, (*path, key))
  return type(node)(plain.values()) if type(node) in (list, tuple) else plain


class CodedSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, before its codes are written.

  Attributes:
    codes: of all weights, -128 where one is escaped.
    escaped: the escaped weights, in C order.
    record: its state, of which the kinds are not read.
    grid: its row of `grids`.
  """

  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  record: LeafState
  grid: list[np.float32]


class WrittenSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, as a file holds it.

  Attributes:
    payload: its bytes in `codes`.
    entry: its numbers in the index.
    version: the least version of the format that holds it.
  """

  payload: bytes
  entry: leaf_entries.SliceEntry
  version: str


class WrittenLeaf(NamedTuple):
  """A compressed leaf as a file holds it, without its payloads.

  Attributes:
    spec: its notation in the index.
    grids: the rows of its slices.
    version: the least version of the format that holds it.
  """

  spec: str
  grids: list[list[np.float32]]
  version: str


def coded_slices(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Iterator[CodedSlice]:
  """Returns the slices of a compressed leaf in C order, or the leaf, coded and checked.

  Raises:
    ValueError: as `checked_grid` and `checked_codes`.
  """
  if record.slices:
    # on the host, where slices are views
    record = jax.device_get(record)
  for index in np.ndindex(record.slice_shape):
    own_name, own, weights = slice_name(name, index), slice_of(record, index), array[index]
    grid = checked_grid(own_name, own)
    codes = checked_codes(own_name, weights, own)
    yield CodedSlice(codes, escaped_values(codes, weights), own, grid)


def write_leaf(
  coded: Iterable[CodedSlice],
  shape: tuple[int, ...],
  slices: int,
  write: Callable[[bytes], Any],
  *,
  contexts: bool,
) -> WrittenLeaf:
  """Writes the payloads of a compressed leaf, one after the other.

  Args:
    coded: its slices in C order, or itself.
    shape: of the whole leaf.
    slices: leading axes that count slices.
    write: takes each payload.
    contexts: as for `opq_jax.coding.encode_codes`.
  """
  entries, grids, version = [], [], '2' if slices else '1'
  for codes, escaped, record, grid in coded:
    written = written_slice(codes, escaped, record, contexts=contexts)
    write(written.payload)
    entries.append(written.entry)
    grids.append(grid)
    version = max(version, written.version)
    dtype = np.dtype(record.dtype)
  return WrittenLeaf(leaf_entries.compressed_spec(dtype, shape, entries, slices), grids, version)


def escaped_values(
  codes: Int8[np.ndarray, '...'], array: Shaped[np.ndarray, '...']
) -> Shaped[np.ndarray, ' m']:
  """Returns the escaped weights of an array, in C order."""
  return array[codes == ESCAPE]


def written_slice(
  codes: Int8[np.ndarray, '...'],
  values: Shaped[np.ndarray, ' m'],
  record: LeafState,
  *,
  contexts: bool,
) -> WrittenSlice:
  """Returns a slice of a compressed leaf, or the leaf, as a file holds it.

  Args:
    codes: of all weights, -128 where one is escaped.
    values: the escaped weights, in C order.
    record: its state, of which the kinds are not read.
    contexts: as for `opq_jax.coding.encode_codes`.
  """
  section = b''
  if values.size:
    positions = np.flatnonzero(codes == ESCAPE)
    section = escapes.encode(positions, values)
    codes = codes.copy()
    codes.reshape(-1)[positions] = 0
  payload = encode_codes(codes, contexts=contexts) + section
  entry = leaf_entries.SliceEntry(int(record.levels), len(payload), values.size, len(section))
  rounds = grid_of(record).level_values().rounds
  return WrittenSlice(payload, entry, '2' if section or rounds else '1')


def checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
  """Returns the metadata of a file, none by default.

  Raises:
    ValueError: a key or a value is no string.
  """
  checked = dict(metadata or {})
  if not all(type(text) is str for item in checked.items() for text in item):
    raise ValueError(f'metadata: found {checked}, expected strings only')
  return checked


def host_array(name: str, leaf: Any) -> Shaped[np.ndarray, '...']:
  """Returns a leaf on the host, in the byte order of this machine.

  Raises:
    ValueError: it is no array of numbers.
  """
  try:
    array = np.asarray(leaf)
  except TypeError as error:  # keys of random numbers, tracers
    raise ValueError(f'{name}: found {type(leaf).__name__}, expected an array: {error}') from error
  # a name says nothing of the byte order, and the dtype of the table is native
  dtype = leaf_entries.DTYPES.get(array.dtype.name)
  if dtype is None:
    raise ValueError(
      f'{name}: found {type(leaf).__name__} of dtype {array.dtype}, expected an array of numbers'
    )
  return array.astype(dtype, copy=False)


def checked_grid(name: str, record: LeafState) -> list[np.float32]:
  """Returns the row of `grids` of a compressed leaf: threshold, first value and step.

  Raises:
    ValueError: a file cannot hold the levels, the grid or the codebook of the state.
  """
  levels, codebook = int(record.levels), np.asarray(record.codebook)
  if not 0 <= levels <= MAX_LEVELS:
    raise ValueError(f'{name}: found {levels} levels, expected 0 to {MAX_LEVELS}')
  grid = grid_of(record)
  checks.check_grid(name, grid, VERSIONS[-1])
  # the file has no codebook, only its grid: a reader must get the same bits, -0 told from 0
  if codebook.tobytes() != grid.codebook().tobytes():
    raise ValueError(
      f'{name}: found another codebook than the affine one of first value {grid.first}, step '
      f'{grid.step} and {levels} levels, expected that one'
    )
  return [grid.threshold, grid.first, grid.step]


def grid_of(record: LeafState) -> Grid:
  """Returns the grid of a leaf's state."""
  return Grid(
    threshold=np.float32(record.threshold),
    first=np.asarray(record.codebook)[1],
    step=np.float32(record.step),
    levels=int(record.levels),
    dtype=np.dtype(record.dtype),
  )


def checked_codes(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Int8[np.ndarray, '...']:
  """Returns the codes of a leaf, whose values have these codes again.

  Raises:
    ValueError: the dtype cannot be compressed, a weight is not finite, or the value of a code lies
      in another cell.
  """
  if not leaf_entries.can_be_compressed(array.dtype):
    raise ValueError(f'{name}: found dtype {array.dtype}, expected floats of whole bytes')
  if bad := array.size - int(np.count_nonzero(np.isfinite(array))):
    raise ValueError(f'{name}: found {bad} weights that are NaN or infinite, expected none')
  try:
    codes = np.asarray(encode_weights(array, CompressionState(record)))
    checks.check_levels(np.where(codes == ESCAPE, np.int8(0), codes), int(record.levels))
  except ValueError as error:
    # `encode` was given a tree that is one leaf, whose path name is empty
    raise ValueError(f'{name}: {str(error).removeprefix(": ")}') from error
  checks.check_cells(name, codes, grid_of(record))
  return codes
