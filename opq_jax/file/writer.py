"""Writes `.opq` files: a compressed network in few bytes, exact and checked.

`opq_jax.file.index` describes the format.
"""

import functools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax import tree_util
from jaxtyping import Shaped

from opq_jax.compression import CompressionState, LeafState
from opq_jax.core import files, plain_trees, trees
from opq_jax.core.ties import Candidate, Tie, tied
from opq_jax.core.trees import PyTree
from opq_jax.file import leaf_entries, packing
from opq_jax.file.coded_weights import coded_slices
from opq_jax.file.front import front_bytes
from opq_jax.file.repeated_leaves import RepeatedLeaves
from opq_jax.file.side_files import packed_files
from opq_jax.file.telling import told_of
from opq_jax.file.written_leaves import axes_of, host_array, write_leaf

TIED_VERSION = '2'
"""The least version of a file in which a leaf is an earlier one again."""


def save(
  path: str | os.PathLike[str],
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
  side_files: Mapping[str, bytes] | None = None,
  told: Callable[[int, int], object] | None = None,
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
    side_files: contents of files that belong to the network (config, tokenizer), by relative path;
      `OpqFile(path).read_side_files()` returns them.
    told: called after each leaf with the bytes of all leaves that are done, and of all there are;
      `opq_jax.report.progress` shows them.

  Raises:
    ValueError: `state` was made for another tree; a leaf is no numeric array; a compressed leaf
      holds NaN or an infinity; a key is neither str nor int; or a leaf's dtype is too coarse for
      its codebook, so that compressing the stored values again would change them; or a side file
      has no relative path for a name.  Nothing is written then.

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
  files.write_bytes(
    path,
    serialize(params, state, metadata, contexts=contexts, side_files=side_files, told=told),
  )


def serialize(
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
  side_files: Mapping[str, bytes] | None = None,
  told: Callable[[int, int], object] | None = None,
) -> bytes:
  """Returns the bytes of the file that `save` would write; `load` and `OpqFile` take them as well.

  Args:
    params, state, metadata, contexts, side_files, told: as for `save`.

  Raises:
    ValueError: as `save`.
  """
  metadata = checked_metadata(metadata)
  carried, packed = packed_files(side_files) if side_files else (None, b'')
  leaf_states = trees.records(params, state.tree, LeafState)
  # by name: a namedtuple becomes a dict, whose leaves may come in another order
  records = dict(zip(trees.named_leaves(params), leaf_states, strict=True))
  tree = plain_tree(params)
  plain_trees.check_names(tree)
  specs, grids, raw, versions = [], [], bytearray(), ['1']
  payloads: list[bytes] = []
  arrays = {name: host_array(name, leaf) for name, leaf in trees.named_leaves(tree).items()}
  ties, numbers = tied_leaves(arrays, records), {name: i for i, name in enumerate(arrays)}
  repeated = RepeatedLeaves()
  for name in told_of({name: array.nbytes for name, array in arrays.items()}, told):
    array, record = arrays[name], records[name]
    if name in ties:
      first, is_transposed = ties[name]
      specs.append(leaf_entries.tied_spec(array.dtype, array.shape, numbers[first], is_transposed))
      versions.append(TIED_VERSION)
      continue
    if record is None:
      if (again := repeated.first(numbers[name], array)) is not None:
        specs.append(leaf_entries.tied_spec(array.dtype, array.shape, again, False))
        versions.append(TIED_VERSION)
        continue
      raw += bytes(-len(raw) % array.dtype.itemsize) + array.tobytes()
      specs.append(leaf_entries.spec(array.dtype, array.shape))
      continue
    coded = list(coded_slices(name, array, record))
    written = write_leaf(
      coded, array.shape, record.slices, payloads.append, contexts=contexts, axes=axes_of(coded)
    )
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
    carried,
  )
  return b''.join([front, *payloads, *blocks, packed])


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
    # latent weights may be equal where masks are not, and scales be those of the other axis
    is_same = np.array_equal(first.T if tie.is_transposed else first, own)
    if is_same and _has_scales_of(_record(records, tie.first), _record(records, name), tie):
      ties[name] = tie
  return ties


def _identity(array: Shaped[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
  return array


def _has_scales_of(first: LeafState, own: LeafState, tie: Tie) -> bool:
  """Returns whether a leaf has the output scales of the leaf that it is again."""
  scales = [np.asarray(x) for x in (first.output_scales, own.output_scales) if x is not None]
  if len(scales) != 2:
    return not scales
  return np.array_equal(scales[0].T if tie.is_transposed else scales[0], scales[1])


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


def checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
  """Returns the metadata of a file, none by default.

  Raises:
    ValueError: a key or a value is no string.
  """
  checked = dict(metadata or {})
  if not all(type(text) is str for item in checked.items() for text in item):
    raise ValueError(f'metadata: found {checked}, expected strings only')
  return checked
