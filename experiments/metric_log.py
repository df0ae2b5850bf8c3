"""The metrics of a training run on disk: a line each, and curves for TensorBoard."""

import json
import pathlib
from typing import Any

import jax
from tensorboardX import SummaryWriter


class MetricLog:
  """Writes metrics.jsonl and TensorBoard's events, without steps that a killed run had not saved.

  Only the first of many processes writes.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._path = folder / 'metrics.jsonl'
    self._events: SummaryWriter | None = None

  def write(self, step: int, **values: Any) -> None:
    """Appends a line; numbers of kind 'train' and 'test' are curves of TensorBoard, kind/name."""
    if jax.process_index() != 0:
      return
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    with open(self._path, 'a') as file:
      file.write(json.dumps({'step': step, **rounded}) + '\n')
    if self._events is not None and values['kind'] in ('train', 'test'):
      for name, value in values.items():
        if name != 'kind':
          self._events.add_scalar(f'{values["kind"]}/{name}', value, step)
      self._events.flush()

  def records(self) -> list[dict[str, Any]]:
    """Returns all lines; the last line of a killed run may be incomplete and is dropped."""
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}')]

  def keep_until(self, step: int) -> None:
    """Deletes lines after `step`, and opens TensorBoard's events for those to come."""
    if jax.process_index() != 0:
      return
    kept = [record for record in self.records() if record['step'] <= step]
    self._path.write_text(''.join(json.dumps(record) + '\n' for record in kept))
    # TensorBoard ignores events of older files from the purged step on
    self._events = SummaryWriter(str(self._folder), purge_step=step + 1)

  def close(self) -> None:
    """Closes TensorBoard's events."""
    if self._events is not None:
      self._events.close()
