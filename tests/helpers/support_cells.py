"""The cells of the support matrix: what each feature does for each network, checked and measured.

A cell is a function of a network's name.  It raises AssertionError where the feature does not do
what it should, and returns what the table shows.  `experiments.benchmarks.accuracy.support_matrix`
writes the table, and tests/docs/test_support_matrix.py runs the same functions.
"""

import contextlib
import functools
import io
import pathlib
import tempfile
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import opq_jax
from opq_jax import cli, correction, encoders
from opq_jax.compression import CompressionState
from opq_jax.core import axes, trees
from opq_jax.network import second_moments, usage
from opq_jax.weights import write_safetensors
from tests.helpers import frameworks, meshes
from tests.helpers.small_networks import assert_compressed, assert_same_bits

BITS = 3.0
"""Bits per weight of all cells: what plain codes lose is seen, and no network breaks."""

STEPS, LEARNING_RATE = 6, 1e-3  # of finetuning


@functools.cache
def used(name):
  net = frameworks.network(name)
  return usage(net.fn, net.params, frameworks.calibration_inputs())


@functools.cache
def moments(name):
  net = frameworks.network(name)
  return second_moments(net.fn, net.params, frameworks.calibration_inputs())


@functools.cache
def coded(name, codes):
  """The network compressed by an encoder."""
  net, of_inputs = frameworks.network(name), moments(name)
  if codes == 'layer by layer':
    first = coded(name, 'feedback')
    feedback = encoders.Feedback(of_inputs)
    encoder = encoders.LayerByLayer(net.fn, frameworks.calibration_inputs(), first=feedback)
    # as `compress` does, without a second search for the allocation
    return encoder.choose_codes(net.params, opq_jax.init_state(net.params, first.allocation))
  by_name = {
    'plain': encoders.Rounding(),
    'feedback': encoders.Feedback(of_inputs),
    'trellis': encoders.Trellis(of_inputs),
  }
  options = {'bits_per_weight': BITS, 'encoder': by_name[codes], 'usage': used(name)}
  return opq_jax.compress(net.params, **options)


@functools.partial(jax.jit, static_argnums=0)
def outputs(fn, params, images):
  return fn(params, images)


def differences(name, params):
  """Relative squared error and mean divergence (nats) of the logits of held-out images."""
  net, (images, _) = frameworks.network(name), frameworks.held_out()
  first, second = (outputs(net.fn, tree, images) for tree in (net.params, params))
  error = jnp.square(first - second).sum() / jnp.square(first).sum()
  return float(error), float(divergence(first, second))


def divergence(logits, others):
  first, second = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
  return (jnp.exp(first) * (first - second)).sum(-1).mean()


def percent(share):
  return f'{100 * share:.2g} %'


def usage_cell(name):
  """The leaves that are multiplied, and their slices, are those that the author wrote down."""
  net, leaves = frameworks.network(name), jax.tree.leaves(used(name))
  assert {leaf.name: leaf.slices for leaf in leaves if leaf.is_compressible} == net.kernels
  assert all(leaf.product.kind in ('dot', 'convolution') for leaf in leaves if leaf.product)
  stacked = sum(slices > 0 for slices in net.kernels.values())
  return f'{len(net.kernels)} kernels' + (f', {stacked} of slices' if stacked else '')


def matrices_apart(name):
  """The tree with every slice a leaf of its own, and how these leaves are used."""
  params, uses = {}, {}
  of_leaves = zip(
    trees.named_leaves(frameworks.network(name).params).items(),
    jax.tree.leaves(used(name)),
    strict=True,
  )
  for (path, leaf), use in of_leaves:
    if not use.is_compressible:
      continue
    for place in np.ndindex(leaf.shape[: use.slices]):
      key = '/'.join([path, *map(str, place)])
      params[key] = leaf[place]
      axis = axes.in_slice(use.channel_axis, use.slices)
      uses[key] = types.SimpleNamespace(
        is_compressible=True, channel_axis=axis, slices=0, share=use.share
      )
  return params, uses


def grid_of(allocation):
  """Thresholds, steps and payloads of all matrices in the order of their steps, and their sizes."""
  rows = [
    (step, leaf.threshold[place], leaf.payload[place], leaf.scale.dtype.type(size))
    for leaf in jax.tree.leaves(allocation.tree, is_leaf=lambda node: hasattr(node, 'step'))
    for size in [np.prod(leaf.shape[leaf.slices :])]
    for place, step in np.ndenumerate(np.asarray(leaf.step))
  ]
  return np.array(sorted(rows), np.float64)


def allocate_cell(name):
  """The bits asked; slices have the grids of leaves apart, and all forms of a network the same."""
  found = grid_of(coded(name, 'plain').allocation)
  payload, size = found[:, 2], found[:, 3]
  np.testing.assert_allclose((payload * size).sum() / size.sum(), BITS, rtol=1e-3)
  if any(frameworks.network(name).kernels.values()):
    params, uses = matrices_apart(name)
    apart = opq_jax.allocate(params, bits_per_weight=BITS, usage=uses)
    np.testing.assert_allclose(found, grid_of(apart), rtol=1e-4)
  first = frameworks.FIRST_FORMS.get(name)
  if first is not None:
    np.testing.assert_allclose(found, grid_of(coded(first, 'plain').allocation), rtol=1e-4)
  return 'yes'


@functools.cache
def error_of(name, codes):
  """Relative squared error of the outputs, which all forms of one network share."""
  error, _ = differences(name, coded(name, codes).params)
  first = frameworks.FIRST_FORMS.get(name)
  if first is not None:
    # sums in another order move a few weights into the next cell
    np.testing.assert_allclose(error, error_of(first, codes), rtol=0.1)
  return error


