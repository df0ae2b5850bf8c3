"""The `.opq` file: a compressed network in few bytes, exact and checked.

The file is a valid safetensors file of four tensors, few because each costs 70 bytes of header:

    grids         F32 [compressed leaves, 3]: threshold, first value and step of each
    index         U8, LZMA of JSON: the tree, below
    codes         U8: a payload of `opq_jax.coding.payload` for every compressed leaf, of two kinds
    uncompressed  U8: the bytes of the other leaves, end to end, each at a multiple of its item
                  size; cut into blocks of 1 MiB, each block LZMA

    {"tree": {"params": {"conv": {"bias": "float32[16]", "kernel": "float32[3,3,3,16] 9 141"}}},
     "blocks": [bytes, CRC-32, ...], "metadata": {"the user's": "own"}}

A leaf is one string: dtype, shape, and where it is compressed its levels and the bytes of its
payload.  Named fields may follow, sorted by name, each a space and `name=value` without spaces:

    escapes=COUNT,BYTES   so many weights are stored as they are, in the last BYTES of the payload,
                          a section of `opq_jax.coding.escapes`; the bytes before it code the array
                          with 0 in their places

A reader refuses every other name: slices of a leaf, a leaf that equals another one, a palette, a
scale an output channel and a rotation will be fields too, once they are defined.  A compressed leaf
is of floats of whole bytes that know 0.

An object is a dict (":3" is the key 3, "::a" the key ":a"), null is None, and a list that begins
with "list" or "tuple" is that.  Leaves follow each other in the order of JAX.

Every byte is under a checksum: the header must be the one that its own sizes imply and holds the
CRC-32 of grids and index, the index holds those of the blocks, every payload ends in one of its
codes, and a section of escaped weights in its own.  LZMA takes 14 to 19 % off float32 biases and
BatchNorm statistics, whose exponents repeat; at 2 bits per weight they are a fifth of the file of a
MobileNet-V2.

The value of cell k is first + k step in float32, where k step never rounds, and the values of all
levels rise.  In the leaf's dtype it is the nearest number in its own cell
(`opq_jax.compression.codes`).

The header says version 2 where a leaf has a field, or first + k step rounds for a k below its
levels.  All other files are of version 1, in which neither may be.
"""

import dataclasses
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Shaped, UInt8

from opq_jax.coding import escapes
from opq_jax.coding.ans import histogram
from opq_jax.coding.payload import decode_codes, encode_codes
from opq_jax.compression import codes as compression
from opq_jax.compression.codes import ESCAPE, CompressionState, LeafState
from opq_jax.core import files, trees
from opq_jax.core.limits import MAX_LEVELS
from opq_jax.core.trees import PyTree
from opq_jax.file import index as artifact_index
from opq_jax.file.index import LeafEntry

_CHUNK = 1 << 16  # weights at a time: NumPy widens the indices of a look-up to 8 bytes each
_MOST_BYTES, _MOST_TIMES = 1 << 30, 1000  # that are decoded unless more is asked for; see OpqFile

_affine_codebook = jax.jit(compression.affine_codebook)


def save(
  path: str | os.PathLike[str],
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
) -> None:
  """Writes the compressed network that `params` and `state` are.

  The file appears whole or not at all: it is written beside its place and moved there, and a file
  that was there before stays until then.  The same input makes the same bytes.

  Args:
    path: where to; `.opq` is the customary suffix.
    params: the tree, latent weights included; what is stored is `apply_compression(params, state)`.
    state: its masks and codebooks.
    metadata: a few strings to find again as `OpqFile(path).metadata`.
    contexts: as for `opq_jax.coding.payload.encode_codes`: False writes sooner and takes more.

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
  ...   loaded, _ = load(f'{folder}/small.opq')
  >>> compressed = opq_jax.apply_compression(params, state)
  >>> bool((loaded['kernel'] == compressed['kernel']).all())
  True
  """
  files.write_bytes(path, serialize(params, state, metadata, contexts=contexts))


