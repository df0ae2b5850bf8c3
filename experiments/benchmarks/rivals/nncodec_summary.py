"""Ratios of bytes from the rows of `against_nncodec`: curves of accuracy over bytes compared."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.rivals.jobs import (
  COARSER,
  FEEDBACK,
  HALVES,
  IMAGES,
  INFERENCE,
  KERNELS,
  LAYERS,
  OURS,
  RECIPE,
  SHIPPED,
  TRELLIS,
  TUNED,
)
from experiments.benchmarks.rivals.study import UNLABELLED
from opq_jax.report import plots

RESULTS = harness.RESULTS.parent / 'against_nncodec'
SIZES = 8, 10, 12, 14, 16  # times smaller than float32, of NNCodec's files
_TINY = 1e-9  # what arithmetic takes off the ends of a curve
_METHODS = OURS, TRELLIS, FEEDBACK, LAYERS
# of our files, the correction, and the leaves that NNCodec's files of the same correction hold
_WITHOUT_DATA = tuple(
  (method + leaves, 'noise' if method in (OURS, TRELLIS) else 'synthetic', theirs)
  for leaves, theirs in (('', ''), (HALVES, ''), (INFERENCE, INFERENCE))
  for method in _METHODS
)
_FROM_IMAGES = tuple(
  (method + IMAGES + leaves, 'images', theirs)
  for leaves, theirs in (('', ''), (HALVES, ''), (INFERENCE, INFERENCE))
  for method in (FEEDBACK, LAYERS)
)


class Point(NamedTuple):
  """Size and score of a file."""

  size: float
  score: float


def monotone(points: Sequence[Point]) -> list[Point]:
  """Returns points of rising size, with falling neighbours pooled until scores rise too.

  Least squares among rising curves: the noise of a sample of images neither helps nor hurts.

  >>> curve = monotone([Point(100, 0.8), Point(50, 0.5), Point(200, 0.7)])
  >>> [(round(point.size, 2), round(point.score, 2)) for point in curve]
  [(50.0, 0.5), (141.42, 0.75)]
  """
  pools: list[list[Point]] = []
  mean = lambda pool: sum(point.score for point in pool) / len(pool)
  for point in sorted(points):
    pools.append([point])
    while len(pools) > 1 and mean(pools[-2]) >= mean(pools[-1]):
      last = pools.pop()
      pools[-1] += last
  return [Point(geometric_mean([point.size for point in pool]), mean(pool)) for pool in pools]


def size_at(points: Sequence[Point], score: float) -> float | None:
  """Returns the size at which a curve has a score, log-linear between points; None outside.

  >>> size_at([Point(100, 0.5), Point(400, 0.7)], 0.6)
  200.0
  >>> size_at([Point(100, 0.5), Point(400, 0.7)], 0.8) is None
  True
  """
  curve = monotone(points)
  if not curve or not curve[0].score - _TINY <= score <= curve[-1].score + _TINY:
    return None
  sizes = [np.log(point.size) for point in curve]
  return round(float(np.exp(np.interp(score, [point.score for point in curve], sizes))), 6)


def score_at(points: Sequence[Point], size: float) -> float | None:
  """Returns the score of a curve at a size; None outside its points.

  >>> round(score_at([Point(100, 0.5), Point(400, 0.7)], 200), 6)
  0.6
  """
  curve = monotone(points)
  sizes = [np.log(point.size) for point in curve]
  if not curve or not sizes[0] - _TINY <= np.log(size) <= sizes[-1] + _TINY:
    return None
  return float(np.interp(np.log(size), sizes, [point.score for point in curve]))


def ratios(
  ours: Sequence[Point], theirs: Sequence[Sequence[Point]], sizes: Sequence[float]
) -> list[float]:
  """Returns our size over theirs at their score for each of these sizes, where both have one.

  Args:
    ours: our curve.
    theirs: their curves, one a setting; at each size the best of them counts.
    sizes: their sizes at which the curves are compared.
  """
  found = []
  for size in sizes:
    scores = [score_at(curve, size) for curve in theirs]
    score = max((score for score in scores if score is not None), default=None)
    mine = None if score is None else size_at(ours, score)
    if mine is not None:
      found.append(mine / size)
  return found


def geometric_mean(values: Sequence[float]) -> float:
  return float(np.exp(np.mean(np.log(values))))


def points(
  rows: Sequence[Mapping[str, str]], method: str, correction: str, by: str = 'top1'
) -> list[Point]:
  """Returns the curve of a method; `divergence` is scored as its negative logarithm."""
  score = lambda row: -np.log(float(row[by])) if by == 'divergence' else float(row[by])
  chosen = [row for row in rows if (row['method'], row['correction']) == (method, correction)]
  return [Point(float(row['file_bytes']), float(score(row))) for row in chosen]


def summary(rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Returns the ratios for every network: our bytes and seconds over NNCodec's."""
  lines: list[dict[str, object]] = []
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    sizes = [float(whole['file_bytes']) / rate for rate in SIZES]

    for question, cases in (
      ('a: both corrected without data', _WITHOUT_DATA),
      ('b: unlabelled images', _FROM_IMAGES),
    ):
      for method, correction, leaves in cases:
        theirs_by = 'synthetic' if correction == 'images' else correction
        line: dict[str, object] = {'network': name, 'question': question}
        line['ours'] = f'{method}, {correction}'
        line['NNCodec'] = f'best settings{leaves}, {theirs_by}'
        for key, by in (('', 'divergence'), (' at equal top-1', 'top1')):
          ours = points(found, method, correction, by)
          theirs = [points(found, rival + leaves, theirs_by, by) for rival in (COARSER, TUNED)]
          several = ratios(ours, theirs, sizes)
          line[f'ratio{key}'] = round(geometric_mean(several), 3) if several else ''
          line[f'points{key}'] = len(several)
        if line['points'] or line['points at equal top-1']:
          lines.append(line)
    loss = float(whole['top1']) - 0.1
    for method, correction, *_ in _WITHOUT_DATA:
      mine, shipped = points(found, method, correction), points(found, SHIPPED, 'none')
      if mine and shipped:
        pair = size_at(mine, loss), size_at(shipped, loss)
        ratio = round(pair[0] / pair[1], 3) if pair[0] and pair[1] else ''
        line = {'network': name, 'question': 'c: loss of 10 points', 'ratio': ratio}
        lines.append(line | {'ours': f'{method}, {correction}', 'NNCodec': 'as it ships'})
    lines += errors(name, found)
    lines += seconds(name, found)
  return lines