def feedback_cell(name):
  before, after = error_of(name, 'plain'), error_of(name, 'feedback')
  assert after < 0.7 * before
  return f'{percent(before)} to {percent(after)}'


def trellis_cell(name):
  assert error_of(name, 'trellis') < 0.7 * error_of(name, 'plain')
  return percent(error_of(name, 'trellis'))


def layer_by_layer_cell(name):
  assert error_of(name, 'layer by layer') < error_of(name, 'feedback')
  return percent(error_of(name, 'layer by layer'))


def correction_cell(name):
  """Of plain codes, from unlabelled inputs."""
  net, params = frameworks.network(name), coded(name, 'plain').params
  batches = [frameworks.calibration_inputs()]
  corrected = correction.correct_on_images(net.fn, net.params, params, batches)
  before, after = (differences(name, tree)[1] for tree in (params, corrected))
  assert after < 0.9 * before
  return f'{before:.3f} to {after:.3f}'


def finetuning_cell(name):
  """Distils the float network; pruned weights stay zero and values in the codebook."""
  net, images = frameworks.network(name), frameworks.calibration_inputs()
  state, params, run = coded(name, 'plain').state, net.params, net.fn
  if frameworks.has_batch_norm(net):
    state, params = CompressionState(state.tree['params']), net.params['params']
    run = lambda params, x: net.fn({**net.params, 'params': params}, x)
  apply_fn = opq_jax.compressed(run, state)
  optimizer = optax.chain(optax.adam(LEARNING_RATE), opq_jax.keep_compressed(state))
  target = outputs(net.fn, net.params, images)

  @jax.jit
  def step(params, memory):
    loss, gradient = jax.value_and_grad(lambda p: divergence(target, apply_fn(p, images)))(params)
    updates, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, updates), memory, loss

  memory, losses = optimizer.init(params), []
  for _ in range(STEPS):
    params, memory, loss = step(params, memory)
    losses.append(float(loss))
  assert losses[-1] < 0.8 * losses[0]
  assert_compressed(params, state)
  leaves, states = trees.named_leaves(params), trees.records(params, state.tree, object)
  for leaf, record in zip(leaves.values(), states, strict=True):
    assert record is None or not np.any(np.asarray(leaf)[~np.asarray(record.mask)])
  return f'{losses[0]:.3f} to {losses[-1]:.3f}'


def files_cell(name):
  """The bits come back, in the containers of the network."""
  net, result = frameworks.network(name), coded(name, 'feedback')
  loaded, state = opq_jax.load(opq_jax.file.serialize(result.params, result.state), like=net.params)
  assert jax.tree.structure(loaded) == jax.tree.structure(net.params)
  assert_same_bits(loaded, result.params)
  assert_same_bits(opq_jax.apply_compression(loaded, state), result.params)
  return 'yes'


def mesh_cell(name):
  """Allocation, values and file of one device; what is loaded lies as `like` does."""
  net = frameworks.network(name)
  laid = meshes.laid_out(net.params, net.kernels)
  options = {'bits_per_weight': BITS, 'usage': used(name)}
  allocation = opq_jax.allocate(net.params, **options)
  found = opq_jax.allocate(laid, **options)
  np.testing.assert_allclose(grid_of(found), grid_of(allocation), rtol=1e-3)
  state, one = (opq_jax.init_state(tree, allocation) for tree in (laid, net.params))
  values = opq_jax.apply_compression(laid, state)
  meshes.lies_alike(values, laid)
  assert_same_bits(values, opq_jax.apply_compression(net.params, one))
  data = opq_jax.file.serialize(laid, state)
  assert data == opq_jax.file.serialize(net.params, one)
  loaded, _ = opq_jax.load(data, like=laid)
  meshes.lies_alike(loaded, laid)
  assert_same_bits(loaded, values)
  return 'yes'


def command_cell(name):
  """`opq compress` and `opq verify` of the weights in a file: the same leaves, by their names."""
  net = frameworks.network(name)
  slices = [word for path, n in net.kernels.items() if n for word in ('--slices', f'{path}={n}')]
  with tempfile.TemporaryDirectory() as folder:
    source, target = (str(pathlib.Path(folder) / name) for name in ('a.safetensors', 'a.opq'))
    write_safetensors(source, net.params)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      assert cli.main(['compress', source, target, '--bits-per-weight', str(BITS), *slices]) == 0
      assert cli.main(['verify', target, '--against', source]) == 0
    with opq_jax.OpqFile(target) as file:
      compressed = {path: file.slices(path) for path in file if file.leaf_state(path)}
  # a file does not tell that positions are added and not looked up
  positions = {path: 0 for path in compressed if path.endswith('position')}
  assert compressed == net.kernels | positions
  return 'yes, and the positions' if positions else 'yes'


CELLS = {
  'usage': usage_cell,
  'allocate': allocate_cell,
  'feedback': feedback_cell,
  'trellis': trellis_cell,
  'layer by layer': layer_by_layer_cell,
  'correction': correction_cell,
  'finetuning': finetuning_cell,
  'save, load': files_cell,
  'mesh of 8': mesh_cell,
  'opq compress': command_cell,
}
"""Columns of the matrix; 'mesh of 8' needs eight devices."""


def cell(name, column):
  """What the table shows, with the warnings that a user would see."""
  with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion('standard'):
    warnings.simplefilter('always')
    with jax.numpy_rank_promotion('allow'):
      shown = CELLS[column](name)
  notes = sorted({str(warning.message) for warning in caught})
  if any('the trellis does not serve' in note for note in notes):
    shown += ', outputs first: by feedback alone'
  return shown, notes
