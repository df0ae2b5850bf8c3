"""Checkpoints of a finetuning run, from which a killed run continues with the same result.

    DIRECTORY/compression/   the compression state, written once, before the first step
    DIRECTORY/<step>/train   the train state after that many steps
    DIRECTORY/<step>/data    the position in the stream of batches, as JSON

Orbax writes each folder under another name and renames it, so that a folder is complete or absent.
Train states are written in the background while training continues.
"""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opq_jax.compression import CompressionState
from opq_jax.core import trees
from opq_jax.core.extras import require
from opq_jax.core.trees import PyTree
from opq_jax.finetuning.parallel import replicate, replicated
from opq_jax.finetuning.training import TrainState

_COMPRESSION = 'compression'


class Restored(NamedTuple):
  """A restored train state and the position in the stream of batches."""

  train_state: TrainState
  position: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for writes in progress at its end.

  Args:
    directory: created if it does not exist.
    keep: number of train states to keep; older ones are deleted.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
    self._orbax = ocp = require('orbax.checkpoint', 'data', f'{directory}: checkpoints')
    self._directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=options,
      item_handlers={'train': ocp.StandardCheckpointHandler(), 'data': ocp.JsonCheckpointHandler()},
    )
    self._is_own = False  # whether this object has restored or written the latest step

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for writes in progress."""
    self._manager.close()

  def save_compression(self, state: CompressionState) -> None:
    """Writes the compression state of the run; it is on disk when this returns.

    Raises:
      ValueError: it has been written already.
    """
    path = self._directory / _COMPRESSION
    if path.exists():
      raise ValueError(f'{path}: found a compression state, expected none: it never changes')
    with self._orbax.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, _for_orbax(state))

  def restore_compression(
    self, like: CompressionState, devices: Sequence[jax.Device] | None = None
  ) -> CompressionState | None:
    """Returns the compression state of this run, bit for bit; None if it has not been written.

    Args:
      like: a state of the same shapes and dtypes, such as `jax.eval_shape` of
        `opq_jax.init_state`; where kinds are laid over a mesh, those of the result are too.
      devices: of the arrays, as for `opq_jax.finetuning.replicate`, where none is laid over a mesh.

    Raises:
      ValueError: an array has another shape or dtype than in `like`.
    """
    path = self._directory / _COMPRESSION
    if not path.exists():
      return None
    with self._orbax.StandardCheckpointer() as checkpointer:
      _check_arrays(path, checkpointer.metadata(path).item_metadata, like)
      return _placed(checkpointer.restore(path, _abstract(like)), like, devices)

  def save(self, train_state: TrainState, position: dict[str, Any], *, wait: bool = False) -> None:
    """Writes the state after `train_state.step` steps, unless the folder has this step already.

    Args:
      train_state: its arrays are copied before this returns, and may be donated afterwards.  Those
        that are laid over a mesh are written shard by shard, by the process that has the shard.
      position: `get_state()` of the stream of batches.
      wait: True to return when the state is on disk.

    Raises:
      ValueError: the folder has a checkpoint of a later step, or of another run that was not
        restored: Orbax would write nothing, and say nothing.
    """
    ocp = self._orbax
    step, latest = int(train_state.step), self._manager.latest_step()
    if latest is not None and not self._is_own:
      raise ValueError(
        f'{self._directory}: found step {latest} of an earlier run, expected an empty folder, or '
        'that it is restored first'
      )
    if latest is not None and step < latest:
      raise ValueError(f'{self._directory}: found step {latest}, expected none later than {step}')
    self._is_own = True
    train_state = _for_orbax(train_state)
    if step != latest:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          train=ocp.args.StandardSave(train_state), data=ocp.args.JsonSave(position)
        ),
      )
    if wait:
      self._manager.wait_until_finished()

  def restore(
    self, like: TrainState, devices: Sequence[jax.Device] | None = None
  ) -> Restored | None:
    """Returns the latest train state, bit for bit, and its position; None if there is none.

    Args:
      like: a state of the same shapes and dtypes, such as the one before the first step.  Where
        arrays are laid over a mesh, those of the result are laid over it too, and no process reads
        more than its own shards; the mesh need not be that of the run that wrote the checkpoint.
      devices: of the arrays, as for `opq_jax.finetuning.replicate`, where none is laid over a mesh;
        their number need not be that of the devices that wrote the checkpoint.

    Raises:
      ValueError: an array has another shape or dtype than in `like`.
    """
    ocp = self._orbax
    step = self._manager.latest_step()
    if step is None:
      return None
    _check_arrays(self._directory / str(step), self._manager.item_metadata(step)['train'], like)
    self._is_own = True
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        train=ocp.args.StandardRestore(_abstract(like)), data=ocp.args.JsonRestore()
      ),
    )
    return Restored(_placed(restored['train'], like, devices), restored['data'])


class StopRequest:
  """Records SIGTERM, which schedulers send some time before they kill.

      with StopRequest() as stop:
        while not stop.is_requested(step):
          …

  The signal only sets a flag, so that the current step and writes in progress can finish.
  """

  def __init__(self) -> None:
    self._event = threading.Event()

  def __enter__(self) -> Self:
    # of many processes, JAX handles the signal itself; a handler of ours would replace its own
    self._listens = jax.process_count() == 1
    if self._listens:
      self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *_: object) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._previous)

  def _request(self, number: int, frame: FrameType | None) -> None:
    self._event.set()

  def is_requested(self, step: int) -> bool:
    """Returns whether to stop after this step; many processes agree on the same step."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      return bool(multihost_utils.reached_preemption_sync_point(step))
    return self._event.is_set()


