"""Finetuning with the compression frozen: one pure step, and what runs it on many devices.

    values   = apply_compression(params, compression_state)      pruned, on the codebook
    loss     = mean over the batch of loss_fn(apply_fn(values, images), batch)
    gradient = straight-through to the latent params, 0 on pruned weights
    params  <- params + optimizer's update

The compression state is an input beside the training state, replicated, and never an output: no
optimizer, checkpoint or number of devices can change it (Hu et al., AAAI 2021: "nothing is
searched or re-estimated").
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from opq_jax.compression.codes import CompressionState, apply_compression
from opq_jax.compression.transforms import clip_to_grid as clip_gradient
from opq_jax.core.trees import PyTree
from opq_jax.finetuning.losses import Loss, classification_loss

AXIS = 'devices'
_STATISTICS = 'batch_stats'

Batch = Mapping[str, Any]
Metrics = dict[str, Float32[Array, '']]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: how many there were.
    params: the latent weights.
    batch_stats: BatchNorm's running statistics; an empty dict in a network without.
    opt_state: the optimizer's memory.
    rng: the key from which every step derives its own; never changes.
    average: {'params': …, 'batch_stats': …}, exponentially averaged over the steps, or None.
  """

  step: Int32[Array, '']
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rng: Array
  average: PyTree


def init_train_state(
  variables: Mapping[str, PyTree],
  optimizer: optax.GradientTransformation,
  key: Array,
  *,
  with_average: bool = False,
) -> TrainState:
  """The state before the first step; `with_average` is for a step with `ema_decay`.

  >>> state = init_train_state({'params': {'w': jnp.ones(3)}}, optax.sgd(0.1), jax.random.key(0))
  >>> int(state.step), state.batch_stats, state.average
  (0, {}, None)
  """
  # copies: a step is given its state to keep, and the caller's variables are not its own
  params, batch_stats = jax.tree.map(
    lambda leaf: jnp.array(leaf, copy=True), (variables['params'], variables.get(_STATISTICS, {}))
  )
  average = jax.tree.map(jnp.copy, {'params': params, _STATISTICS: batch_stats})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    rng=jnp.copy(key),
    average=average if with_average else None,
  )