def load(
  path: str | os.PathLike[str] | bytes,
  like: PyTree | None = None,
  *,
  most_bytes: int | None = None,
) -> tuple[PyTree, CompressionState]:
  """The compressed network of a file, on the host: `OpqFile(path, most_bytes).load(like)`."""
  with OpqFile(path, most_bytes) as file:
    return file.load(like)


def serialize(
  params: PyTree,
  state: CompressionState,
  metadata: Mapping[str, str] | None = None,
  *,
  contexts: bool = True,
) -> bytes:
  """The bytes of the file that `save` would write; `load` and `OpqFile` take them as well.

  Raises:
    ValueError: as `save`.
  """
  metadata = checked_metadata(metadata)
  found = trees.records(params, state.tree, LeafState)
  records = dict(zip(trees.named_leaves(params), found, strict=True))
  tree = artifact_index.plain_tree(params)
  artifact_index.check_names(tree)
  specs, grids, payloads, raw, versions = [], [], [], bytearray(), ['1']
  for name, leaf in trees.named_leaves(tree).items():
    array, record = host_array(name, leaf), records[name]
    if record is None:
      raw += bytes(-len(raw) % array.dtype.itemsize) + array.tobytes()
      specs.append(artifact_index.spec(array.dtype, array.shape))
      continue
    grids.append(grid(name, record))
    codes = checked_codes(name, array, record)
    written = written_leaf(codes, escaped_values(codes, array), record, contexts=contexts)
    payloads.append(written.payload)
    specs.append(written.spec)
    versions.append(written.version)

  pieces = [
    raw[start : start + artifact_index.BLOCK] for start in range(0, len(raw), artifact_index.BLOCK)
  ]
  with ThreadPoolExecutor() as pool:
    blocks = list(pool.map(lambda piece: artifact_index.pack(piece, period=4), pieces))
  noted = jax.tree.unflatten(jax.tree.structure(tree), specs)
  checked = [(len(block), zlib.crc32(block)) for block in blocks]
  return b''.join(
    [
      front(noted, grids, sum(map(len, payloads)), checked, metadata, max(versions)),
      *payloads,
      *blocks,
    ]
  )


class WrittenLeaf(NamedTuple):
  """A compressed leaf as a file holds it.

  Attributes:
    payload: its bytes in `codes`.
    spec: its notation in the index.
    version: of the format that it needs.
  """

  payload: bytes
  spec: str
  version: str


def escaped_values(
  codes: Int8[np.ndarray, '...'], array: Shaped[np.ndarray, '...']
) -> Shaped[np.ndarray, ' m']:
  """The escaped weights of an array, in C order."""
  return array[codes == ESCAPE]


def written_leaf(
  codes: Int8[np.ndarray, '...'],
  values: Shaped[np.ndarray, ' m'],
  record: LeafState,
  *,
  contexts: bool,
) -> WrittenLeaf:
  """The bytes of a leaf.

  Args:
    codes: of all of its weights.
    values: of those that are escaped, in C order.
    record: its grid; the kinds of its weights are not read.
    contexts: as for `opq_jax.coding.payload.encode_codes`.
  """
  section = b''
  if values.size:
    positions = np.flatnonzero(codes == ESCAPE)
    section = escapes.encode(positions, values)
    codes = codes.copy()
    codes.reshape(-1)[positions] = 0
  payload = encode_codes(codes, contexts=contexts) + section
  levels = int(record.levels)
  spec = artifact_index.compressed_spec(
    record.dtype, codes.shape, levels, len(payload), values.size, len(section)
  )
  rounds = _sums(np.asarray(record.codebook)[1], np.float32(record.step), levels)[1]
  return WrittenLeaf(payload, spec, '2' if section or rounds else '1')


def checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
  """The metadata of a file, none by default.

  Raises:
    ValueError: not all of them are strings.
  """
  checked = dict(metadata or {})
  if not all(type(text) is str for item in checked.items() for text in item):
    raise ValueError(f'metadata: found {checked}, expected strings only')
  return checked


