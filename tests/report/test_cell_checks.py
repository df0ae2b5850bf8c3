import numpy as np

import opq_jax
from opq_jax.compression import encode
from opq_jax.report import cell_checks
from tests.helpers.opq_files import small, with_escapes


def test_check_leaf_finds_infinite_values():
  params, state = small()
  values = np.array(opq_jax.apply_compression(params, state)['a'])
  values[0, 0], values[0, 1] = np.inf, np.nan
  codes, record = np.asarray(encode(params, state)['a']), state.tree['a']
  row = cell_checks.check_leaf('a', params['a'], params['a'], codes, values, record, 0)
  assert 'a: found 2 finite weights that came back infinite or NaN, expected none' in row.problems


def test_check_leaf_compares_kinds():
  params, state = small()
  codes = np.asarray(encode(params, state)['a'])
  marked = with_escapes(state.tree['a'], (0, 0))
  row = cell_checks.check_leaf('a', params['a'], params['a'], codes, params['a'], marked, 0)
  assert 'a: found 1 escaped weights whose code and kind differ, expected none' in row.problems
