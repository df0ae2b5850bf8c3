"""Kinds of files to damage: their bytes, their reader, and the check of what it accepts."""

import io
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

import opq_jax
from experiments.benchmarks.robustness.hostile_commands import COMMANDS, command_of
from opq_jax.coding import escapes
from opq_jax.coding import payload as entropy_coding
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.records import affine_codebook
from opq_jax.core import trees
from opq_jax.file import reader, writer
from opq_jax.network import InputMoments
from opq_jax.weights import read_weights

GOLDEN = pathlib.Path(__file__).parents[3] / 'tests' / 'golden'

FIELDS = {
  'ties': 'version_2_ties',
  'trellis': 'version_2_axes',
  'scales': 'version_2_scales',
  'rotated': 'version_2_rotated',
  'side files': 'version_3_side_files',
  'palettes': None,
}
"""Files of `GOLDEN` by what they have; None of one that is made here."""


def tree() -> dict[str, np.ndarray]:
  """Returns leaves of three dtypes, kernels and vectors, and one without elements."""
  draw = np.random.default_rng(0).laplace
  return {
    'conv/kernel': draw(size=(3, 3, 2, 4)).astype(np.float32),
    'dense/kernel': draw(size=(6, 5)).astype(np.float32),
    'dense/bias': draw(size=5).astype(np.float32),
    'empty/bias': np.zeros((0, 2), np.float32),
    'half/kernel': draw(size=(4, 3)).astype(np.float16),
    'steps/count': np.array(7, np.int32),
  }


def opq_file(has_escapes: bool, has_slices: bool) -> bytes:
  """Returns the tree as an .opq file, with a leaf of bfloat16, a list, and metadata.

  Args:
    has_escapes: whether some weights are escaped.
    has_slices: whether there are stacks of slices too, and a leaf whose payload is transposed.
  """
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
  if has_slices:
    more, states = stacks()
    params, state = {**params, **more}, CompressionState({**state.tree, **states})
  return writer.serialize(params, state, {'from': 'experiments', 'é': '[{"'})


def stacks() -> tuple[dict[str, np.ndarray], dict[str, LeafState]]:
  """Returns stacks of slices along one axis and two, and kernels of outputs by inputs."""
  draw = np.random.default_rng(1).laplace
  scales = np.array([0.5, 1, 2])
  layers = draw(size=(3, 8, 5)) * scales[:, None, None]
  layers[1, 2, 3], layers[2, 0, 0] = 70, -90
  params = {
    'layers': layers.astype(np.float32),
    'experts': draw(size=(2, 2, 4, 6)).astype(ml_dtypes.bfloat16),
    'linears': draw(size=(2, 24, 16)).astype(np.float32),
  }
  slices = {'layers': 1, 'experts': 2, 'linears': 1}
  allocation = opq_jax.allocate(params, bits_per_weight=4.0, slices=lambda path, _: slices[path])
  grids = opq_jax.init_state(params, allocation)
  states = dict(grids.tree)
  kinds = np.where(np.abs(params['layers']) > 50, np.uint8(2), states['layers'].kinds)
  states['layers'] = states['layers'].replace(kinds=kinds)
  values = opq_jax.apply_compression(params, CompressionState(states))
  # along a trellis, input after input
  moments = InputMoments(np.eye(16, dtype=np.float32)[None], (2,))
  values['linears'], along = opq_jax.encoders.Trellis(moments).choose_codes(
    params['linears'], CompressionState(states['linears'])
  )
  return values, states | {'linears': along.tree}


class Kind(NamedTuple):
  """One kind of file.

  Attributes:
    original: undamaged bytes.
    read: from bytes to arrays; a ValueError refuses them.
    check: (bytes, arrays) -> outcome of bytes that are read as other arrays.
  """

  original: bytes
  read: Callable[[bytes], Any]
  check: Callable[[bytes, Any], str]


def kind_of(kind: str, folder: pathlib.Path) -> Kind:
  """Returns a kind by its name; files are written to `folder`."""
  if kind == 'escapes':
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(4000, 60, replace=False))
    values = rng.laplace(size=60).astype(np.float32)
    read = lambda data: escapes.decode(data, 4000, 60, np.dtype(np.float32))
    again = lambda _, found: (
      'other' if same_arrays(read(escapes.encode(*found)), found) else 'wrong'
    )
    return Kind(escapes.encode(positions, values), read, again)
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
    return Kind(payload, read, lambda *_: 'wrong')
  if kind in COMMANDS:
    return Kind(*command_of(kind, folder), lambda *_: 'other')
  if (field := kind.removeprefix('opq, ').removesuffix(', resealed')) in FIELDS:
    golden = FIELDS[field]
    data = _palettes() if golden is None else (GOLDEN / f'{golden}.opq').read_bytes()
    return Kind(data, _everything, _read_again if 'resealed' in kind else lambda *_: 'wrong')
  if kind.startswith('opq'):
    check = _saved_again if 'resealed' in kind else lambda *_: 'wrong'
    return Kind(opq_file('escapes' in kind, 'slices' in kind), opq_jax.load, check)
  path = folder / f'net.{kind}'
  _write(path, tree())

  def read(data: bytes) -> Any:
    path.write_bytes(data)
    return read_weights(path)

  return Kind(path.read_bytes(), read, lambda *_: 'other')


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


def _palettes() -> bytes:
  """Returns the tree with leaves of at most 16 values."""
  params = {name: leaf for name, leaf in tree().items() if leaf.dtype == np.float32}
  network = opq_jax.compress(params, palette_bits=4)
  return writer.serialize(network.params, network.state, {'from': 'experiments'})


def _everything(data: bytes) -> dict[str, Any]:
  """Returns all that a file holds: leaves, codes, side files."""
  with reader.OpqFile(data) as file:
    found: dict[str, Any] = dict(file)
    found |= {f'codes of {name}': file.codes(name) for name in file if file.grids(name)}
    side = file.read_side_files()
    return found | {f'file {name}': np.frombuffer(part, np.uint8) for name, part in side.items()}


def _read_again(data: bytes, found: dict[str, Any]) -> str:
  """Returns `other` where a tree is that of its leaves, and is written and read again."""
  with reader.OpqFile(data) as file:
    leaves = trees.named_leaves(file.params())
    if not same_arrays(leaves, {name: found[name] for name in file}):
      return 'wrong'
    if any(file.rotated_axis(name) is not None for name in file):
      return 'other'
  return _saved_again(data, reader.load(data))


def _saved_again(data: bytes, found: Any) -> str:
  """Returns `other` where a resealed file that loads is written and read again bit for bit."""
  again = reader.load(writer.serialize(*found))
  return 'other' if same_arrays(again, found) else 'wrong'


def same_arrays(found: Any, expected: Any) -> bool:
  """Returns whether two trees have the same paths, dtypes, shapes and bits."""
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  return found.keys() == expected.keys() and all(
    (found[name].dtype, found[name].shape, found[name].tobytes())
    == (leaf.dtype, leaf.shape, leaf.tobytes())
    for name, leaf in expected.items()
  )