def kernels(params: PyTree) -> PyTree:
  """True at leaves of two or more dimensions: the ones to decay, not biases nor BatchNorm.

      optimizer = optax.chain(optax.add_decayed_weights(1e-4, mask=kernels), optax.sgd(0.01))

  >>> kernels({'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)})
  {'bias': False, 'kernel': True}
  """
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def train_step(
  train_state: TrainState,
  compression_state: CompressionState | None,
  batch: Batch,
  teacher: Mapping[str, PyTree] | None = None,
  *,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  loss_fn: Loss | None = None,
  accumulation: int = 1,
  ema_decay: float | None = None,
  clip_to_grid: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[TrainState, Metrics]:
  """One step of any optimizer, pure.

  Devices that share `axis_name` average their gradients, running statistics and metrics, so that
  with equal inputs they have equal outputs.  BatchNorm normalises by the part of the batch that
  its device has (unless the network's BatchNorm has an axis name of its own).

  Args:
    train_state: the latent weights and the rest of what changes.
    compression_state: of `train_state.params`; None trains the float network.
    batch: {'image': [batch, …], 'label': [batch]} and whatever else `loss_fn` reads: this device's
      part.
    teacher: variables of a network of the same `apply_fn`, usually the float one before
      compression; its answers become `batch['teacher_logits']`.
    apply_fn: `model.apply` of a Flax Linen module, or any function called as
      `apply_fn(variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': key})`
      that returns logits and a dict of updates.  Its computation may be in bfloat16
      (`models.create(name, dtype=jnp.bfloat16)`); weights, gradients and updates are in the dtype
      of the params.
    optimizer: see `kernels` for weight decay on kernels alone.
    loss_fn: (logits, batch) -> one number an example; by default
      `opq_jax.finetuning.losses.classification_loss()`.
    accumulation: how many parts of equal size the batch is cut into; their gradients are averaged,
      and a part is all that must fit into memory at once.  BatchNorm sees one part at a time.
    ema_decay: of `train_state.average`, whose new value is decay * old + (1 - decay) * params;
      None leaves it alone.
    clip_to_grid: drop the gradient that moves a weight beyond the last cell further out; see
      `opq_jax.compression.transforms.clip_to_grid`.
    axis_name: of the `pmap` or `shard_map` around.

  Returns:
    The next state, and {'loss', 'top1'} averaged over the whole batch.

  Raises:
    ValueError: the state was made for another tree; or `accumulation` does not divide the batch;
      or `ema_decay` is given and there is no average.
  """
  loss_fn = loss_fn or classification_loss()
  key = jax.random.fold_in(train_state.rng, train_state.step)
  if axis_name is not None:
    key = jax.random.fold_in(key, lax.axis_index(axis_name))

  def loss(
    params: PyTree, batch_stats: PyTree, part: Batch, key: Array
  ) -> tuple[Float32[Array, ''], tuple[PyTree, Metrics]]:
    values = params if compression_state is None else apply_compression(params, compression_state)
    if teacher is not None:
      part = {**part, 'teacher_logits': apply_fn(teacher, part['image'], train=False)}
    logits, updates = apply_fn(
      _variables(values, batch_stats),
      part['image'],
      train=True,
      mutable=[_STATISTICS],
      rngs={'dropout': key},
    )
    mean = jnp.mean(loss_fn(logits, part))
    is_hit = _rank(logits, part['label']) == 0
    metrics = {'loss': mean, 'top1': jnp.mean(is_hit.astype(jnp.float32))}
    return mean, (updates.get(_STATISTICS, {}), metrics)

  def gradient(
    batch_stats: PyTree, x: tuple[Batch, Array]
  ) -> tuple[PyTree, tuple[PyTree, Metrics]]:
    found, (new, metrics) = jax.grad(loss, has_aux=True)(train_state.params, batch_stats, *x)
    return new, (found, metrics)

  if accumulation == 1:
    batch_stats, results = gradient(train_state.batch_stats, (batch, key))
  else:
    parts = {name: _split(leaf, accumulation, 'parts') for name, leaf in batch.items()}
    keys = jax.random.split(key, accumulation)
    batch_stats, results = lax.scan(gradient, train_state.batch_stats, (parts, keys))
    results = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), results)
  if axis_name is not None:
    batch_stats, results = lax.pmean((batch_stats, results), axis_name)
  gradients, metrics = results
  if clip_to_grid and compression_state is not None:
    clip = clip_gradient(compression_state)
    gradients, _ = clip.update(gradients, optax.EmptyState(), train_state.params)

  # Adam multiplies floats by whole counts, which a strict JAX refuses
  with jax.numpy_dtype_promotion('standard'):
    updates, opt_state = optimizer.update(gradients, train_state.opt_state, train_state.params)
  params = optax.apply_updates(train_state.params, updates)
  average = train_state.average
  if ema_decay is not None:
    if average is None:
      raise ValueError('average: found None, expected init_train_state(…, with_average=True)')
    new = {'params': params, _STATISTICS: batch_stats}
    average = jax.tree.map(lambda old, new: old + (1 - ema_decay) * (new - old), average, new)
  next_state = dataclasses.replace(
    train_state,
    step=train_state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    average=average,
  )
  return next_state, metrics


def eval_step(
  variables: Mapping[str, PyTree],
  batch: Batch,
  *,
  apply_fn: Callable[..., Any],
  axis_name: str | tuple[str, ...] | None = None,
) -> dict[str, Int32[Array, '']]:
  """How many examples of a batch are answered right.

  Args:
    variables: of the network as it is to be judged: for a compressed one, compressed.
    batch: {'image', 'label'}, and 'is_example' where it was padded to a size (`pad_batch`).
    apply_fn: called as `apply_fn(variables, images, train=False)`.
    axis_name: of the `pmap` or `shard_map` around, over which counts are added up.

  Returns:
    {'top1', 'top5', 'examples'}: whole numbers, to be added up over batches.  A label is among the
    first k if fewer than k other logits are as large (an equal one counts where its class comes
    first); logits that are NaN answer nothing.
  """
  rank = _rank(apply_fn(variables, batch['image'], train=False), batch['label'])
  is_example = batch.get('is_example', jnp.ones(rank.shape, bool))
  count = lambda what: jnp.sum((what & is_example).astype(jnp.int32))
  counts = {'top1': count(rank < 1), 'top5': count(rank < 5), 'examples': count(rank >= 0)}
  return counts if axis_name is None else lax.psum(counts, axis_name)


