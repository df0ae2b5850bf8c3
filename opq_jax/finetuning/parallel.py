"""The one pure training step on many devices: by `pmap`, by `shard_map`, or on sharded weights.

`pmap_train_step` is the default.  `shard_map_train_step` computes the same, bit for bit, over the
axes of a mesh.  `sharded_train_step` is for weights that are themselves sharded over a mesh.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from opq_jax.compression import CompressionState
from opq_jax.core.trees import PyTree
from opq_jax.finetuning.batches import Batch, check_divides, split_batch
from opq_jax.finetuning.evaluation import eval_step
from opq_jax.finetuning.training import Metrics, TrainState, train_step

AXIS = 'devices'
"""Name of the axis over which `pmap` averages; a BatchNorm with this axis name is synchronised."""


def pmap_train_step(
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  *,
  devices: Sequence[jax.Device] | None = None,
  **options: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Maps `train_step` over devices by `jax.pmap`.

  Args:
    apply_fn, optimizer: as for `train_step`.
    devices: by default those of all processes.
    **options: of `train_step`.

  Returns:
    A function (train_state, compression_state, batch, teacher=None) -> (train_state, metrics).
    States and metrics are replicated.  The batch is this process's share, host arrays of
    [batch, …], and is split among its devices.  The train state that is passed in is donated: its
    buffers are deleted.  The function raises ValueError where the devices do not divide the batch.
  """
  function = functools.partial(
    train_step, apply_fn=apply_fn, optimizer=optimizer, axis_name=AXIS, **options
  )
  # the old state is donated: memory holds one copy of weights and optimizer, not two
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
  """Maps `train_step` over all axes of a mesh by `jax.jit` and `jax.shard_map`.

  Args:
    mesh: its devices split the batch.
    apply_fn, optimizer: as for `train_step`.
    **options: of `train_step`.

  Returns:
    A function like that of `pmap_train_step`, with the same result, bit for bit.
  """
  axes = tuple(mesh.axis_names)
  function = functools.partial(
    train_step, apply_fn=apply_fn, optimizer=optimizer, axis_name=axes, **options
  )
  # check_vma=False: with it, the gradient with respect to replicated weights would be summed over
  # devices already, and one function could not serve both pmap and shard_map
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
  """Compiles `train_step` for weights that are sharded over a mesh, data x model.

  XLA partitions the one step for the whole batch, so BatchNorm normalises by the whole batch.
  Masks have the sharding of their weights (`opq_jax.init_state`), compression is local to every
  shard, and the next state has the sharding of the one passed in: a kernel is gathered only where
  the network's own products require it.  Results equal those of one device up to the order of
  sums.

  Args:
    mesh: the mesh of the `NamedSharding`s of `train_state.params`.
    apply_fn, optimizer: as for `train_step`.
    data_axes: the axes of the mesh that split the batch.
    **options: of `train_step`.

  Returns:
    A function (train_state, compression_state, batch, teacher=None) -> (train_state, metrics).
    Leaves of the state with another sharding (counters, keys) are replicated.  The batch is this
    process's share, host arrays.  The train state that is passed in is donated.
  """
  function = functools.partial(train_step, apply_fn=apply_fn, optimizer=optimizer, **options)
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(data_axes))

  def placed(leaf: Array) -> NamedSharding:
    sharding = leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh == mesh else whole

  # one program, for the shardings of the states of one run; those of the next state are asked for,
  # since XLA might choose others and compile the next step anew
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
    # copies nothing but counters and keys of the first step: later states lie there already
    train_state = jax.tree.map(_put, train_state, jax.tree.unflatten(structure, leaves))
    batch = {
      name: jax.make_array_from_process_local_data(rows, np.asarray(leaf))
      for name, leaf in batch.items()
    }
    return compiled(structure, tuple(leaves))(train_state, compression_state, batch, teacher)

  return step


def pmap_eval_step(
  apply_fn: Callable[..., Any], *, devices: Sequence[jax.Device] | None = None
) -> Callable[[Mapping[str, PyTree], Batch], dict[str, Int32[Array, '']]]:
  """Maps `eval_step` over devices by `jax.pmap`.

  Args:
    apply_fn: as for `eval_step`.
    devices: by default those of all processes.

  Returns:
    A function (variables, this process's share of a batch) -> counts summed over all devices.
  """
  function = functools.partial(eval_step, apply_fn=apply_fn, axis_name=AXIS)
  mapped = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
  local = _local_count(devices)
  return lambda variables, batch: mapped(variables, split_batch(batch, local))


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """Copies a tree to every device, placed as a step returns it, so that a step compiles once.

  Args:
    tree: arrays, including random keys.
    devices: by default those of this process, as `pmap_train_step` returns its states;
      `shard_map_train_step` needs all of its mesh, `mesh.devices.flat`.  Where some belong to
      other processes, every process must call this with the same tree; this is not checked.
  """
  sharding = replicated(devices)
  if sharding.is_fully_addressable and all(
    leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)
  ):
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def _put(leaf: Any, sharding: NamedSharding) -> Array:
  """Lays an array that every process has, over devices that may belong to others too."""
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if sharding.is_fully_addressable and getattr(leaf, 'is_fully_addressable', True):
    return jax.device_put(leaf, sharding)
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    # a callback hands over NumPy arrays, which know no typed keys
    data = _put(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicated(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
  """Returns the replicated sharding over devices, by default those of this process."""
  mesh = Mesh(np.array(list(jax.local_devices() if devices is None else devices)), (AXIS,))
  return NamedSharding(mesh, P())


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, Array]:
  """Makes global arrays over all axes of a mesh from this process's share of a batch.

  Raises:
    ValueError: the devices of the mesh do not divide the batch.
  """
  sharding = NamedSharding(mesh, P(tuple(mesh.axis_names)))
  count = len(mesh.local_devices)
  for leaf in batch.values():
    check_divides(leaf, count, 'devices')
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
    for name, leaf in batch.items()
  }


def _local_count(devices: Sequence[jax.Device] | None) -> int:
  """Returns how many of the devices belong to this process."""
  all_devices = jax.devices() if devices is None else devices
  return sum(device.process_index == jax.process_index() for device in all_devices)