def _check_arrays(path: Path, metadata: Any, like: PyTree) -> None:
  """Raises ValueError where an array on disk is not as in `like`: Orbax would convert it."""
  on_disk = trees.named_leaves(getattr(metadata, 'tree', metadata))
  lines = []
  for name, leaf in trees.named_leaves(like).items():
    # random keys are stored as their numbers
    if name not in on_disk or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
      continue
    found, expected = ((jnp.dtype(x.dtype), tuple(x.shape)) for x in (on_disk[name], leaf))
    if found != expected:
      lines.append(
        f'{name}: found {found[0]} of shape {found[1]}, expected {expected[0]} of shape '
        f'{expected[1]}'
      )
  if lines:
    raise ValueError(f'{path}: ' + '\n  '.join(lines))


def _is_laid(leaf: Any) -> bool:
  """Returns whether an array, or a shape, is cut into shards."""
  sharding = getattr(leaf, 'sharding', None)
  return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated


def _mesh_of(tree: PyTree) -> Mesh | None:
  """Returns the mesh over which some arrays of a tree are laid; None where none is."""
  meshes = (leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_laid(leaf))
  return next(meshes, None)


def _for_orbax(tree: PyTree) -> PyTree:
  """Copies a tree to where Orbax writes it from: all devices of many processes, or one device.

  Of an array on several devices of one process, Orbax would write as many slices, and compile a
  program for each; those that are cut into shards anyway stay where they are.
  """
  if _mesh_of(tree) is not None:
    # the next step may be given the buffers themselves, as donations
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(tree)
  if jax.process_count() > 1:
    return replicate(tree, jax.devices())
  # may_alias=False: the next step may be given the buffers themselves, as donations
  return jax.device_put(tree, jax.devices()[0], may_alias=False)


def _abstract(tree: PyTree) -> PyTree:
  """Returns shapes and dtypes of a tree, laid over its mesh, or replicated over all devices."""
  mesh = _mesh_of(tree)
  others = replicated(jax.devices()) if mesh is None else NamedSharding(mesh, PartitionSpec())

  def shape(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if _is_laid(leaf) else others
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(shape, tree)


def _placed(tree: PyTree, like: PyTree, devices: Sequence[jax.Device] | None) -> PyTree:
  """Returns a restored tree where it belongs: on its mesh, or replicated over devices."""
  return tree if _mesh_of(like) is not None else replicate(tree, devices)