def pmap_train_step(
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  *,
  devices: Sequence[jax.Device] | None = None,
  **options: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` on every device, the default.

  Args:
    apply_fn, optimizer: as for `train_step`.
    devices: by default all, of all processes.
    **options: of `train_step`.

  Returns:
    A function (train_state, compression_state, batch, teacher=None) -> (train_state, metrics).
    States and metrics are replicated; the batch is this process's share, host arrays of
    [batch, …], and is cut among its devices.  The train state that is passed in is donated: its
    buffers are gone afterwards.

  Raises:
    ValueError: when called, the devices do not divide the batch.
  """
  function = functools.partial(
    train_step, apply_fn=apply_fn, optimizer=optimizer, axis_name=AXIS, **options
  )
  mapped = jax.pmap(
    function,
    axis_name=AXIS,
    in_axes=(None, None, 0, None),
    out_axes=None,
    devices=devices,
    donate_argnums=0,
  )
  local = _local_count(devices)

  def step(
    train_state: TrainState,
    compression_state: CompressionState | None,
    batch: Batch,
    teacher: Mapping[str, PyTree] | None = None,
  ) -> tuple[TrainState, Metrics]:
    return mapped(train_state, compression_state, split_batch(batch, local), teacher)

  return step


def shard_map_train_step(
  mesh: Mesh, apply_fn: Callable[..., Any], optimizer: optax.GradientTransformation, **options: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The same as `pmap_train_step` by `jax.jit` and `jax.shard_map`, over all axes of a mesh."""
  axes = tuple(mesh.axis_names)
  function = functools.partial(
    train_step, apply_fn=apply_fn, optimizer=optimizer, axis_name=axes, **options
  )
  # without the check of varying axes, under which the gradient by replicated weights would be a
  # sum over devices already: one function serves pmap and shard_map
  mapped = jax.jit(
    jax.shard_map(
      function, mesh=mesh, in_specs=(P(), P(), P(axes), P()), out_specs=P(), check_vma=False
    ),
    donate_argnums=0,
  )

  def step(
    train_state: TrainState,
    compression_state: CompressionState | None,
    batch: Batch,
    teacher: Mapping[str, PyTree] | None = None,
  ) -> tuple[TrainState, Metrics]:
    return mapped(train_state, compression_state, shard_batch(batch, mesh), teacher)

  return step


def sharded_train_step(
  mesh: Mesh,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  *,
  data_axes: str | tuple[str, ...] = 'data',
  **options: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` on weights that are themselves laid over a mesh, data x model.

  XLA cuts up the one step for the whole batch, so BatchNorm normalises by the whole batch.  The
  masks lie as the weights do (`opq_jax.init_state`), compressing is local to every shard, and the
  next state lies as the one that was given: no kernel is gathered but where the network's own
  products ask for it.  Results are those of one device up to the order of the sums.

  Args:
    mesh: over which `train_state.params` is laid, by `NamedSharding`s.
    apply_fn, optimizer: as for `train_step`.
    data_axes: the axes of the mesh that cut the batch.
    **options: of `train_step`.

  Returns:
    A function (train_state, compression_state, batch, teacher=None) -> (train_state, metrics).
    Leaves of the state that lie elsewhere (counters, keys) are replicated.  The batch is this
    process's share, host arrays.  The train state that is passed in is donated.
  """
  function = functools.partial(train_step, apply_fn=apply_fn, optimizer=optimizer, **options)
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(data_axes))

  def placed(leaf: Array) -> NamedSharding:
    sharding = leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh == mesh else whole

  @functools.lru_cache(maxsize=1)
  def compiled(structure: Any, leaves: tuple[NamedSharding, ...]) -> Callable[..., Any]:
    shardings = jax.tree.unflatten(structure, leaves)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, whole))

  def step(
    train_state: TrainState,
    compression_state: CompressionState | None,
    batch: Batch,
    teacher: Mapping[str, PyTree] | None = None,
  ) -> tuple[TrainState, Metrics]:
    leaves, structure = jax.tree.flatten(jax.tree.map(placed, train_state))
    train_state = jax.device_put(train_state, jax.tree.unflatten(structure, leaves))
    batch = {
      name: jax.make_array_from_process_local_data(rows, np.asarray(leaf))
      for name, leaf in batch.items()
    }
    return compiled(structure, tuple(leaves))(train_state, compression_state, batch, teacher)

  return step


def pmap_eval_step(
  apply_fn: Callable[..., Any], *, devices: Sequence[jax.Device] | None = None
) -> Callable[[Mapping[str, PyTree], Batch], dict[str, Int32[Array, '']]]:
  """`eval_step` on every device: (variables, this process's share of a batch) -> counts of all."""
  function = functools.partial(eval_step, apply_fn=apply_fn, axis_name=AXIS)
  mapped = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
  local = _local_count(devices)
  return lambda variables, batch: mapped(variables, split_batch(batch, local))


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """`tree` whole on every device: as a step returns it, so that it is compiled once.

  Args:
    tree: arrays, keys of random numbers included.
    devices: by default those of this process, as `pmap_train_step` returns its states;
      `shard_map_train_step` wants all of its mesh, `mesh.devices.flat`.  Where some are another
      process's, every process must call this with the same tree; that is not checked.
  """
  sharding = replicated(devices)
  if sharding.is_fully_addressable and all(
    leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)
  ):
    return jax.device_put(tree, sharding)

  def put(leaf: Any) -> Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = put(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(put, tree)


def replicated(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
  """The sharding of what is whole on every device, by default on those of this process."""
  mesh = Mesh(np.array(list(jax.local_devices() if devices is None else devices)), (AXIS,))
  return NamedSharding(mesh, P())


def split_batch(batch: Batch, count: int) -> dict[str, Any]:
  """[batch, …] -> [count, batch / count, …], in order.

  Raises:
    ValueError: the count does not divide the batch.

  >>> split_batch({'label': np.arange(6)}, 2)['label'].tolist()
  [[0, 1, 2], [3, 4, 5]]
  """
  return {name: _split(leaf, count, 'devices') for name, leaf in batch.items()}


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, Array]:
  """This process's share of a batch as global arrays over all axes of a mesh.

  Raises:
    ValueError: the devices of the mesh do not divide the batch.
  """
  sharding = NamedSharding(mesh, P(tuple(mesh.axis_names)))
  count = len(mesh.local_devices)
  for leaf in batch.values():
    _check_divides(leaf, count, 'devices')
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
    for name, leaf in batch.items()
  }


def pad_batch(batch: Batch, size: int) -> dict[str, np.ndarray]:
  """A last, smaller batch with zeros up to `size`, and `is_example` to tell them apart.

  >>> padded = pad_batch({'label': np.array([3, 4])}, 3)
  >>> padded['label'].tolist(), padded['is_example'].tolist()
  ([3, 4, 0], [True, True, False])
  """
  count = len(batch['label'])
  if count > size:
    raise ValueError(f'batch: found {count} examples, expected at most {size}')
  pad = lambda leaf: np.pad(leaf, [(0, size - count)] + [(0, 0)] * (np.ndim(leaf) - 1))
  padded = {name: pad(leaf) for name, leaf in batch.items()}
  return {**padded, 'is_example': np.arange(size) < count}


def network(
  train_state: TrainState, compression_state: CompressionState, *, averaged: bool = False
) -> tuple[dict[str, PyTree], CompressionState]:
  """The whole compressed network, as `opq_jax.save` takes it.

  Args:
    train_state: with the latent weights.
    compression_state: of `train_state.params`.
    averaged: take the average of weights and statistics over the steps.

  Returns:
    Variables with compressed params, and the state of that larger tree, in which running
    statistics pass through.

  Raises:
    ValueError: there is no average, or the state was made for another tree.
  """
  if averaged and train_state.average is None:
    raise ValueError('average: found None, expected init_train_state(…, with_average=True)')
  tree = {'params': train_state.params, _STATISTICS: train_state.batch_stats}
  tree = train_state.average if averaged else tree
  variables = _variables(apply_compression(tree['params'], compression_state), tree[_STATISTICS])
  nothing = jax.tree.map(lambda _: None, tree[_STATISTICS])
  return variables, CompressionState(_variables(compression_state.tree, nothing))


def _variables(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
  """Flax's collections; a network without BatchNorm has but one."""
  return {'params': params, **({_STATISTICS: batch_stats} if batch_stats else {})}


def _rank(
  logits: Float[Array, 'batch classes'], labels: Int[Array, ' batch']
) -> Int32[Array, ' batch']:
  """How many classes come before the label's."""
  target = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  is_later = jnp.arange(logits.shape[-1])[None] >= labels[:, None]
  # by what is surely behind, so that NaN is before everything
  is_behind: Bool[Array, 'batch classes'] = (logits < target) | ((logits == target) & is_later)
  return jnp.sum((~is_behind).astype(jnp.int32), axis=-1)


def _split(leaf: Any, count: int, what: str) -> Any:
  _check_divides(leaf, count, what)
  return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])


def _check_divides(leaf: Any, count: int, what: str) -> None:
  if leaf.shape[0] % count:
    raise ValueError(
      f'batch: found {leaf.shape[0]} examples, expected a multiple of {count} {what}'
    )


def _local_count(devices: Sequence[jax.Device] | None) -> int:
  """How many of the devices are this process's."""
  everyone = jax.devices() if devices is None else devices
  return sum(device.process_index == jax.process_index() for device in everyone)