def errors(name: str, rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Returns our bits over NNCodec's tuned ones at the squared error of our 1, 2 and 3 bits."""
  curve = [
    Point(float(row['bits_per_weight']), -np.log(float(row['squared_error'])))
    for row in rows
    if row['method'] == TUNED + KERNELS
  ]
  lines: list[dict[str, object]] = []
  for row in rows:
    if row['method'] not in (OURS + KERNELS, TRELLIS + KERNELS):
      continue
    bits = float(row['bits_per_weight'])
    theirs = bits_at(curve, -np.log(float(row['squared_error'])))
    if theirs:
      ratio = round(bits / theirs, 3)
      question = f'd: equal squared error, {bits_asked(row):g} bits'
      method = row['method'].removesuffix(KERNELS)
      line = {'network': name, 'question': question, 'ours': method, 'NNCodec': 'tuned'}
      lines.append({**line, 'ratio': ratio})
  return lines


def bits_asked(row: Mapping[str, str]) -> float:
  return float(row['setting'].removeprefix('bits='))


def bits_at(curve: Sequence[Point], score: float) -> float | None:
  """Returns the bits of an error, whose logarithm is nearly linear in them.

  >>> bits_at([Point(1.0, 2.0), Point(2.0, 4.0)], 3.0)
  1.5
  """
  bits, scores = zip(*sorted(curve), strict=True) if curve else ((), ())
  if not curve or not scores[0] <= score <= scores[-1]:
    return None
  return float(np.interp(score, scores, bits))


def seconds(name: str, rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Returns median seconds of files, and our first with its compilation, by the clock.

  The ratio is of the processor's seconds, which other programs disturb less; ours may be those of
  several cores.
  """

  def of(method: str, column: str) -> list[float]:
    corrections = ('none',) if method == SHIPPED else ('none', 'noise', 'synthetic')
    same = [row for row in rows if row['method'] == method and row['correction'] in corrections]
    # with the correction, which either side may have, only where there is no row without
    plain = [row for row in same if row['correction'] == 'none'] or same
    return [float(row[column]) for row in plain]

  lines: list[dict[str, object]] = []
  for what, method in (
    *(('encode', method) for method in (OURS, TRELLIS, FEEDBACK)),
    *(('decode', method) for method in (OURS, TRELLIS)),
  ):
    columns = f'{what}_seconds', f'{what}_processor'
    if not of(method, columns[0]) or not of(SHIPPED, columns[0]):
      continue
    clock, theirs = of(method, columns[0]), of(SHIPPED, columns[0])
    first = next(float(row[columns[0]]) for row in rows if row['method'] == method)
    ratio = float(np.median(of(method, columns[1])) / np.median(of(SHIPPED, columns[1])))
    line: dict[str, object] = {'network': name, 'question': f'e: seconds to {what}'}
    line |= {'ours': method, 'NNCodec': 'as it ships', 'ratio': round(ratio, 3)}
    line |= {'ours, s': round(float(np.median(clock)), 2), 'ours, first, s': round(first, 2)}
    lines.append(line | {'NNCodec, s': round(float(np.median(theirs)), 2)})
  return lines


def draw(rows: Sequence[Mapping[str, str]]) -> None:
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    curves = []
    for label, method, correction in (
      (OURS, OURS, 'noise'),
      (TRELLIS, TRELLIS, 'noise'),
      (FEEDBACK, FEEDBACK, 'synthetic'),
      (LAYERS, LAYERS, 'synthetic'),
      (LAYERS + IMAGES, LAYERS + IMAGES, 'images'),
      (COARSER, COARSER, 'noise'),
      (TUNED, TUNED, 'noise'),
      (RECIPE, RECIPE, 'noise'),
      (OURS, OURS, 'none'),
      (SHIPPED, SHIPPED, 'none'),
    ):
      curve = points(found, method, correction)
      if curve:
        sizes, tops = zip(*curve, strict=True)
        variant = 'BatchNorm not corrected' if correction == 'none' else ''
        curves.append(plots.Curve(label, sizes, tops, variant=variant))
    if curves:
      title = f'{name} ({int(whole["file_bytes"]) / 1e6:.1f} MB as float32), one shot'
      path = RESULTS / f'{name}.png'
      plots.accuracy_over_size(path, curves, baseline=float(whole['top1']), title=title)


def report(rows: Sequence[Mapping[str, str]], command: str) -> None:
  draw(rows)
  record: dict[str, Any] = {'command': command, 'tables': 'results.csv', 'unlabelled': UNLABELLED}
  versions = {'opq_jax': opq_jax.__version__, 'jax': jax.__version__, 'nncodec': '2.1.3'}
  try:
    versions['qwix'] = importlib.metadata.version('qwix')
  except importlib.metadata.PackageNotFoundError:
    versions['qwix'] = 'not installed'
  (RESULTS / 'run.json').write_text(json.dumps(record | {'versions': versions}, indent=1) + '\n')
  harness.report('against_nncodec', 'ours over NNCodec', command, summary(rows))
