import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from opq_jax.coding.frequencies import histogram
from opq_jax.compression import LeafState
from opq_jax.compression.cells import value_table
from opq_jax.compression.records import affine_codebook, exact_grid
from opq_jax.file import checks, leaf_entries
from opq_jax.file.grids import Grid

DTYPES = [dtype for dtype in leaf_entries.DTYPES.values() if leaf_entries.can_be_compressed(dtype)]

codebook_in_jax = jax.jit(affine_codebook)
value_table_in_jax = jax.jit(value_table)


def random_grids(dtype, count=40):
  """Grids as `init_state` makes them, within the range of the dtype and beyond it."""
  rng = np.random.default_rng(0)
  for number in range(count):
    scale = 10.0 ** (rng.uniform(-36, 30) if number % 2 else rng.uniform(-4, 4))
    levels = int(rng.choice([0, 1, 2, 3, 16, 63, 127]))
    threshold = np.float32(scale * rng.choice([0, 0.3, 1, 5]))
    first = threshold + np.float32(scale * rng.uniform(0.1, 0.9))
    step, first = exact_grid(jnp.float32(scale), jnp.float32(first), jnp.int32(levels))
    yield Grid(threshold, np.float32(first), np.float32(step), levels, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_value_table_equals_jax(dtype):
  for grid in random_grids(dtype):
    codebook = np.asarray(codebook_in_jax(grid.first, grid.step, np.int32(grid.levels)))
    assert grid.codebook().tobytes() == codebook.tobytes(), grid
    if dtype.itemsize == 8:
      expected = codebook[np.arange(256).astype(np.int8)].astype(dtype)
    else:
      record = LeafState(
        kinds=np.ones(256, np.uint8),
        codebook=codebook,
        threshold=grid.threshold,
        step=grid.step,
        levels=np.int32(grid.levels),
        dtype=dtype,
      )
      expected = np.array(value_table_in_jax(record))
    expected[128] = 0
    assert grid.value_table().tobytes() == expected.tobytes(), grid


def test_reader_needs_no_jax():
  golden = pathlib.Path(__file__).parents[1] / 'golden'
  # codes along a trellis are decoded by a program that numba compiles
  names = 'version_2_axes.opq', 'version_2_scales.opq', 'version_2_rotated.opq'
  paths = sorted(set(golden.glob('*.opq')) - {golden / name for name in names})
  code = (
    'import sys\n'
    'from opq_jax.file.reader import OpqFile\n'
    'for path in sys.argv[1:]:\n'
    '  with OpqFile(path) as file:\n'
    '    assert sum(file[name].size for name in file) > 100\n'
    'heavy = {"jax", "flax", "optax", "numba", "scipy", "orbax"} & set(sys.modules)\n'
    'assert not heavy, heavy'
  )
  command = [sys.executable, '-c', code, *map(str, paths)]
  found = subprocess.run(command, capture_output=True, text=True, check=False)
  assert found.returncode == 0, found.stderr


def test_check_cells_refuses_values_that_xla_flushes_to_zero():
  # a step of float32's denormal numbers, of which only a crafted file has a grid
  tiny = np.float32(2.0**-130)
  grid = Grid(np.float32(0), tiny, tiny, 2, np.dtype(ml_dtypes.bfloat16))
  codes = np.array([0, 1, -2, -1], np.int8)
  with pytest.raises(ValueError, match=r'^w: found 3 values of a magnitude below 1\.18e-38'):
    checks.check_cells('w', histogram(codes), grid)
  checks.check_cells('w', histogram(np.zeros(3, np.int8)), grid)
