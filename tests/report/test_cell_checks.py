import numpy as np

import opq_jax
from opq_jax.compression import encode
from opq_jax.file.coded_weights import checked_grids
from opq_jax.report import cell_checks
from tests.helpers.opq_files import small


def test_check_leaf_finds_infinite_values():
  params, state = small()
  values = np.array(opq_jax.apply_compression(params, state)['a'])
  values[0, 0], values[0, 1] = np.inf, np.nan
  codes = np.asarray(encode(params, state)['a'])
  grids = checked_grids('a', state.tree['a'], codes.shape)
  row = cell_checks.check_leaf('a', params['a'], params['a'], codes, values, grids, 0)
  assert 'a: found 2 finite weights that came back infinite or NaN, expected none' in row.problems
