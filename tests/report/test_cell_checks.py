import numpy as np

from opq_jax.compression import encode
from opq_jax.core.limits import ESCAPE
from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.file.coded_weights import checked_grids
from opq_jax.report import cell_checks
from tests.helpers.opq_files import small


def test_check_slice_finds_infinite_values():
  params, state = small()
  codes = np.array(encode(params, state)['a'])
  codes[0, :2] = ESCAPE
  grids = checked_grids('a', state.tree['a'], codes.shape)
  coded = CodedSlice(codes, np.array([np.inf, np.nan], np.float32), grids)
  row = cell_checks.check_slice('a', params['a'], params['a'], coded, 0)
  assert 'a: found 2 finite weights that came back infinite or NaN, expected none' in row.problems
