"""Properties of every tree: any nesting, containers, dtypes, shapes, scales and values."""

import collections
import contextlib
import warnings

import flax.core
import flax.struct
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import opq_jax
from opq_jax.compression import LeafState
from opq_jax.core import trees
from opq_jax.file import writer
from opq_jax.report.verification import verify

Pair = collections.namedtuple('Pair', ['second', 'first'])
DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16)]
# few, because XLA compiles for every list of shapes
SHAPES = [(), (0, 3), (1, 1), (5,), (7, 3)]
KINDS = [
  *('laplace', 'heavy', 'ties', 'constant', 'channels', 'zeros', 'denormal', 'outlier', 'one sign'),
  *('huge', 'tiny'),
]


@flax.struct.dataclass
class Record:
  kernel: object
  bias: object
  name: str = flax.struct.field(pytree_node=False, default='')


def values(kind, shape, seed):
  """Draws weights in float64 of some kind, with a scale of about 1 or at an end of float32."""
  rng = np.random.default_rng(seed)
  draw = rng.laplace(size=shape)
  match kind:
    case 'heavy':
      draw = rng.standard_t(1.2, size=shape)
    case 'ties':
      draw = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], size=shape)
    case 'constant':
      draw = np.full(shape, 0.3)
    case 'channels':
      draw = np.broadcast_to(rng.laplace(size=shape[-1:]), shape).copy()
    case 'zeros':
      draw = np.zeros(shape)
    case 'denormal':
      draw = draw * 1e-39
    case 'outlier':
      draw = np.where(np.arange(draw.size).reshape(shape) == 0, 1e4, draw)
    case 'one sign':
      draw = np.abs(draw)
    case 'huge':
      draw = draw * 1e30
    case 'tiny':
      draw = draw * 1e-30
  return draw


def leaf(kind, shape, dtype, seed):
  largest = float(ml_dtypes.finfo(dtype).max) / 4
  return np.clip(values(kind, shape, seed), -largest, largest).astype(dtype)


LEAVES = st.builds(
  leaf,
  st.sampled_from(KINDS),
  st.sampled_from(SHAPES),
  st.sampled_from(DTYPES),
  st.integers(0, 99),
)
TREES = st.recursive(
  LEAVES | st.none(),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(['a', 'b', 'kernel', 'é']), inner, max_size=3),
    st.dictionaries(st.sampled_from(['a', 'b']), inner, max_size=2).map(flax.core.freeze),
    st.builds(Pair, inner, inner),
    st.builds(Record, inner, inner),
  ),
  max_leaves=4,
)


def compressible(path, leaf):
  """Chooses vectors as well; a scalar is nothing to compress."""
  return np.ndim(leaf) > 0


def quiet_allocate(params, **options):
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*Laplace density')
    return opq_jax.allocate(params, **options)


def assert_contract(params, state):
  """Checks the promises of every compressed tree: idempotence, round trips, verification."""
  compressed = opq_jax.apply_compression(params, state)
  codes = opq_jax.encode(params, state)
  assert_same(opq_jax.decode(codes, state, params), compressed)
  assert_same(opq_jax.apply_compression(compressed, state), compressed)
  assert_same(opq_jax.encode(compressed, state), codes)
  for record, value in zip(
    trees.records(params, state.tree, LeafState), jax.tree.leaves(compressed), strict=True
  ):
    if record is not None:
      assert np.isfinite(np.asarray(value, np.float32)).all()
      assert ((np.asarray(value) != 0) <= np.asarray(record.mask)).all()
  data = writer.serialize(params, state)
  assert writer.serialize(params, state) == data
  loaded, loaded_state = opq_jax.load(data, like=params)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert_same(loaded, compressed)
  assert_same(opq_jax.apply_compression(loaded, loaded_state), compressed)
  assert writer.serialize(loaded, loaded_state) == data
  found = verify(data, params)
  assert found.holds, found.problems


def assert_same(found, expected):
  for name, leaf in trees.named_leaves(expected).items():
    first, second = np.asarray(trees.named_leaves(found)[name]), np.asarray(leaf)
    assert (first.dtype, first.shape) == (second.dtype, second.shape), name
    assert first.tobytes() == second.tobytes(), name


def has_weights(params):
  return any(np.ndim(leaf) and np.size(leaf) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('is_wide', [False, True], ids=['float32', 'float64'])
@given(params=TREES.filter(has_weights))
@settings(max_examples=2)  # XLA compiles for every tree
def test_any_tree_is_exact(is_wide, params):
  with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
    allocation = quiet_allocate(
      params, sparsity=0.5, bits=2.0, compressible=compressible, corrected=False
    )
    assert_contract(params, opq_jax.init_state(params, allocation))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_any_weights_are_exact(kind, dtype):
  params = {'w': leaf(kind, (16, 8), dtype, 0), 'other': leaf('laplace', (16, 8), dtype, 1)}
  targets_of = [{'sparsity': 0.5, 'bits': 3.0}]
  # half a tree of zeros cannot have every rate
  if dtype == np.float32 and kind not in ('zeros', 'denormal'):
    targets_of.append({'compression_rate': 16.0})
  for targets in targets_of:
    allocation = quiet_allocate(params, **targets, corrected=False)
    assert_contract(params, opq_jax.init_state(params, allocation))


@pytest.mark.slow
@pytest.mark.parametrize(
  'targets', [{'compression_rate': 12.0}, {'sparsity': 0.6, 'bits': 3.0}], ids=['rate', 'sparsity']
)
def test_allocate_with_float64(targets):
  params = {
    'w': leaf('laplace', (64, 32), np.float32, 0),
    'half': leaf('channels', (64, 32), np.float16, 1) * leaf('laplace', (64, 32), np.float16, 2),
    'zeros': leaf('zeros', (8, 8), np.float32, 0),
  }
  expected = quiet_allocate(params, **targets)
  with jax.enable_x64(True):
    found = quiet_allocate(params, **targets)
    assert_contract(params, opq_jax.init_state(params, found))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(1.2, 6.0), st.floats(1.2, 6.0))
@settings(max_examples=10)
def test_allocate_is_monotone(first, second, some, more):
  params = {
    'a': leaf('laplace', (16, 8), np.float32, 0),
    'b': leaf('heavy', (16, 8), np.float32, 1),
  }
  few, many = sorted((first, second))
  coarse, fine = sorted((some, more))

  def total(field, **targets):
    tree = quiet_allocate(params, **targets, corrected=False).tree
    return np.array([float(getattr(tree[name], field)) for name in params])

  less, most = (total('sparsity', sparsity=p, bits=3.0) for p in (few, many))
  assert less.sum() <= most.sum() + 1e-5
  assert (
    total('threshold', sparsity=few, bits=3.0)
    <= total('threshold', sparsity=many, bits=3.0) * (1 + 1e-5)
  ).all()
  step = [total('step', sparsity=0.5, bits=bits).max() for bits in (coarse, fine)]
  assert step[1] <= step[0] * (1 + 1e-4)
  errors = [total('error', compression_rate=32 / min(b, 5)).sum() for b in (coarse, fine)]
  assert errors[1] <= errors[0] * (1 + 1e-3)
