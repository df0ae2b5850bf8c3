"""Makes the golden files of the format that are not there: `python -m tests.golden.make`.

    NAME.opq           a network of every kind of leaf and container, small
    NAME.safetensors   what `opq_jax.load` must make of it, for ever: the leaves by name, and
                       <name>:kinds, :codebook, :threshold, :step, :levels, :codes, and
                       :output_scales where there are some; of version 1, :mask in place of :kinds;
                       float8 as uint8

NAME is

    version_1, version_1_contexts   made once by what wrote version 1; the codes of the second are
                                    those of `context_coding`
    version_2_escapes               escaped weights in five dtypes, and sums that round
    version_2_ties                  leaves that are earlier ones again, as they are and transposed
    version_2_axes                  kernels whose codes follow the trellis once their axes are moved
    version_2_rotated               leaves of rotated inputs: with scales, escaped weights, slices,
                                    moved axes; of these the codes alone
    version_2_scales                leaves whose outputs have scales: plain codes with escaped
                                    weights, codes along the trellis once axes are moved, slices,
                                    and a transpose
    version_2_slices                leaves of slices along one axis and two, one of zeros, some with
                                    escaped weights
    version_3_side_files            config and tokenizer beside the leaves; in NAME.safetensors as
                                    uint8, `side file <name>`

A field of the format brings a file.  Files that are there are never made again.

    shares.json    tables of frequencies, the shares of 24 bits that constriction made of them, and
                   words that it made of symbols: what it must make for ever, or a file would mean
                   other numbers
"""

import dataclasses
import json
import pathlib

import constriction
import flax.core
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

import opq_jax
from opq_jax.coding import frequencies, trellis
from opq_jax.coding.output_scales import scales_of
from opq_jax.compression.records import affine_codebook, kinds_of
from opq_jax.core import trees
from opq_jax.file.coded_leaves import CodedSlice, Rotation
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids
from tests.helpers.rotated_files import file_of

FOLDER = pathlib.Path(__file__).parent
METADATA = {'weights': 'golden', 'é': '[{"'}


