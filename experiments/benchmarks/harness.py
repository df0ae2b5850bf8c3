"""Shared by the benchmarks: timing in turn, random trees, and the report of rows."""

import ctypes
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent.parent / 'results' / 'benchmarks'


def in_turn(
  functions: dict[str, Callable[[], object]],
  rounds: int = 15,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
  """Returns median seconds of functions run in turn, so that a slow moment affects all alike."""
  for function in functions.values():
    jax.block_until_ready(function())
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      start = clock()
      jax.block_until_ready(function())
      seconds[name].append(clock() - start)
  return {name: statistics.median(values) for name, values in seconds.items()}


def keep_memory() -> None:
  """Makes malloc keep freed memory, so that PyTorch's activations do not pay for new pages.

  Otherwise its time would depend on the networks that the process has run before.
  """
  trim_threshold, mmap_threshold = -1, -3  # of malloc.h
  for parameter in (trim_threshold, mmap_threshold):
    ctypes.CDLL('libc.so.6').mallopt(parameter, 1 << 30)


def resnet50_shapes() -> list[tuple[int, ...]]:
  """Returns the shapes of ResNet-50's kernels: 54 leaves, 25.5 million weights."""
  shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
  features = 64
  for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    for block in range(blocks):
      if block == 0:
        shapes.append((1, 1, features, 4 * width))
      shapes += [(1, 1, features, width), (3, 3, width, width), (1, 1, width, 4 * width)]
      features = 4 * width
  return [*shapes, (2048, 1000)]


def random_tree(shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, jax.Array]:
  """Draws float32 Laplace weights of a trained network's scale, 1 / sqrt(fan in)."""
  rng = np.random.default_rng(seed)
  return {
    f'layer_{i:02d}/kernel': jax.numpy.asarray(
      rng.laplace(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))
    )
    for i, shape in enumerate(shapes)
  }


def with_earlier(
  name: str, rows: list[dict[str, object]], columns: Sequence[str]
) -> list[dict[str, object]]:
  """Returns the rows of an earlier run that was not of the same cases, and then these.

  Args:
    name: of the results.
    rows: of this run.
    columns: whose values name a case.
  """
  path = RESULTS / f'{name}.json'
  earlier = json.loads(path.read_text())['rows'] if path.exists() else []
  case = lambda row: tuple(row[column] for column in columns)
  cases = set(map(case, rows))
  return [row for row in earlier if case(row) not in cases] + rows


def report(name: str, title: str, command: str, rows: list[dict[str, object]]) -> None:
  """Prints rows as a table, and writes them with their command for `experiments.make_results`."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  table = Table(*columns, title=title)
  for row in rows:
    table.add_row(*(str(row.get(column, '')) for column in columns))
  Console().print(table)
  RESULTS.mkdir(parents=True, exist_ok=True)
  document = {'command': command, 'rows': rows}
  (RESULTS / f'{name}.json').write_text(json.dumps(document, indent=1) + '\n')
