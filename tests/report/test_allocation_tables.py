import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.report import summary


def leaf_allocation(shape=(4, 8), **fields):
  values = {
    'scale': jnp.ones(shape[-1]),
    'threshold': jnp.float32(0.5),
    'sparsity': jnp.float32(0.25),
    'step': jnp.float32(0.5),
    'offset': jnp.float32(0.2),
    'levels': jnp.int32(5),
    'bits': jnp.linspace(2.0, 4.0, shape[-1]),
    'error': jnp.float32(0.0123),
    'entropy': jnp.float32(2.0),
    'payload': jnp.float32(2.0),
    'laplace_fit': jnp.float32(1.0),
    'escaped': jnp.float32(0.0),
    'clipped': jnp.float32(0.0),
    'dead_channels': jnp.int32(0),
    'dead_rows': jnp.int32(0),
  }
  return LeafAllocation(**(values | fields), shape=shape, channel_axis=-1)


def lines_of(table):
  return str(table).splitlines()


def test_summary_rows_and_totals():
  params = {'a': {'kernel': np.zeros((4, 8)), 'bias': np.zeros(8)}, 'b': np.zeros((16, 6))}
  tree = {
    'a': {'kernel': leaf_allocation(), 'bias': None},
    'b': leaf_allocation((16, 6), payload=jnp.float32(4.0), sparsity=jnp.float32(0.75)),
  }
  text = str(summary(params, Allocation(tree)))
  (row,) = (line.split() for line in text.splitlines() if 'a/kernel' in line)
  assert row == ['a/kernel', '4x8', '32', '25.0%', '5', '3.00', '2.000', '1.23%', '1.00']
  # 32 weights at 2 bits and 96 at 4
  (row,) = (line.split() for line in text.splitlines() if '2 compressed' in line)
  assert row == ['2', 'compressed', '128', '62.5%', '3.500']
  assert '1 uncompressed' in text
  assert '9.14 times fewer' in text


def test_summary_flags_laplace_misfits():
  params = {'good': np.zeros((4, 8)), 'heavy': np.zeros((4, 8)), 'closed': np.zeros((4, 8))}
  fits = {'good': 1.0, 'heavy': 3.5, 'closed': float('nan')}
  tree = {name: leaf_allocation(laplace_fit=jnp.float32(fit)) for name, fit in fits.items()}
  text = str(summary(params, Allocation(tree)))
  assert '3.50!' in text
  assert '1 of 3 leaves' in text
  (row,) = (line.split() for line in text.splitlines() if 'closed' in line)
  assert row[-1] == '-'


def test_summary_fits_100_columns():
  names = [f'params/encoder/block_{i}/attention/output/dense/kernel' for i in range(12)]
  params = {name: np.zeros((4, 8)) for name in names}
  shape = (3, 3, 1024, 4096)
  tree = dict.fromkeys(names, leaf_allocation(shape, bits=jnp.ones(8)))
  lines = lines_of(summary(params, Allocation(tree)))
  assert max(map(len, lines)) <= 100
  # nothing but a path is shortened, and paths still tell leaves apart
  rows = [line.split() for line in lines if '3x3x1024x4096' in line]
  assert len({row[0] for row in rows}) == 12
  assert {row[2] for row in rows} == {'37,748,736'}


def test_summary_paths_are_no_markup():
  tree = {'[red]w[/red]': leaf_allocation()}
  assert '[red]w[/red]' in str(summary({'[red]w[/red]': np.zeros((4, 8))}, Allocation(tree)))


def test_summary_on_a_rich_console(capsys):
  table = summary({'w': np.zeros((4, 8))}, Allocation({'w': leaf_allocation()}))
  Console(width=100).print(table)
  assert '4x8' in capsys.readouterr().out


def test_summary_refuses_another_tree():
  with pytest.raises(ValueError, match='other structure'):
    summary({'a': np.zeros((4, 8))}, Allocation({'b': leaf_allocation()}))


def test_summary_of_abstract_parameters():
  params = {'w': jax.ShapeDtypeStruct((4, 8), jnp.float32)}
  assert '4x8' in str(summary(params, Allocation({'w': leaf_allocation()})))


def test_summary_counts_escaped_and_dead():
  params = {'a': np.zeros((4, 8)), 'b': np.zeros((16, 6))}
  lost = leaf_allocation((16, 6), sparsity=jnp.float32(1), dead_channels=jnp.int32(6))
  tree = {'a': leaf_allocation(escaped=jnp.float32(0.125), dead_rows=jnp.int32(2)), 'b': lost}
  text = ' '.join(str(summary(params, Allocation(tree))).split())
  assert 'levels escaped bits' in text
  assert 'pruned of 6 output channels, of 2 indices of a first axis, and of 1 leaves: b' in text