def network(smooth: bool) -> dict[str, object]:
  """Laplace kernels in three dtypes, a leaf of zeros, one without elements, and all containers."""
  draw = np.random.default_rng(0).laplace
  kernel = draw(size=(3, 3, 8, 16))
  if smooth:
    kernel = np.cumsum(np.cumsum(kernel, 0), 1)
  return {
    'params': {
      'conv': {
        'kernel': kernel.astype(np.float32),
        'bias': draw(size=16).astype(np.float32),
      },
      'dense': flax.core.freeze({'kernel': draw(size=(16, 24)).astype(ml_dtypes.bfloat16)}),
      'half': [draw(size=(24, 10)).astype(np.float16), None, (np.float32(-0.0),)],
      'zeros': np.zeros((6, 4), np.float32),
      'empty': np.zeros((0, 3), np.float32),
      'numbers': {7: np.array([np.nan, np.inf, 1e-42], np.float64), -1: {':': np.int8(3)}},
    },
    'batch_stats': {'mean': draw(size=16).astype(np.float32), 'var': np.full(16, 0.5, np.float32)},
    'steps': np.int64(1 << 40),
    'is_trained': np.array([True, False]),
  }


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All that a file holds, by name."""
  found = {}
  with opq_jax.OpqFile(path) as file:
    for name, data in file.read_side_files().items():
      found[f'side file {name}'] = np.frombuffer(data, np.uint8)
    for name, leaf in file.items():
      is_float8 = leaf.dtype.name.startswith('float8')  # which safetensors writes and cannot read
      found[name] = leaf.view(np.uint8) if is_float8 else leaf
      if (record := file.leaf_state(name)) is not None:
        fields = ('kinds', 'codebook', 'threshold', 'step', 'levels')
        fields += ('output_scales',) if record.output_scales is not None else ()
        found |= {f'{name}:{field}': np.asarray(getattr(record, field)) for field in fields}
      if file.grids(name):
        found[f'{name}:codes'] = file.codes(name)
  return found


def escapes() -> tuple[dict[str, object], opq_jax.CompressionState]:
  """The network with outliers that escape, and with a leaf of float8 and one of two levels."""
  params = network(smooth=True)
  draw = np.random.default_rng(1).laplace
  params['float8'] = draw(size=(8, 16)).astype(ml_dtypes.float8_e4m3fn)
  params['two'] = draw(size=(6, 7)).astype(np.float32)
  params['all'] = draw(size=(2, 3)).astype(np.float16)
  # threshold, step, first value, levels
  grids = {
    'params/conv/kernel': (0.5, 0.75, 0.875, 20),
    'params/dense/kernel': (0.25, 0.375, 0.4375, 5),
    'params/half/0': (0.25, 0.015625, 0.2578125, 127),
    'params/zeros': (0.0, 1.0, 0.5, 0),
    'float8': (0.125, 0.25, 0.25, 9),
    'two': (0.3, 0.7, 0.6, 2),
    'all': (0.0, 1.0, 0.5, 0),
  }
  states = []
  for name, leaf in trees.named_leaves(params).items():
    if name not in grids:
      states.append(None)
      continue
    threshold, step, first, levels = grids[name]
    grid = np.float32(threshold), np.float32(step), np.int32(levels)
    kinds = np.asarray(kinds_of(leaf, *grid))
    book = affine_codebook(np.float32(first), grid[1], grid[2])
    states.append(
      opq_jax.compression.LeafState(
        kinds=kinds,
        codebook=book,
        threshold=grid[0],
        step=grid[1],
        levels=grid[2],
        dtype=leaf.dtype,
      )
    )
  structure = jax.tree.structure(params)
  return params, opq_jax.CompressionState(jax.tree.unflatten(structure, states))


def ties() -> tuple[dict[str, object], opq_jax.CompressionState]:
  """The network with some kernels twice, some transposed, escaped weights included."""
  params, state = escapes()
  leaves, states = trees.named_leaves(params), state.tree
  turned = lambda record: dataclasses.replace(record, kinds=record.kinds.T)
  again = {
    'u_kernel': (leaves['params/conv/kernel'], states['params']['conv']['kernel']),
    'v_dense': (leaves['params/dense/kernel'].T, turned(states['params']['dense']['kernel'])),
    'w_two': (leaves['two'], states['two']),
    'x_two': (leaves['two'].T, turned(states['two'])),
  }
  more = {name: leaf for name, (leaf, _) in again.items()}
  own = {name: record for name, (_, record) in again.items()}
  return {**params, **more}, opq_jax.CompressionState({**states, **own})


def slices() -> tuple[dict[str, object], opq_jax.CompressionState]:
  """The network with stacked layers and experts: their slices have grids of their own."""
  params, state = escapes()
  draw = np.random.default_rng(2).laplace
  scales = np.array([1.0, 0.25, 0.0, 8.0])
  layers = draw(size=(4, 8, 12)) * scales[:, None, None]
  layers[1, 2, 3], layers[3, :2, 0] = 77.5, -900
  experts = draw(size=(2, 3, 6, 5)) * np.linspace(0.5, 3, 6).reshape(2, 3, 1, 1)
  stacks = {
    'layers': layers.astype(np.float32),
    'experts': experts.astype(ml_dtypes.bfloat16),
  }
  # threshold and step over the scale of a slice, first value in steps beyond the threshold, levels
  grids = {
    'layers': (scales, [4, 3, 0, 2]),
    'experts': (2.0 ** np.arange(-1, 5).reshape(2, 3) / 4, [[9, 5, 2], [1, 3, 0]]),
  }
  states = {}
  for name, leaf in stacks.items():
    scale, levels = grids[name]
    threshold, step = np.float32(0.5 * scale), np.where(scale, np.float32(0.75 * scale), 1)
    grid = threshold, step.astype(np.float32), np.array(levels, np.int32)
    states[name] = opq_jax.compression.LeafState(
      kinds=np.asarray(kinds_of(leaf, *grid)),
      codebook=affine_codebook(grid[0] + grid[1] / 2, *grid[1:]),
      threshold=grid[0],
      step=grid[1],
      levels=grid[2],
      dtype=leaf.dtype,
    )
  return {**params, **stacks}, opq_jax.CompressionState({**state.tree, **states})


SIDE_FILES = {
  'config.json': b'{"model_type": "golden"}\n',
  '1_Pooling/config.json': b'{"model_type": "golden"}\n' * 3,
  'tokenizer.model': bytes(range(256)),
  'empty': b'',
}


def along_trellis(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Codes that follow the trellis in C order, every 41st an escape."""
  rng, state, codes = np.random.default_rng(seed), 0, []
  for place, (magnitude, sign) in enumerate(rng.geometric(0.5, (np.prod(shape), 2))):
    if place % 41 == 7:
      codes.append(-128)
      state = int(trellis.NEXT[state, 0])
      continue
    index, subset = magnitude - 1, int(trellis.SUBSET_OF[state])
    codes.append((2 * index - subset * (index > 0)) * (-1) ** sign)
    state = int(trellis.NEXT[state, index & 1])
  return np.array(codes, np.int8).reshape(shape)


def on_finest_grids(
  kinds: np.ndarray, stack: tuple[int, ...], dtype: np.dtype
) -> opq_jax.compression.LeafState:
  """The state of a leaf of all 127 levels, with the same grid in each of its slices."""
  levels = np.full(stack, 127, np.int32)
  threshold, step = (np.full(stack, number, np.float32) for number in (0.125, 0.5))
  return opq_jax.compression.LeafState(
    kinds=kinds,
    codebook=np.asarray(affine_codebook(threshold + step / 2, step, levels)),
    threshold=threshold,
    step=step,
    levels=levels,
    dtype=dtype,
  )


