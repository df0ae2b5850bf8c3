"""How a function uses its leaves: read from its jaxpr, without computing anything.

`usage` answers for every leaf whether it is multiplied (a kernel), looked up (an embedding) or
taken part in elementwise (biases, norms, gates), and which of its axes are

    slices    of which each is a matrix of its own: the layers of a scan, the experts of a batched
              product
    inputs    over which a product sums
    outputs   that remain

The answer holds for any function that JAX can trace, whatever library it was written with.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opq_jax.core import trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.trees import PyTree
from opq_jax.network import views
from opq_jax.network.interpreter import Interpreter, Product, Value

_KINDS = {'dot_general': 'dot', 'conv_general_dilated': 'convolution', 'gather': 'look-up'}


@dataclasses.dataclass(frozen=True)
class Use:
  """One operation that a leaf takes part in.

  Attributes:
    operation: the name of JAX's primitive: 'dot_general', 'conv_general_dilated', 'gather', ...
    kind: 'dot', 'convolution', 'look-up', or 'elementwise' for all other operations.
    slices, inputs, outputs: axes of the leaf; empty where the use is elementwise.
    indices: how the leading slices are reached: a number where one of them is indexed,
      `views.STEP` where a scan runs over them, `views.DYNAMIC` where an index is computed.
    groups: of a convolution: its outputs are cut into so many runs, each of other inputs.
    reads: a number that uses share if they multiply the same rows; None of elementwise uses.
    rows: rows of inputs that a slice is multiplied with in one call.
    is_batched: whether some slices are a batch axis of the operation, as experts are: each is then
      multiplied with rows of its own.
    is_exact: whether the operation sees the leaf's own numbers, whole: False behind weight
      normalization, padding, or a cut along an axis.
    where: loops and branches around it, the outermost first: ('scan',).
  """

  operation: str
  kind: str
  slices: tuple[int, ...] = ()
  inputs: tuple[int, ...] = ()
  outputs: tuple[int, ...] = ()
  indices: tuple[int, ...] = ()
  groups: int = 1
  reads: int | None = None
  rows: int = 0
  is_batched: bool = False
  is_exact: bool = True
  where: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LeafUsage:
  """How a function uses one leaf.

  Attributes:
    name: the leaf's path.
    shape: of the leaf.
    uses: in the order of the function.
    share: p, the share of all rows (tokens) that a slice is multiplied with: k / E for one of E
      experts of which each row takes k, and 1 for layers.  Read as the rows of a slice over the
      most rows of any product without a batch axis, at most 1.
  """

  name: str
  shape: tuple[int, ...]
  uses: tuple[Use, ...]
  share: float = 1.0

  @property
  def product(self) -> Use | None:
    """The first dot or convolution, or else the first look-up; None where there is none."""
    for kinds in (('dot', 'convolution'), ('look-up',)):
      for use in self.uses:
        if use.kind in kinds and use.outputs and use.inputs:
          return use
    return None

  @property
  def kind(self) -> str:
    """'dot', 'convolution', 'look-up', 'elementwise', or 'unused'."""
    if self.product is not None:
      return self.product.kind
    return 'elementwise' if self.uses else 'unused'

  @property
  def slices(self) -> int:
    """How many leading axes count slices."""
    return leading_slices(self.uses)

  @property
  def is_compressible(self) -> bool:
    """Whether the leaf is a stack of matrices that are multiplied or looked up."""
    return self.product is not None

  @property
  def channel_axis(self) -> ChannelAxes:
    """The axis of the output channels, or all where there are several; else the last axis."""
    outputs = self.product.outputs if self.product else (len(self.shape) - 1,)
    return outputs if len(outputs) > 1 else outputs[0]


def leading_slices(uses: Sequence[Use]) -> int:
  """Returns how many leading axes are slices in every product of a leaf."""
  counts = []
  for use in uses:
    if use.kind == 'elementwise':
      continue
    count = 0
    while count in use.slices:
      count += 1
    counts.append(count)
  return min(counts, default=0)


def usage(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> PyTree:
  """Returns how a function uses each leaf of its parameters.

  The function is traced and nothing is computed.  Its jaxpr is walked with the leaf that each value
  comes from: through operations that only move numbers (reshape, transpose, conversion, broadcast,
  slice), and into jit, remat, custom derivatives, scan, cond and while.  In a `shard_map` and in
  other operations with a body of their own, uses are not understood, and named as 'elementwise'
  uses of that operation.

  Args:
    fn: called as `fn(params, *inputs)`: `model.apply` of Linen, a Haiku transform's `apply`, or
      `lambda state, x: nnx.merge(graph, state)(x)`, ...
    params: arrays, or `jax.ShapeDtypeStruct`s.
    inputs: any pytrees of arrays, shapes, or PRNG keys.

  Returns:
    A tree like `params` with a `LeafUsage` at every leaf.

  Raises:
    ValueError: a leaf of `params` is no array.

  >>> import jax.numpy as jnp
  >>> def network(params, x):
  ...   h = jax.nn.relu(x @ params['first'] + params['bias'])
  ...   return jnp.einsum('bi,oi->bo', h, params['last'])
  >>> shape = jax.ShapeDtypeStruct
  >>> params = {'first': shape((8, 16), 'float32'), 'bias': shape((16,), 'float32'),
  ...           'last': shape((4, 16), 'float32')}
  >>> used = usage(network, params, shape((2, 8), 'float32'))
  >>> used['last'].kind, used['last'].product.inputs, used['last'].product.outputs
  ('dot', (1,), (0,))
  >>> used['bias'].kind
  'elementwise'
  """
  used = usage_in(traced(fn, params, *inputs), params)
  return jax.tree.unflatten(jax.tree.structure(params), used)


def usage_in(closed: Any, params: PyTree) -> list[LeafUsage]:
  """Returns how a traced function uses each leaf of its parameters."""
  names = trees.named_leaves(params)
  walk = _Usage(len(names))
  walk.walk(closed.jaxpr, walk.constants(closed), arguments(walk, closed, len(names)), ())
  leaves = [
    LeafUsage(name, tuple(np.shape(leaf)), tuple(uses))
    for (name, leaf), uses in zip(names.items(), walk.uses, strict=True)
  ]
  return _with_shares(leaves)


def traced(fn: Callable[..., Any], params: PyTree, *inputs: Any) -> Any:
  """Returns the closed jaxpr of a function; the leaves of its parameters come first.

  Raises:
    ValueError: a leaf of `params` is no array.
  """
  for name, leaf in trees.named_leaves(params).items():
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise ValueError(
        f'{name}: found {type(leaf).__name__}, expected an array (of an Equinox module, '
        'eqx.partition(module, eqx.is_array) gives the arrays)'
      )
  return jax.make_jaxpr(fn)(params, *inputs)


def arguments(
  walk: Interpreter, closed: Any, leaves: int, contents: Sequence[Any] | None = None
) -> list[Value]:
  """Returns the values that a walk begins with: leaves of the parameters, then inputs."""
  avals = [variable.aval for variable in closed.jaxpr.invars]
  values = []
  for place, aval in enumerate(avals):
    is_leaf = place < leaves
    seen = (views.whole(place, aval.shape),) if is_leaf else ()
    content = None if contents is None else contents[place]
    values.append(Value(aval.shape, aval.dtype, content, seen, not is_leaf, walk.fresh()))
  return values


class _Usage(Interpreter):
  """Collects the uses of all leaves."""

  def __init__(self, leaves: int):
    super().__init__()
    self.uses: list[list[Use]] = [[] for _ in range(leaves)]
    self._readings: dict[Any, int] = {}

  def product(self, product: Product) -> None:
    use = use_of(product)
    if use.kind in ('dot', 'convolution'):
      key = rows_key(product)
      use = dataclasses.replace(use, reads=self._readings.setdefault(key, len(self._readings)))
    self.uses[product.view.leaf].append(use)


def _with_shares(leaves: list[LeafUsage]) -> list[LeafUsage]:
  """Returns the leaves with their shares of all rows."""
  products = [use for leaf in leaves for use in leaf.uses if use.kind == 'dot']
  most = max((use.rows for use in products if not use.is_batched), default=0)

  def share(leaf: LeafUsage) -> float:
    use = leaf.product
    if use is None or not use.is_batched or not leaf.slices or not most:
      return 1.0
    return min(use.rows / most, 1.0)

  return [dataclasses.replace(leaf, share=share(leaf)) for leaf in leaves]


def use_of(product: Product) -> Use:
  """Returns what an operation does with a leaf."""
  roles = _axis_roles(product)
  if roles is None:
    return Use(product.operation, 'elementwise', where=product.where)
  taken, contracted, free = roles
  view, shape = product.view, product.values[product.operand].shape
  slices, inputs, outputs = _axes_by_role(view, taken, contracted, free)
  is_whole = set(slices) | set(inputs) | set(outputs) == set(_axes_of(view))
  other = product.values[1 - product.operand] if len(product.values) > 1 else None
  rows = 0
  if other is not None and product.operation != 'gather':
    ours = math.prod(shape[axis] for axis in (*taken, *contracted))
    rows = math.prod(other.shape) // max(ours, 1)
  return Use(
    product.operation,
    _KINDS[product.operation],
    slices,
    inputs,
    outputs,
    indices=view.indices,
    groups=product.equation.params.get('feature_group_count', 1),
    rows=rows,
    is_batched=_KINDS[product.operation] == 'dot' and bool(taken),
    is_exact=view.is_exact and is_whole and (other is None or other.is_data),
    where=product.where,
  )


def rows_key(product: Product) -> Any:
  """Returns a key that products share if they sum over the same rows."""
  parameters = product.equation.params
  other = product.values[1 - product.operand]
  if product.operation == 'dot_general':
    contracted, batch = parameters['dimension_numbers']
    place = 1 - product.operand
    return other.number, tuple(contracted[place]), tuple(batch[place])
  window = product.values[product.operand].shape
  numbers = parameters['dimension_numbers']
  spatial = tuple(window[axis] for axis in numbers.rhs_spec[2:])
  names = ('window_strides', 'padding', 'lhs_dilation', 'rhs_dilation', 'feature_group_count')
  return other.number, spatial, numbers.lhs_spec, *(tuple(np.ravel(parameters[n])) for n in names)


def _axis_roles(product: Product) -> tuple[list[int], list[int], list[int]] | None:
  """Returns which axes of the operand are batch axes, contracted and free."""
  rank = len(product.values[product.operand].shape)
  parameters = product.equation.params
  match product.operation:
    case 'dot_general':
      contracted, batch = (sides[product.operand] for sides in parameters['dimension_numbers'])
    case 'conv_general_dilated' if product.operand == 1:
      numbers = parameters['dimension_numbers']
      if parameters['batch_group_count'] != 1:
        return None
      contracted, batch = numbers.rhs_spec[1:], ()
    case 'gather' if product.operand == 0:
      numbers, sizes = parameters['dimension_numbers'], parameters['slice_sizes']
      # a batched `table[i]` has an index of every axis, 0 of those that it takes whole
      shape = product.values[0].shape
      is_whole = lambda axis: sizes[axis] == shape[axis] > 1
      contracted = [axis for axis in numbers.start_index_map if not is_whole(axis)]
      batch = numbers.operand_batching_dims
    case _:
      return None
  free = [axis for axis in range(rank) if axis not in contracted and axis not in batch]
  return list(batch), list(contracted), free


def _axes_by_role(
  view: views.View, taken: list[int], contracted: list[int], free: list[int]
) -> tuple[tuple[int, ...], ...]:
  """Returns the leaf's axes that are slices, inputs and outputs."""
  roles: dict[int, set[str]] = {axis: set() for axis in _axes_of(view)}
  parts = [
    ('slices', view.picked),
    *(('slices', view.axes[axis]) for axis in taken),
    *(('inputs', view.axes[axis]) for axis in contracted),
    *(('outputs', view.axes[axis]) for axis in free),
  ]
  for role, factors in parts:
    for factor in factors:
      if factor.axis != views.REPEATED:
        roles[factor.axis].add(role)
  # an axis that is partly one and partly another thing has no role
  return tuple(
    tuple(axis for axis, found in roles.items() if found == {role})
    for role in ('slices', 'inputs', 'outputs')
  )


def _axes_of(view: views.View) -> list[int]:
  """Returns the axes of a leaf that a view knows of."""
  every = (*view.picked, *(factor for axis in view.axes for factor in axis))
  return sorted({factor.axis for factor in every if factor.axis != views.REPEATED})