def front(
  tree: PyTree,
  grids: list[list[np.float32]],
  codes_size: int,
  blocks: list[tuple[int, int]],
  metadata: dict[str, str],
  version: str,
) -> bytes:
  """All that comes before the payloads: header, grids and index.

  Args:
    tree: what the index notes of every leaf.
    grids: of the compressed leaves.
    codes_size: bytes of all payloads.
    blocks: bytes and checksum of every block.
    metadata: of the user.
    version: of the format; the largest that a leaf needs.

  Raises:
    ValueError: the index is larger than a reader would take.
  """
  content = {
    'blocks': [n for block in blocks for n in block],
    'metadata': metadata,
    'tree': artifact_index.to_json(tree),
  }
  text = json.dumps(content, separators=(',', ':')).encode('ascii')
  if len(text) > artifact_index.MAX_INDEX:
    raise ValueError(
      f'found an index of {len(text)} bytes, expected at most {artifact_index.MAX_INDEX}'
    )
  index = artifact_index.pack(text)
  table = np.array(grids, '<f4').tobytes()
  sizes = (len(grids), len(index), codes_size, sum(size for size, _ in blocks))
  return artifact_index.header(sizes, zlib.crc32(index, zlib.crc32(table)), version) + table + index


class OpqFile(Mapping[str, Shaped[np.ndarray, '...']]):
  """A file whose leaves are decoded one at a time, when they are asked for.

  A mapping from path names, in the order of JAX, to host arrays: the values of compressed leaves,
  the others bit for bit.  Opening reads and checks the header, the grids and the index; a leaf is
  read and checked when it is asked for.  A context manager.

  Args:
    path: of the file; or its bytes.
    most_bytes: that its leaves may have, decoded.  A run of zeros takes next to nothing, so 3 MB
      may well hold 2**40 of them; by default a file is refused that claims more than 1 GiB and
      more than 1000 times its own size.

  Raises:
    ValueError: this is no whole and undamaged `.opq` file of a version up to 2.  The time and the
      memory that it takes to find out are bounded, whatever is in the file; nothing is executed.

  >>> import opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> params = {'kernel': kernel, 'bias': np.zeros(32, np.float32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> with OpqFile(serialize(params, state, {'source': 'an example'})) as file:
  ...   print(list(file), file['bias'].shape, file.codes('kernel').dtype, file.metadata)
  ['bias', 'kernel'] (32,) int8 {'source': 'an example'}
  """

  metadata: dict[str, str]

  def __init__(self, path: str | os.PathLike[str] | bytes, most_bytes: int | None = None):
    self._label = 'the file' if isinstance(path, bytes) else os.fspath(path)
    self._file = io.BytesIO(path) if isinstance(path, bytes) else open(path, 'rb')  # noqa: SIM115
    self._unpacked = -1, b''  # number and bytes of the block that was read last
    try:
      self._read_front(most_bytes)
    except BaseException:
      self._file.close()
      raise

  def __getitem__(self, name: str) -> Shaped[np.ndarray, '...']:
    return self._decoded(name)[0]

  def __iter__(self) -> Iterator[str]:
    return iter(self._leaves)

  def __len__(self) -> int:
    return len(self._leaves)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file; nothing can be read from it afterwards."""
    self._file.close()

  def codes(self, name: str) -> Int8[np.ndarray, '...']:
    """The codes of a compressed leaf, -128 where a weight is escaped.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged, or not compressed.
    """
    leaf = self._leaf(name)
    if leaf.levels is None:
      raise ValueError(f'{name}: found a leaf that is not compressed, expected one that has codes')
    return self._codes_and_escapes(name, leaf)[0]

  def leaf_state(self, name: str) -> LeafState | None:
    """Kinds and codebook of a leaf, None where it is not compressed.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged.
    """
    return self._decoded(name)[1]

  def sizes(self) -> dict[str, int]:
    """The bytes of the file that each leaf takes; the sum leaves over those of header and index.

    A compressed leaf takes its payload and 12 bytes of `grids`.  The packed bytes of all
    uncompressed leaves are shared out in proportion to their own.
    """
    packed, begin, sizes = self._block_begins[-1], 0, {}
    for name, leaf in self._leaves.items():
      if leaf.levels is None:
        end = packed * (leaf.begin + leaf.stored) // max(self._raw_size, 1)
        begin, sizes[name] = end, end - begin
      else:
        sizes[name] = leaf.stored + 12
    return sizes

  def load(self, like: PyTree | None = None) -> tuple[PyTree, CompressionState]:
    """The whole network: decoded parameters, and the state that compresses them.

    Args:
      like: a tree of the same paths and shapes (arrays, or what `jax.eval_shape` returns) whose
        containers the result takes over; leaves keep the dtypes of the file.  Without it dicts,
        lists, tuples and None come back as themselves, and every other container as a dict.

    Returns:
      `(params, state)` of host arrays, exact whatever `jax_enable_x64` says: these `params`, their
      `apply_compression(params, state)` and that of what was saved are bit-identical, and
      `encode(params, state)` are the codes that were saved.

    Raises:
      ValueError: a leaf is damaged; or `like` has other paths or shapes, all of which are listed.
    """
    structure, order = self._structure, list(self._leaves)
    if like is not None:
      found = {name: np.shape(leaf) for name, leaf in trees.named_leaves(like).items()}
      self._check_like(found)
      structure, order = jax.tree.structure(like), list(found)
    decoded = [self._decoded(name) for name in order]
    params = jax.tree.unflatten(structure, [value for value, _ in decoded])
    return params, CompressionState(
      jax.tree.unflatten(structure, [record for _, record in decoded])
    )

  def _check_like(self, found: dict[str, tuple[int, ...]]) -> None:
    expected = {name: leaf.shape for name, leaf in self._leaves.items()}
    lines = [
      f'  {name}: found {found.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
      for name in dict.fromkeys([*expected, *found])
      if found.get(name) != expected.get(name)
    ]
    if lines:
      raise ValueError('\n'.join([f'`like` is another tree than {self._label} holds:', *lines]))

  def _leaf(self, name: str) -> LeafEntry:
    if name not in self._leaves:
      raise KeyError(f'{name}: not found in {self._label}')
    return self._leaves[name]

  def _decoded(self, name: str) -> tuple[Shaped[np.ndarray, '...'], LeafState | None]:
    leaf = self._leaf(name)
    if leaf.levels is None:
      try:
        data = self._uncompressed(leaf)
      except ValueError as error:
        raise ValueError(f'{name}: {error}') from error
      return np.frombuffer(data, leaf.dtype).reshape(leaf.shape), None
    codes, escaped = self._codes_and_escapes(name, leaf)
    threshold, first, step = self._grids[leaf.row]
    levels = np.array(leaf.levels, np.int32)
    arrays: dict[str, Any] = {
      'kinds': _kinds(codes),
      'codebook': np.array(_affine_codebook(first, step, levels)),
      'threshold': np.array(threshold),
      'step': np.array(step),
      'levels': levels,
    }
    record = LeafState(**arrays, dtype=leaf.dtype)
    _check_cells(name, codes, record)
    values = _values(codes, record)
    values[codes == ESCAPE] = escaped
    return values, record

  def _codes_and_escapes(
    self, name: str, leaf: LeafEntry
  ) -> tuple[Int8[np.ndarray, '...'], Shaped[np.ndarray, ' m']]:
    """The codes of a compressed leaf, and its escaped weights in C order."""
    try:
      data = self._read(self._codes_at + leaf.begin, leaf.stored)
      end = leaf.stored - leaf.escape_bytes
      codes = decode_codes(data[:end], leaf.shape)
      _check_levels(codes, leaf.levels or 0)
      positions, values = escapes.decode(data[end:], codes.size, leaf.escapes, leaf.dtype)
      flat = codes.reshape(-1)
      if bad := int(np.count_nonzero(flat[positions])):
        raise ValueError(f'found {bad} escaped weights that have codes as well, expected none')
      if bad := values.size - int(np.count_nonzero(np.isfinite(values))):
        raise ValueError(f'found {bad} escaped weights that are NaN or infinite, expected none')
      flat[positions] = ESCAPE
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    return codes, values

  def _uncompressed(self, leaf: LeafEntry) -> bytearray:
    data = bytearray()
    while len(data) < leaf.stored:
      number, start = divmod(leaf.begin + len(data), artifact_index.BLOCK)
      data += self._block(number)[start : start + leaf.stored - len(data)]
    return data

  def _block(self, number: int) -> bytes:
    """One block of uncompressed leaves; kept, because the next leaf is likely to lie in it."""
    if self._unpacked[0] != number:
      stored, checksum = self._blocks[number]
      data = self._read(self._blocks_at + self._block_begins[number], stored)
      if (found := zlib.crc32(data)) != checksum:
        raise ValueError(f'found CRC-32 {found:08x}, expected {checksum:08x}')
      size = min(artifact_index.BLOCK, self._raw_size - number * artifact_index.BLOCK)
      if len(block := artifact_index.unpack(data, size, period=4)) != size:
        raise ValueError(f'found a block of {len(block)} bytes, expected {size}')
      self._unpacked = number, block
    return self._unpacked[1]

  def _read(self, begin: int, size: int) -> bytes:
    self._file.seek(begin)
    data = self._file.read(size)
    if len(data) != size:
      raise ValueError(f'{self._label}: found {len(data)} bytes at {begin}, expected {size}')
    return data

  def _read_front(self, most_bytes: int | None) -> None:
    """Reads and checks all that comes before the codes."""
    version, (rows, *sizes), checksum, begin = self._read_header()
    table, index = self._read(begin, 12 * rows), self._read(begin + 12 * rows, sizes[0])
    self._codes_at = begin + 12 * rows + sizes[0]
    self._blocks_at = self._codes_at + sizes[1]
    self._grids = np.frombuffer(table, '<f4').astype(np.float32).reshape(rows, 3)
    if (found := zlib.crc32(index, zlib.crc32(table))) != checksum:
      raise ValueError(f'{self._label}: found CRC-32 {found:08x} of the index, not {checksum:08x}')
    try:
      tree, self._blocks, self.metadata = artifact_index.parsed_index(
        artifact_index.unpack(index, artifact_index.MAX_INDEX)
      )
      leaves = trees.named_leaves(tree)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{self._label}: found an index that cannot be: {error}') from error
    self._structure = jax.tree.structure(tree)
    self._block_begins = [0, *itertools.accumulate(size for size, _ in self._blocks)]
    self._leaves, found_rows, codes_size, self._raw_size = artifact_index.placed(leaves)
    for what, found, expected in (
      ('compressed leaves', found_rows, rows),
      ('bytes of codes', codes_size, sizes[1]),
      ('blocks', len(self._blocks), -(-self._raw_size // artifact_index.BLOCK)),
      ('bytes of blocks', self._block_begins[-1], sizes[2]),
    ):
      if found != expected:
        raise ValueError(f'{self._label}: found an index of {found} {what}, expected {expected}')
    if most_bytes is None:
      most_bytes = max(_MOST_BYTES, _MOST_TIMES * (self._blocks_at + sizes[2]))
    claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._leaves.values())
    if claimed > most_bytes:
      raise ValueError(
        f'{self._label}: found leaves of {claimed} bytes in {self._blocks_at + sizes[2]}, expected '
        f'at most {most_bytes}; a greater most_bytes admits them'
      )
    for name, leaf in self._leaves.items():
      if leaf.levels is not None:
        threshold, first, step = self._grids[leaf.row]
        _check_grid(f'{self._label}: {name}', threshold, first, step, leaf.levels, version)
        if leaf.escapes and version == '1':
          raise ValueError(f'{self._label}: {name}: found escapes, expected none in version 1')

  def _read_header(self) -> tuple[str, tuple[int, ...], int, int]:
    """Version, sizes of the tensors (for `grids`, rows), checksum, and where the data begin."""
    size = self._file.seek(0, os.SEEK_END)
    self._file.seek(0)
    length = int.from_bytes(self._file.read(8), 'little')
    text = self._file.read(min(length, artifact_index.MAX_HEADER))
    try:
      header = json.loads(text)
      about = header['__metadata__']
      if about['format'] != 'opq':
        raise ValueError(f'found format {about["format"]!r}, expected opq')
      version = about['version']
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(f'{self._label}: found no .opq file: {error!r}') from error
    if version not in artifact_index.VERSIONS:
      raise ValueError(f"{self._label}: found version {version!r}, expected '1' or '2'")
    try:
      sizes = tuple(header[name]['shape'][0] for name in artifact_index.TENSORS)
      if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f'found sizes {sizes}')
      checksum = int(about['crc32'], 16)
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise ValueError(f'{self._label}: found a damaged header: {error!r}') from error
    expected = artifact_index.header(sizes, checksum, version)
    if length.to_bytes(8, 'little') + text != expected:
      raise ValueError(f'{self._label}: found header {text!r}, expected {expected[8:]!r}')
    if size != (expected_size := len(expected) + 12 * sizes[0] + sum(sizes[1:])):
      raise ValueError(f'{self._label}: found {size} bytes, expected {expected_size}')
    return version, sizes, checksum, len(expected)


def host_array(name: str, leaf: Any) -> Shaped[np.ndarray, '...']:
  """A leaf on the host, in the byte order of this machine."""
  try:
    array = np.asarray(leaf)
  except TypeError as error:  # keys of random numbers, tracers
    raise ValueError(f'{name}: found {type(leaf).__name__}, expected an array: {error}') from error
  dtype = artifact_index.DTYPES.get(array.dtype.name)
  if dtype is None:
    raise ValueError(
      f'{name}: found {type(leaf).__name__} of dtype {array.dtype}, expected an array of numbers'
    )
  return array.astype(dtype, copy=False)


def grid(name: str, record: LeafState) -> list[np.float32]:
  """What says, with the levels, all of a state but its kinds."""
  codebook, levels = np.asarray(record.codebook), int(record.levels)
  threshold, first, step = np.float32(record.threshold), codebook[1], np.float32(record.step)
  if not 0 <= levels <= MAX_LEVELS:
    raise ValueError(f'{name}: found {levels} levels, expected 0 to {MAX_LEVELS}')
  _check_grid(name, threshold, first, step, levels, artifact_index.VERSIONS[-1])
  implied = np.asarray(_affine_codebook(first, step, np.int32(levels)))
  if codebook.tobytes() != implied.tobytes():
    raise ValueError(
      f'{name}: found another codebook than the affine one of first value {first}, step {step} and '
      f'{levels} levels, expected that one'
    )
  return [threshold, first, step]


def checked_codes(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Int8[np.ndarray, '...']:
  """The codes of a leaf, made sure to be those of their own values as well."""
  if not artifact_index.can_be_compressed(array.dtype):
    raise ValueError(f'{name}: found dtype {array.dtype}, expected floats of whole bytes')
  if bad := array.size - int(np.count_nonzero(np.isfinite(array))):
    raise ValueError(f'{name}: found {bad} weights that are NaN or infinite, expected none')
  try:
    codes = np.asarray(compression.encode(array, CompressionState(record)))
    _check_levels(np.where(codes == ESCAPE, np.int8(0), codes), int(record.levels))
  except ValueError as error:
    # `encode` was given a tree that is one leaf, whose path name is empty
    raise ValueError(f'{name}: {str(error).removeprefix(": ")}') from error
  _check_cells(name, codes, record)
  return codes


def _check_grid(
  name: str,
  threshold: np.float32,
  first: np.float32,
  step: np.float32,
  levels: int,
  version: str,
) -> None:
  """A grid that cells and values can have; files of any origin are held to it."""
  with np.errstate(over='ignore', invalid='ignore'):
    values, rounds, is_exact = _sums(first, step, levels)
  is_finite = bool(np.isfinite([threshold, step, values[-1]]).all())
  is_rising = bool((values[1:] > values[:-1]).all())
  if not (is_finite and is_exact and is_rising and threshold >= 0 and step > 0):
    raise ValueError(
      f'{name}: found a grid of threshold {threshold}, first value {first}, step {step} and '
      f'{levels} levels, expected finite numbers, threshold >= 0, step > 0, multiples of step that '
      'float32 holds exactly, and values that rise'
    )
  if rounds and version == '1':
    raise ValueError(
      f'{name}: found a grid of threshold {threshold}, first value {first}, step {step} and '
      f'{levels} levels, expected values that float32 holds exactly in version 1'
    )


def _sums(
  first: np.float32, step: np.float32, levels: int
) -> tuple[Float32[np.ndarray, ' levels'], bool, bool]:
  """The values first + k step of all levels; whether a sum rounds; and whether no product does."""
  exact = np.float64(step) * np.arange(max(levels, 1))
  products = exact.astype(np.float32)
  values = np.float32(first) + products
  rounds = bool((values != np.float64(first) + exact).any())
  return values, rounds, bool((products == exact).all())


def _kinds(codes: Int8[np.ndarray, '...']) -> UInt8[np.ndarray, '...']:
  return np.where(codes == ESCAPE, compression.ESCAPED, codes != 0).astype(np.uint8)


def _check_cells(name: str, codes: Int8[np.ndarray, '...'], record: LeafState) -> None:
  """The value of every code that occurs has that code: compressing it again changes nothing."""
  every = np.arange(256).astype(np.uint8).view(np.int8)
  counts = np.where((every == 0) | (every == ESCAPE), 0, histogram(codes))
  values = _table(record).astype(np.float32)
  if bad := int(counts[~np.isfinite(values)].sum()):
    raise ValueError(
      f'{name}: found {bad} values that are NaN or infinite once they are '
      f'{np.dtype(record.dtype)}, expected none'
    )
  with np.errstate(over='ignore', invalid='ignore'):
    cell = np.floor((np.abs(values) - np.float32(record.threshold)) * (1 / np.float32(record.step)))
  again = np.where(values < 0, -1, 1) * (1 + np.clip(cell, 0, max(int(record.levels) - 1, 0)))
  if moved := int(counts[again != every].sum()):
    raise ValueError(
      f'{name}: found {moved} values that lie in another cell once they are '
      f'{np.dtype(record.dtype)}, expected none: step {float(record.step)} is too fine for this '
      'dtype, or the grid is damaged'
    )


def _check_levels(codes: Int8[np.ndarray, '...'], levels: int) -> None:
  largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)))
  if largest > levels:
    raise ValueError(f'found code {largest}, expected at most {levels}')


def _table(record: LeafState) -> Shaped[np.ndarray, '256']:
  """The value of every code, a code as a byte being its place; that of an escaped weight is 0."""
  codes = np.arange(256).astype(np.uint8).view(np.int8)
  if jnp.finfo(record.dtype).nmant >= 23:
    # as `compression.decode`, which may have no float64
    table = np.asarray(record.codebook)[codes].astype(record.dtype)
    table[128] = 0
    return table
  kinds: Any = np.ones(256, np.uint8)
  grid = dataclasses.replace(record, kinds=kinds)
  escaped = np.zeros(256, record.dtype)
  return np.asarray(compression.decode(codes, CompressionState(grid), escaped))


def _values(codes: Int8[np.ndarray, '...'], record: LeafState) -> Shaped[np.ndarray, '...']:
  """The value of every code in the dtype of the leaf."""
  table, flat = _table(record), np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
  values = np.empty(flat.size, table.dtype)
  for start in range(0, flat.size, _CHUNK):
    values[start : start + _CHUNK] = table[flat[start : start + _CHUNK]]
  return values.reshape(codes.shape)
