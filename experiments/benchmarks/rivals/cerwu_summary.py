"""Ratios of bytes from the rows of `against_cerwu`: our curves against the hull of its sweep."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.rivals.cerwu_jobs import CERWU
from experiments.benchmarks.rivals.jobs import FEEDBACK, HALVES, IMAGES, LAYERS, SCALAR
from experiments.benchmarks.rivals.nncodec_summary import (
  Point,
  geometric_mean,
  points,
  score_at,
  size_at,
)
from experiments.benchmarks.rivals.study import UNLABELLED
from opq_jax.report import plots

RESULTS = harness.RESULTS.parent / 'against_cerwu'
SIZES = 8, 10, 12, 14, 16, 20, 24  # times smaller than float32, of CERWU's files
THEIRS = CERWU + HALVES
# divergence of files that are left out: half of the answers change, and a line from such a file to
# a good one would pass below all files between
USELESS = 1.0
OURS = tuple(method + IMAGES + HALVES for method in (SCALAR, FEEDBACK, LAYERS))


def hull(points: Sequence[Point]) -> list[Point]:
  """Returns the upper hull of scores over the logarithms of sizes, up to the best score.

  Of divergences, whose scores are negative logarithms, it is the lower convex hull: the best that a
  sweep reaches, and what mixtures of two settings would reach between.

  >>> sweep = [Point(100, 0.0), Point(200, 0.4), Point(200, 0.9), Point(400, 1.0), Point(800, 0.8)]
  >>> [point.size for point in hull(sweep)]
  [100, 200, 400]
  """
  chain: list[Point] = []
  for point in sorted(points, key=lambda point: (point.size, -point.score)):
    if chain and point.score <= max(earlier.score for earlier in chain):
      continue
    while len(chain) > 1 and _slope(*chain[-2:]) <= _slope(chain[-1], point):
      chain.pop()
    chain.append(point)
  return chain


def _slope(one: Point, other: Point) -> float:
  """Returns the score gained for each factor of e in size."""
  return (other.score - one.score) / float(np.log(other.size / one.size))


def summary(rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Returns our bytes over CERWU's at equal divergence: a line for each of its sizes, and means."""
  lines: list[dict[str, object]] = []
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    theirs = hull(
      [
        point
        for point in points(found, THEIRS, 'images', 'divergence')
        if point.score > -np.log(USELESS)
      ]
    )
    ours = {method: points(found, method, 'images', 'divergence') for method in OURS}
    several: dict[str, list[float]] = {
      method: [] for method, curve in ours.items() if len(curve) > 1
    }
    for rate in SIZES:
      size = float(whole['file_bytes']) / rate
      score = score_at(theirs, size)
      if score is None:
        continue
      line: dict[str, object] = {'network': name, 'CERWU, times smaller': rate}
      line['CERWU, divergence'] = f'{np.exp(-score):.4f}'
      for method in several:
        mine = size_at(ours[method], score)
        if mine is not None:
          several[method].append(mine / size)
        line[_title(method)] = 'not reached' if mine is None else round(mine / size, 3)
      lines.append(line)
    if any(several.values()):
      line = {'network': name, 'CERWU, times smaller': 'mean (sizes)', 'CERWU, divergence': ''}
      for method, ratios in several.items():
        cell = f'{geometric_mean(ratios):.3f} ({len(ratios)})' if ratios else 'not reached'
        line[_title(method)] = cell
      lines.append(line)
  return lines


def _title(method: str) -> str:
  return method.removesuffix(IMAGES + HALVES)


def draw(rows: Sequence[Mapping[str, str]]) -> None:
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    curves = []
    for method in (THEIRS, *OURS):
      curve = points(found, method, 'images')
      curve = hull(curve) if method == THEIRS else sorted(curve)
      if curve:
        sizes, tops = zip(*curve, strict=True)
        curves.append(plots.Curve(_title(method).removesuffix(HALVES), sizes, tops))
    title = f'{name} ({int(whole["file_bytes"]) / 1e6:.1f} MB as float32), from images'
    path = RESULTS / f'{name}.png'
    plots.accuracy_over_size(path, curves, baseline=float(whole['top1']), title=title)


def report(rows: Sequence[Mapping[str, str]], command: str) -> None:
  draw(rows)
  record: dict[str, Any] = {'command': command, 'tables': 'results.csv', 'unlabelled': UNLABELLED}
  commits = {'Conzel/cerwu': '65f7094', 'Conzel/nncodec': '8b43bbc'}
  versions = {'opq_jax': opq_jax.__version__, 'jax': jax.__version__, **commits}
  (RESULTS / 'run.json').write_text(json.dumps(record | {'versions': versions}, indent=1) + '\n')
  harness.report('against_cerwu', 'ours over CERWU', command, summary(rows))
