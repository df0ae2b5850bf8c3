"""Objectives with a cost for each output: what scales gain, and when there are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import encoders
from opq_jax.allocation import LeafStatistics, leaf_statistics, merge_statistics
from opq_jax.allocation.output_scales import scales_for
from opq_jax.weights import compress_stored, open_weights

SHAPE = 256, 96


def problem(seed=0, spread=1.0):
  """A kernel, and costs of its outputs that differ by factors of e^spread and more."""
  rng = np.random.default_rng(seed)
  costs = np.exp(2 * spread * rng.normal(size=(1, SHAPE[1]))).astype(np.float32)
  weights = rng.laplace(size=SHAPE) * np.exp(0.5 * rng.normal(size=SHAPE[1]))
  return weights.astype(np.float32), costs


def cost(weights, values, costs):
  return float(np.sum(np.square(np.asarray(values, np.float64) - weights) * costs))


@pytest.mark.parametrize(
  'encoder', [encoders.Rounding(), encoders.Trellis()], ids=['round', 'trellis']
)
@pytest.mark.parametrize(('bits', 'slack'), [(2.0, 1.35), (4.0, 1.15)])
def test_allocate_of_outputs_lowers_their_cost(encoder, bits, slack):
  weights, costs = problem(spread=0.7)
  found = [
    opq_jax.compress({'w': weights}, bits_per_weight=bits, objective={'w': omega}, encoder=encoder)
    for omega in (costs, float(costs.mean()))
  ]
  bits_stored = [
    8 * len(opq_jax.file.serialize(network.params, network.state)) / weights.size
    for network in found
  ]
  # at equal bits, each of which quarters an error: contexts find which outputs are small
  ratio = 4 ** (bits_stored[0] - bits_stored[1])
  ratio *= cost(weights, found[0].params['w'], costs) / cost(weights, found[1].params['w'], costs)
  # of fine cells; at few bits some outputs are pruned, and lose no more
  scales = np.asarray(found[0].state.tree['w'].output_scales)
  expected = (costs * scales**2).mean() / np.exp(2 * np.log(scales).mean()) / costs.mean()
  assert expected < 0.6
  assert ratio < slack * expected


def test_bits_of_scales_are_predicted_and_part_of_the_target():
  weights, costs = problem()
  allocation = opq_jax.allocate({'w': weights}, bits_per_weight=3.0, objective={'w': costs})
  record = allocation.tree['w']
  assert float(record.payload) == pytest.approx(3.0, rel=1e-3)
  state = opq_jax.init_state({'w': weights}, allocation)
  data = opq_jax.file.serialize({'w': weights}, state, contexts=False)
  with opq_jax.OpqFile(data) as file:
    stored = 8 * file.payload_sizes('w')[0] / weights.size
  assert stored == pytest.approx(float(record.payload), rel=0.01)
  # the prediction of the error is that of the weights over the scales
  values = np.asarray(opq_jax.apply_compression({'w': weights}, state)['w'])
  units, of_values = weights / record.output_scales, values / record.output_scales
  error = np.square(units - of_values).sum() / np.square(units).sum()
  assert error == pytest.approx(float(record.error), rel=0.02)


def test_equal_costs_change_nothing():
  weights, costs = problem()
  found = [
    opq_jax.allocate({'w': weights}, bits_per_weight=3.0, objective={'w': omega})
    for omega in (np.full_like(costs, 7.0), 7.0)
  ]
  assert found[0].tree['w'].output_scales is None
  for first, second in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_array_equal(first, second)


def test_scales_that_save_less_than_they_take_are_none():
  weights, costs = problem(spread=0.02)
  assert scales_for(costs, weights, 0) is None
  assert scales_for(problem()[1], weights, 0) is not None


@pytest.mark.filterwarnings('ignore:found .* all values are exact')
def test_quantized_leaf_stays_exact():
  weights, costs = problem()
  ternary = np.sign(weights) * (np.abs(weights) > 1)
  network = opq_jax.compress({'w': ternary}, bits_per_weight=2.0, objective={'w': costs})
  np.testing.assert_array_equal(network.params['w'], ternary)


def test_costs_share_bits_between_leaves():
  # equal weights, costs of the same outputs: the dearer leaf gets the bits of two octaves of error
  weights, costs = problem()
  other = problem(seed=1)[0]
  tree, objective = {'a': weights, 'b': other}, {'a': costs, 'b': 16 * costs}
  records = opq_jax.allocate(tree, bits_per_weight=4.0, objective=objective).tree
  assert float(records['b'].entropy - records['a'].entropy) == pytest.approx(2.0, abs=0.15)


def test_statistics_over_scales_are_those_of_the_units():
  weights, costs = problem()
  scales = scales_for(costs, weights, 0)
  found = leaf_statistics(weights, output_scales=scales)
  expected = leaf_statistics(weights / scales)
  for field in ('scale', 'maximum', 'histogram', 'largest'):
    np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
  assert isinstance(found, LeafStatistics) and found.output_scales is scales
  with pytest.raises(ValueError, match='over output scales'):
    merge_statistics([found, found], 0)


@pytest.mark.parametrize('targets', [{'compression_rate': 10.0}, {'sparsity': 0.5, 'bits': 3.0}])
@pytest.mark.filterwarnings('ignore:the Laplace density')
def test_compress_stored_equals_save(targets, tmp_path):
  weights, costs = problem()
  params = {'plain': problem(1)[0], 'w': weights}
  objective = {'plain': 3.0, 'w': costs}
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  stored = open_weights(tmp_path / 'net.safetensors')
  done = compress_stored(stored, tmp_path / 'net.opq', objective=objective, **targets)
  allocation = opq_jax.allocate(params, objective=objective, **targets)
  state = opq_jax.init_state(params, allocation)
  assert state.tree['w'].output_scales is not None and state.tree['plain'].output_scales is None
  opq_jax.save(tmp_path / 'expected.opq', params, state)
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert done.report == opq_jax.size_report(params, state)


def test_allocate_refuses_costs_of_other_shapes_and_traces():
  weights, costs = problem()
  for wrong in (costs[0], costs[:, :5], np.ones(SHAPE)):
    with pytest.raises(ValueError, match='w: found an objective of shape'):
      opq_jax.allocate({'w': weights}, bits_per_weight=3.0, objective={'w': wrong})
  with pytest.raises(ValueError, match='w: found an objective of outputs in a trace'):
    jax.jit(
      lambda w: opq_jax.allocate({'w': w}, bits_per_weight=3.0, objective={'w': jnp.asarray(costs)})
    )(weights)


def test_slices_have_costs_of_outputs():
  weights, costs = problem()
  stack = np.stack([weights, 2 * weights])
  of_slices = np.stack([costs, costs[:, ::-1]])
  options = {'slices': lambda path, leaf: 1, 'objective': {'w': of_slices}}
  record = opq_jax.allocate({'w': stack}, bits_per_weight=3.0, **options).tree['w']
  assert record.output_scales.shape == (2, 1, SHAPE[1])
  alone = scales_for(costs, weights, 0)
  np.testing.assert_array_equal(record.output_scales[0], alone)
  np.testing.assert_array_equal(record.output_scales[1], alone[:, ::-1])