def axes() -> tuple[dict[str, object], opq_jax.CompressionState]:
  """The network with kernels of outputs by inputs, a stack of them, and one transposed."""
  params, state = escapes()
  # slices, then the axes with the inputs first, and the order that brings them there
  kernels = {
    'linear': ((), (20, 30), (1, 0), np.float32),
    'conv': ((), (3, 3, 6, 8), (2, 3, 1, 0), ml_dtypes.bfloat16),
    'heads': ((), (12, 4, 5), (1, 0, 2), np.float16),
    'layers': ((2,), (10, 14), (1, 0), np.float32),
  }
  states = {}
  for seed, (name, (stack, shape, order, dtype)) in enumerate(kernels.items()):
    codes = np.stack([along_trellis(shape, 10 * seed + i) for i in range(max(*stack, 1, 1))])
    codes = codes.reshape(*stack, *shape)
    back = [*range(len(stack)), *(len(stack) + np.argsort(order))]
    codes = np.ascontiguousarray(codes.transpose(back))
    leaf = (np.sign(codes) * (0.375 + 0.5 * (np.abs(codes.astype(np.float32)) - 1))).astype(dtype)
    kinds, outliers = (codes != 0).astype(np.uint8), codes == -128
    leaf[outliers], kinds[outliers] = 700 + np.arange(outliers.sum()), 2
    params[name] = leaf
    states[name] = on_finest_grids(kinds, stack, leaf.dtype)
  params['turned'] = params['linear'].T
  states['turned'] = dataclasses.replace(states['linear'], kinds=states['linear'].kinds.T)
  return params, opq_jax.CompressionState({**state.tree, **states})


def scales() -> tuple[dict[str, object], opq_jax.CompressionState]:
  """The network with leaves whose outputs have scales, of an eighth to eight."""
  params, state = escapes()
  # slices, shape, axis of the outputs, order of axes along the trellis or None, dtype
  kernels = {
    'plain': ((), (3, 3, 6, 8), 3, None, ml_dtypes.bfloat16),
    'dense': ((), (20, 30), 1, None, np.float32),
    'linear': ((), (14, 25), 0, (1, 0), np.float32),
    'layers': ((2,), (10, 14), 0, (1, 0), np.float16),
  }
  states = {}
  for seed, (name, (stack, shape, axis, order, dtype)) in enumerate(kernels.items()):
    rng = np.random.default_rng(100 + seed)
    moved = shape if order is None else tuple(shape[a] for a in order)
    codes = np.stack([along_trellis(moved, 50 + 10 * seed + i) for i in range(max(*stack, 1, 1))])
    codes = codes.reshape(*stack, *moved)
    if order is None:  # off every trellis
      codes = np.where(codes == -128, codes, codes - 2 * (codes > 1)).astype(np.int8)
    else:
      codes = codes.transpose(*range(len(stack)), *(len(stack) + np.argsort(order)))
    own = [*stack, *(n if i == axis else 1 for i, n in enumerate(shape))]
    scale = scales_of(rng.integers(-24, 25, own).astype(np.int8))
    values = np.sign(codes) * (0.375 + 0.5 * (np.abs(codes.astype(np.float32)) - 1)) * scale
    leaf, outliers = values.astype(dtype), codes == -128
    kinds = (codes != 0).astype(np.uint8)
    leaf[outliers], kinds[outliers] = 700 + np.arange(outliers.sum()), 2
    params[name] = leaf
    state_of_leaf = on_finest_grids(kinds, stack, leaf.dtype)
    states[name] = dataclasses.replace(state_of_leaf, output_scales=scale)
  params['turned'] = params['linear'].T
  linear = states['linear']
  states['turned'] = dataclasses.replace(
    linear, kinds=linear.kinds.T, output_scales=linear.output_scales.T
  )
  return params, opq_jax.CompressionState({**state.tree, **states})


def rotated() -> bytes:
  """A file of rotated leaves, with and without all that may come with a rotation."""
  leaves = {}
  # slices, shape, axis of the inputs, axis of scales, order of axes along the trellis, dtype
  kernels = {
    'plain': ((), (24, 10), 0, None, None, np.float32),
    'conv': ((), (3, 3, 6, 8), 2, 3, None, ml_dtypes.bfloat16),
    'linear': ((), (14, 64), 1, 0, (1, 0), np.float16),
    'layers': ((2,), (9, 14), 0, None, None, np.float64),
  }
  for seed, (name, (stack, shape, axis, outputs, order, dtype)) in enumerate(kernels.items()):
    rng, parts = np.random.default_rng(200 + seed), []
    for i in range(max(*stack, 1, 1)):
      moved = shape if order is None else tuple(shape[a] for a in order)
      codes = along_trellis(moved, 200 + 10 * seed + i)
      if order is not None:
        codes = np.ascontiguousarray(codes.transpose(np.argsort(order)))
      grid = Grid(*map(np.float32, (0.125, 0.375, 0.5)), 127, np.dtype(np.float32))
      grids = OutputGrids(grid)
      if outputs is not None:
        scale = scales_of(rng.integers(-24, 25, shape[outputs]).astype(np.int8))
        grids = OutputGrids(grid, scale, outputs)
      escaped = (700 + np.arange((codes == -128).sum())).astype(np.float32)
      parts.append(CodedSlice(codes, escaped, grids, Rotation(axis, np.dtype(dtype))))
    leaves[name] = parts, len(stack)
  return file_of(leaves, METADATA)


def shares() -> list[dict[str, object]]:
  """Tables of all precisions, even and steep, of 2 symbols to 256."""
  rng = np.random.default_rng(3)
  vectors = []
  for precision in range(1, 17):
    for steepness in (0.0, 0.5, 6.0):
      most = min(2**precision, 256)
      size = 2 if precision == 1 else int(rng.integers(2, most + 1))
      counts = np.zeros(256, np.int64)
      symbols = (np.arange(size) - size // 2) if size < 256 else np.arange(-128, 128)
      weights = np.exp(-steepness * np.abs(symbols) ** 0.5)
      units = 1 + rng.multinomial(2**precision - size, weights / weights.sum())
      if steepness == 0.5 and size > 3:  # a symbol between others that does not occur
        units[size // 2 + 1], units[size // 2] = 0, units[size // 2 : size // 2 + 2].sum()
      counts[symbols.astype(np.int8).view(np.uint8)] = units
      order = sorted(range(-128, 128), key=lambda s: (abs(s), s < 0))
      least, largest = min(0, *symbols.tolist()), max(0, *symbols.tolist())
      known = np.array([s for s in order if least <= s <= largest], np.int8)
      table = frequencies.Frequencies(known, counts[known.view(np.uint8)], precision)
      coded = rng.choice(symbols, 40, p=units / 2**precision).astype(np.int8)
      coder = constriction.stream.stack.AnsCoder()
      table.encode(coder, coded)
      bits = frequencies.write_table(table)
      vectors.append(
        {
          'table': frequencies.to_bytes(bits).hex(),
          'precision': precision,
          'symbols': known.tolist(),
          'frequencies': table.frequencies.tolist(),
          'shares': shares_of(table),
          'words': coder.get_compressed().tolist(),
          'coded': coded.tolist(),
        }
      )
  return vectors


def shares_of(table: frequencies.Frequencies) -> list[int]:
  """How many of all 2**24 slots constriction gives to each symbol that occurs."""
  occurring = table.symbols[table.frequencies > 0]
  place = {symbol: i for i, symbol in enumerate(occurring.tolist())}

  def symbol_at(slot: int) -> int:
    coder = constriction.stream.stack.AnsCoder(np.array([slot, 1], np.uint32))
    out = np.zeros(1, np.int8)
    table.decode(coder, out)
    return place[int(out[0])]

  begins = []
  for number in range(occurring.size):
    # the first slot of this symbol or a later one, by bisection
    low, high = 0, 1 << 24
    while low < high:
      middle = (low + high) // 2
      low, high = (low, middle) if symbol_at(middle) >= number else (middle + 1, high)
    begins.append(low)
  return np.diff([*begins, 1 << 24]).tolist()


def main() -> None:
  made = {
    'version_2_escapes': (escapes, None),
    'version_2_ties': (ties, None),
    'version_2_slices': (slices, None),
    'version_2_axes': (axes, None),
    'version_2_scales': (scales, None),
    'version_3_side_files': (slices, SIDE_FILES),
  }
  for name, (make, side_files) in made.items():
    stem = FOLDER / name
    if not stem.with_suffix('.opq').exists():
      opq_jax.save(stem.with_suffix('.opq'), *make(), METADATA, side_files=side_files)
      data = safetensors.numpy.save(arrays(stem.with_suffix('.opq')))
      stem.with_suffix('.safetensors').write_bytes(data)
  if not (path := FOLDER / 'version_2_rotated.opq').exists():
    path.write_bytes(rotated())
    path.with_suffix('.safetensors').write_bytes(safetensors.numpy.save(arrays(path)))
  if not (path := FOLDER / 'shares.json').exists():
    path.write_text('[\n' + ',\n'.join(map(json.dumps, shares())) + '\n]\n')


if __name__ == '__main__':
  main()
