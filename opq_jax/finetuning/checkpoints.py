"""What training keeps on disk, so that a run that is killed ends as if it had not been.

    DIRECTORY/compression/   the compression state: once, before the first step
    DIRECTORY/<step>/train   the train state after that many steps
    DIRECTORY/<step>/data    the position in the stream of batches, as JSON

Orbax writes each folder beside its place and moves it there, so a folder is whole or not there.
Train states are written in the background while training goes on.
"""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from opq_jax.compression.codes import CompressionState
from opq_jax.core.trees import PyTree
from opq_jax.finetuning.training import TrainState, replicate, replicated

_COMPRESSION = 'compression'


class Restored(NamedTuple):
  """What `Checkpoints.restore` found: the train state and the stream's position."""

  train_state: TrainState
  position: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; a context manager, which waits for what is being written.

  Args:
    directory: made if it is missing.
    keep: how many train states stay; older ones are deleted.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
    self._directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, item_names=('train', 'data')
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()

  def save_compression(self, state: CompressionState) -> None:
    """Writes the compression state, once and for all; it is on disk when this returns.

    Raises:
      ValueError: there is one already.
    """
    path = self._directory / _COMPRESSION
    if path.exists():
      raise ValueError(f'{path}: found a compression state, expected none: it never changes')
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, _for_orbax(state))

  def restore_compression(
    self, like: CompressionState, devices: Sequence[jax.Device] | None = None
  ) -> CompressionState | None:
    """The compression state of this run, bit for bit; None if it has not been written.

    Args:
      like: a state of the same shapes and dtypes, as `jax.eval_shape` makes it of
        `opq_jax.init_state`.
      devices: where the arrays are to be, as for `opq_jax.finetuning.training.replicate`.
    """
    path = self._directory / _COMPRESSION
    if not path.exists():
      return None
    with ocp.StandardCheckpointer() as checkpointer:
      return replicate(checkpointer.restore(path, _abstract(like)), devices)

  def save(self, train_state: TrainState, position: dict[str, Any], *, wait: bool = False) -> None:
    """Writes the state after `train_state.step` steps; nothing if it is there already.

    Args:
      train_state: its arrays are copied before this returns, and may then be donated.
      position: `get_state()` of the stream of batches.
      wait: until it is on disk.
    """
    step = int(train_state.step)
    train_state = _for_orbax(train_state)
    if step not in self._manager.all_steps():
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
    """The latest train state, bit for bit, and the position; None if there is none.

    Args:
      like: a state of the same shapes and dtypes, such as the one before the first step.
      devices: where the arrays are to be, however many wrote them; as for
        `opq_jax.finetuning.training.replicate`.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        train=ocp.args.StandardRestore(_abstract(like)), data=ocp.args.JsonRestore()
      ),
    )
    return Restored(replicate(found['train'], devices), found['data'])


class StopRequest:
  """Whether SIGTERM has come: schedulers send it some time before they kill.

      with StopRequest() as stop:
        while not stop.is_requested(step):
          …

  The signal only sets a flag, so that a step and what is being written end in order.
  """

  def __init__(self) -> None:
    self._event = threading.Event()

  def __enter__(self) -> Self:
    # with many processes, JAX itself listens, and a handler of ours would take its place
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
    """Whether to stop after this step; of many processes, all agree on the step."""
    if jax.process_count() > 1:
      return bool(multihost_utils.reached_preemption_sync_point(step))
    return self._event.is_set()


def _for_orbax(tree: PyTree) -> PyTree:
  """Of many processes, Orbax writes what is on the devices of all; of one, one copy is enough.

  It would cut what several devices have into as many slices, and compile a program for each.
  """
  if jax.process_count() > 1:
    return replicate(tree, jax.devices())
  # not the buffers themselves, which the next step may be given to keep
  return jax.device_put(tree, jax.devices()[0], may_alias=False)


def _abstract(tree: PyTree) -> PyTree:
  sharding = replicated(jax.devices())
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )
