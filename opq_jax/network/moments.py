"""The second moments of each layer's inputs, from calibration inputs or without any data.

A layer's output is y = x W, row by row of x: a token, an example, a window of a convolution.  Under
other weights Q, its squared error depends on the inputs by one matrix alone,

    E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))          H = E[x^T x]

and this matrix is all that error feedback (`opq_jax.encoders.Feedback`) needs to know.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.network.batch_mode import on_batch_statistics
from opq_jax.network.moment_sums import Measured, MomentSums
from opq_jax.network.stored_moments import StoredMatrix, measured_on_disk
from opq_jax.network.uses import arguments, traced

_MAX_NAMED = 10  # leaves that a warning lists


@flax.struct.dataclass
class InputMoments:
  """Second moments of the inputs of one leaf.

  Attributes:
    matrix: H = E[x^T x] of every slice and group.  A row x holds the K numbers that one output is
      a weighted sum of, in the order of `inputs`.  A `StoredMatrix` where it is on disk.
    inputs: axes of the leaf that a product sums over: K is the product of their lengths.  They are
      in ascending order, and of a convolution those of the window come first.
    slices: how many leading axes of the leaf count slices.
  """

  matrix: Float32[Array, '*slices groups K K'] | StoredMatrix
  inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
  slices: int = flax.struct.field(pytree_node=False, default=0)


def second_moments(
  fn: Callable[..., Any],
  params: PyTree,
  *inputs: Any,
  folder: str | os.PathLike[str] | None = None,
) -> PyTree:
  """Returns the second moments H = E[x^T x] of the inputs of every leaf that is multiplied.

  The jaxpr of `fn` is walked with the leaf that each value comes from, so any function that JAX can
  trace will do: dense layers, attention, einsum, convolutions (also grouped, dilated, transposed),
  scan, remat, recurrent cells.  The expectation is over all rows that a leaf is multiplied with:
  examples, tokens, places of a window with the zeros that it sees beyond the border, and steps of
  a loop in which the leaf stays the same.  The layers of a scan and batched experts are slices, and
  each has a matrix of its own.

  A Linen network with BatchNorm runs on batch statistics, as in
  `opq_jax.correction.correct_batch_norm`: then every layer sees, per channel, the first two moments
  that it had in training, even if the inputs are noise.  Noise does not know how channels and
  neighbours go together; `opq_jax.correction.natural_noise` knows it of the neighbours, and
  `opq_jax.correction.synthetic_inputs` knows much of both.

  Args:
    fn: called as `fn(params, *inputs)`.  `model.apply` of a Flax Linen module whose variables hold
      `batch_stats` is called such that BatchNorm runs on the batch
      (`opq_jax.network.on_batch_statistics`).  Compiled once for each such function.
    params: the parameters, or variables, of the network.
    inputs: calibration inputs, any pytrees of arrays, or PRNG keys: prepared as the network expects
      them, or synthetic, or noise.
    folder: where the matrices are written, for networks whose matrices do not fit into memory: the
      network then runs uncompiled, operation by operation, and in memory is one matrix at a time.
      Encoders read them from there, leaf by leaf and slice by slice.  Files of earlier moments in
      the folder are overwritten.

  Returns:
    The tree of the parameters with an `InputMoments` at every leaf of a dot or a convolution, and
    None elsewhere: at leaves that are looked up or taken part in elementwise, and where arithmetic,
    a cut or a `shard_map` lies between the leaf and its product (`opq_jax.usage` names these).

  Raises:
    ValueError: a leaf is no array; Linen's BatchNorm cannot be told to run on the batch.
    OSError: a matrix cannot be written.

  Warns:
    UserWarning: leaves that are multiplied and have no moments, or moments of no input, by name.

  >>> import flax.linen as nn
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(3, name='head')(x)
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> variables = Network().init(jax.random.key(0), x)
  >>> second_moments(Network().apply, variables, x)['params']['head']['kernel'].matrix.tolist()
  [[[5.0, 1.0], [1.0, 2.0]]]
  """
  return mean_moments(fn, params, [inputs], folder=folder)


def mean_moments(
  fn: Callable[..., Any],
  params: PyTree,
  batches: Iterable[Any],
  *,
  folder: str | os.PathLike[str] | None = None,
) -> PyTree:
  """Returns the second moments over several batches of one size: the mean of `second_moments`.

  Args:
    fn, params, folder: as for `second_moments`.
    batches: the inputs of each call; a tuple is several arguments.

  Raises:
    ValueError: as `second_moments`, or there is no batch.
  """
  arguments_of = (batch if type(batch) is tuple else (batch,) for batch in batches)
  if folder is not None:
    layout_of = functools.partial(jax.eval_shape, functools.partial(_measured, fn))
    return _tree_of(params, measured_on_disk(fn, params, arguments_of, layout_of, folder))
  total, count = None, 0
  for inputs in arguments_of:
    measured = _measured(fn, params, *inputs)
    total = measured if total is None else _sum(total, measured)
    count += 1
  if total is None:
    raise ValueError('batches: found none, expected at least one')
  return _tree_of(params, total if count == 1 else _divided(total, count))


def moment_bytes(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> int:
  """Returns how many bytes the matrices of `second_moments` take, without computing any of them.

  Args:
    fn, params, inputs: as for `second_moments`; shapes and dtypes will do.

  >>> dense = lambda params, x: x @ params['kernel'] + params['bias']
  >>> moment_bytes(dense, {'kernel': jnp.ones((100, 3)), 'bias': jnp.ones(3)}, jnp.ones((8, 100)))
  40000
  """
  shapes = jax.eval_shape(functools.partial(_measured, fn), params, *inputs)
  return sum(matrix.size * matrix.dtype.itemsize for matrix in shapes.matrices)


def _tree_of(params: PyTree, measured: Measured) -> PyTree:
  """Returns the moments as a tree, and names the leaves that ought to have some and have none."""
  if measured.unmeasured:
    names = list(trees.named_leaves(params))
    unmeasured = [names[number] for number in measured.unmeasured]
    messages.warn(
      f'{messages.listed(unmeasured, _MAX_NAMED)}: found leaves that are multiplied behind '
      'arithmetic, a cut or a computed index, or along several axes: they have no moments, and '
      'get plain codes (opq_jax.usage shows their uses)'
    )
  # all at once: each number by itself would wait for the device
  rows = [] if trees.is_traced(measured.rows) else jax.device_get(measured.rows)
  empty = {number for number, count in enumerate(rows) if not float(count)}
  unread = [
    name
    for name, entry in zip(trees.named_leaves(params), measured.leaves, strict=True)
    if entry is not None and entry[0] in empty
  ]
  if unread:
    messages.warn(
      f'{messages.listed(unread)}: found leaves, or slices of them, that no input has reached, as '
      'in a branch that is not taken: their moments are 0, and they get plain codes'
    )
  found = [
    None if entry is None else InputMoments(measured.matrices[entry[0]], *entry[1:])
    for entry in measured.leaves
  ]
  return jax.tree.unflatten(jax.tree.structure(params), found)


@functools.partial(jax.jit, donate_argnums=0)
def _sum(one: Measured, other: Measured) -> Measured:
  return jax.tree.map(jnp.add, one, other)


@functools.partial(jax.jit, donate_argnums=0)
def _divided(total: Measured, count: Array) -> Measured:
  return jax.tree.map(lambda matrix: matrix / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _measured(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> Measured:
  leaves = jax.tree.leaves(params)
  closed = traced(on_batch_statistics(fn, params), params, *inputs)
  walk = MomentSums(len(leaves))
  contents = [*leaves, *jax.tree.leaves(inputs)]
  walk.walk(
    closed.jaxpr, walk.constants(closed), arguments(walk, closed, len(leaves), contents), ()
  )
  return walk.measured()
