"""The tables of results, as Markdown, from what the experiments wrote to experiments/results.

Each function returns one table.  `experiments.make_results` puts them into the documentation.
"""

import csv
import functools
import json
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.language_models import tables as language_tables
from experiments.benchmarks.rivals import jobs
from opq_jax import importers, models
from opq_jax.allocation import OBJECTIVES

RESULTS = pathlib.Path(__file__).parent / 'results'


def markdown(rows: list[dict[str, object]]) -> str:
  """Returns rows as a Markdown table, columns in order of first appearance."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  lines += [
    '| ' + ' | '.join(str(row.get(column, '')).replace('|', '\\|') for column in columns) + ' |'
    for row in rows
  ]
  return '\n'.join(lines)


def benchmark(name: str) -> str:
  """Returns the table of a benchmark, below its command."""
  document = json.loads((RESULTS / 'benchmarks' / f'{name}.json').read_text())
  return f'`{document["command"]}`\n\n{markdown(document["rows"])}'


def runtimes() -> str:
  """Returns the roads out of Python, a row for each network and runtime, from their benchmarks."""
  rows_of = lambda name: json.loads((RESULTS / 'benchmarks' / f'{name}.json').read_text())['rows']
  megabytes = lambda size: f'{size / 1e6:.2f}'
  rows: list[dict[str, object]] = []

  def add(network: str, road: str, floats: int, size: int, against: str, time: object) -> None:
    rows.append(
      {
        'network': network,
        'road': road,
        'floats, MB': megabytes(floats),
        'MB': megabytes(size),
        'times smaller': f'{floats / size:.2f}',
        'against JAX': against,
        'time, of floats in the same runtime': time,
      }
    )

  for row in rows_of('onnx_networks'):
    against = f'outputs within {row["largest difference to JAX"]} of {row["largest answer"]}'
    time = row['time, indices over floats']
    add(row['network'], '.onnx', row['floats, bytes'], row['small.onnx'], against, time)
    add(row['network'], '.onnx in .xz', row['floats, bytes'], row['in xz'], 'the same', 'the same')
  for row in rows_of('core_ml_packages'):
    roads = {'`--bits-per-weight 4`': '', '`--palette-bits 4`': ', palettes of 4 bits'}
    if row['targets'] in roads:
      sizes = row['float16 package, bytes'], row['exported package, bytes']
      against = f'weights bit-equal, {row["leaves bit-equal"]} leaves'
      road = f'.mlpackage, float16{roads[row["targets"]]}'
      add(row['network'], road, *sizes, against, 'not run: needs a Mac')
  for row in rows_of('demo_page'):
    size = row['.opq'] + row['program']
    against = f'top-1 of {row["same top-1"]} of {row["photographs"]} photographs, logits within '
    against += f'{row["largest difference"]} of {row["largest logit"]}'
    time = f'decode {row["decode, s"]} s, once'
    road = '.opq and program, onnxruntime-web'
    add(row['network'], road, row['floats'] + row['program'], size, against, time)
  for row in rows_of('stablehlo_programs'):
    size = row['codes in memory'] + row['program']
    against = f'outputs within {row["largest difference"]} of {row["largest output"]}'
    time = row['time, codes over floats']
    add(row['network'], '.stablehlo and codes', row['floats, bytes'], size, against, time)
  names = list(dict.fromkeys(row['network'] for row in rows))
  rows.sort(key=lambda row: names.index(row['network']))
  return markdown(rows)


def one_shot(name: str) -> str:
  """Returns top-1 of the default objective by file size, with and without the correction."""
  with open(RESULTS / name / 'results.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  return markdown(select(rows))


def select(rows: list[dict[str, str]]) -> list[dict[str, object]]:
  """Returns one line for each number of bits in results.csv of `experiments.one_shot`."""
  percent = lambda row, name: f'{100 * float(row[name]):.1f} %'
  interval = lambda row: (
    f'{percent(row, "top1")} ({percent(row, "top1_low")} to {percent(row, "top1_high")})'
  )
  chosen = [
    row
    for row in rows
    if row['objective'] in ('float32', OBJECTIVES[0]) and row.get('moments', 'none') == 'none'
  ]
  by_bits: dict[str, dict[str, dict[str, str]]] = {}
  for row in chosen:
    by_bits.setdefault(row['bits_asked'], {})[row['correction']] = row
  lines: list[dict[str, object]] = []
  for by_correction in by_bits.values():
    plain, corrected = by_correction['none'], by_correction.get('noise')
    best = corrected or plain
    lines.append(
      {
        'bits per weight': f'{float(best["bits_per_weight"]):.2f}',
        'pruned': percent(best, 'sparsity'),
        'file, bytes': f'{int(best["file_bytes"]):,}',
        'file, times smaller': f'{float(best["file_rate"]):.2f}',
        'top-1, uncorrected': percent(plain, 'top1'),
        'top-1, corrected (95 %)': interval(corrected) if corrected else '',
        'top-5, corrected': percent(corrected, 'top5') if corrected else percent(plain, 'top5'),
        'same answer as float32': percent(best, 'agreement'),
      }
    )
  return lines


def corrections() -> str:
  """Returns top-1 of every network, by the inputs of the BatchNorm correction."""
  lines: list[dict[str, object]] = []
  for folder in sorted(RESULTS.glob('one_shot_*')):
    with open(folder / 'results.csv', newline='') as file:
      rows = list(csv.DictReader(file))
    top_1 = lambda row: f'{100 * float(row["top1"]):.1f} %'
    chosen = [row for row in rows if row['objective'] == OBJECTIVES[0]]
    for bits in dict.fromkeys(row['bits_asked'] for row in chosen):
      same = [row for row in chosen if row['bits_asked'] == bits]
      by_correction = {
        row['correction']: row for row in same if row.get('moments', 'none') == 'none'
      }
      feedback = {
        f'feedback, {where}': top_1(row)
        for where, kind in (
          ('from synthetic images', 'synthetic'),
          ('from unlabelled images', 'images'),
        )
        for row in same
        if (row.get('moments', 'none'), row['correction']) == (kind, kind)
      }
      lines.append(
        {
          'network': folder.name.removeprefix('one_shot_'),
          'float32': top_1(rows[0]),
          'bits per weight': f'{float(bits):g}',
          'file, times smaller': f'{float(by_correction["images"]["file_rate"]):.1f}',
          'not corrected': top_1(by_correction['none']),
          # without BatchNorm there is nothing for noise to correct
          'from noise': top_1(by_correction['noise']) if 'noise' in by_correction else '',
          'from unlabelled images': top_1(by_correction['images']),
        }
        | feedback
      )
  return markdown(lines)


def against_nncodec() -> str:
  """Returns our bytes over NNCodec's: a line a question, a column a network."""
  document = json.loads((RESULTS / 'benchmarks' / 'against_nncodec.json').read_text())
  lines: dict[tuple[object, ...], dict[str, object]] = {}
  for row in document['rows']:
    key = tuple(row[name] for name in ('question', 'ours', 'NNCodec'))
    line = lines.setdefault(key, dict(zip(('', 'ours', 'NNCodec'), key, strict=True)))
    cell = row['ratio'] if row['ratio'] != '' else 'not reached'
    if 'ours, s' in row:
      cell = f'{cell} ({row["ours, s"]} s, {row["NNCodec, s"]} s)'
    elif row.get('points'):
      cell = f'{cell} ({row["points"]})'
    mark = ' *' if row['network'] in jobs.CHOSEN_ON else ''
    line[row['network'] + mark] = cell
  ordered = sorted(lines.values(), key=lambda line: str(line[''])[0])
  return f'`{document["command"]}`\n\n{markdown(ordered)}'


def against_cerwu() -> str:
  """Returns our bytes over CERWU's, networks on which our defaults were chosen marked."""
  document = json.loads((RESULTS / 'benchmarks' / 'against_cerwu.json').read_text())
  mark = lambda name: f'{name} *' if name in jobs.CHOSEN_ON else name
  rows = [row | {'network': mark(row['network'])} for row in document['rows']]
  return f'`{document["command"]}`\n\n{markdown(rows)}'


def finetune(folder: pathlib.Path) -> list[dict[str, object]]:
  """Returns a row for every command, averaged over its seeds."""
  groups: dict[tuple[object, ...], list[pathlib.Path]] = {}
  for path in sorted(folder.glob('*/results.json')):
    document = json.loads(path.read_text())
    config, after = document['config'], document['rows'][-1]
    # before contexts and files for inference, the same command made other files
    groups.setdefault(
      (
        config['model'],
        after.get('contexts', 'yes'),
        'yes' if config.get('inference_only') else '',
        arguments(document['command']),
      ),
      [],
    ).append(path)
  lines: list[dict[str, object]] = []
  for (model, contexts, inference_only, command), paths in groups.items():
    runs = [json.loads(path.read_text())['rows'] for path in paths]
    before, one_shot, corrected, after = ([rows[index] for rows in runs] for index in (0, 1, 2, -1))
    lines.append(
      {
        'network': model,
        'file, times smaller': f'{mean(after, "file_rate"):.2f}',
        'file, bytes': f'{mean(after, "file_bytes"):,.0f}',
        'float32': f'{100 * mean(before, "top1"):.2f} %',
        'one shot': f'{100 * mean(one_shot, "top1"):.2f} %',
        'BatchNorm corrected': f'{100 * mean(corrected, "top1"):.2f} %',
        'finetuned (lowest to highest)': spread([row['top1'] for row in after]),
        'seeds': len(runs),
        'to float32, points': f'{100 * (mean(after, "top1") - mean(before, "top1")):+.2f}',
        'contexts': contexts,
        'of inference only': inference_only,
        'command': f'`{command}`',
        'results': ', '.join(f'`{path.parent.name}`' for path in paths),
      }
    )
  place = lambda line: (line['network'], float(str(line['file, times smaller'])))
  return sorted(lines, key=place)


def mean(rows: list[dict[str, Any]], name: str) -> float:
  """Returns the mean of a column."""
  return statistics.fmean(row[name] for row in rows)


def spread(shares: list[float]) -> str:
  """Returns the mean in percent, with the range where there are several.

  >>> spread([0.9129, 0.9131, 0.9134])
  '91.31 % (91.29 to 91.34)'
  """
  text = f'{100 * statistics.fmean(shares):.2f} %'
  if len(shares) == 1:
    return text
  return f'{text} ({100 * min(shares):.2f} to {100 * max(shares):.2f})'


def arguments(command: str) -> str:
  """Returns the target and the overrides of a command of `experiments.finetune`, without the seed.

  >>> start = 'python -m experiments.finetune --config=configs/finetune_resnet20_cifar10.py:15'
  >>> arguments(f'{start} --workdir=DIR --config.epochs=2 --config.seed=1')
  ':15 epochs=2'
  """
  target = re.findall(r'--config=\S+\.py(\S*)', command)
  changes = sorted(re.findall(r'--config\.(\S+)', command))
  return ' '.join(target + [word for word in changes if not word.startswith('seed=')])


def support_matrix_in_short() -> str:
  """Returns the support matrix with figures where encoders are compared."""
  document = json.loads((RESULTS / 'benchmarks' / 'support_matrix.json').read_text())
  measured = ('network', 'feedback', 'trellis', 'layer by layer')
  short = lambda column, cell: cell if column in measured or cell.startswith('no') else 'yes'
  rows = [{column: short(column, cell) for column, cell in row.items()} for row in document['rows']]
  return markdown(rows)


def language_model(network: str, lines: Callable[[str], list[dict[str, object]]]) -> str:
  """Returns a table of language models, below its command."""
  return f'`{language_tables.read(network)["command"]}`\n\n{markdown(lines(network))}'


def networks() -> str:
  """Returns every network of the registry, with its parameters and the sources of its weights."""
  return markdown(
    [
      {
        'name': f'`{name}`',
        'parameters': f'{parameters(name):,}',
        'weights from': ', '.join(source.name for source in importers.sources(name)),
      }
      for name in models.names()
    ]
  )


def parameters(name: str) -> int:
  """Returns the number of parameters of a network."""
  shapes = models.variable_shapes(models.create(name))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))


TABLES: dict[str, Callable[[], str]] = {
  path.stem: functools.partial(benchmark, path.stem)
  for path in sorted((RESULTS / 'benchmarks').glob('*.json'))
} | {
  'networks': networks,
  'runtimes': runtimes,
  'support_matrix_in_short': support_matrix_in_short,
  'against_nncodec': against_nncodec,
  'against_cerwu': against_cerwu,
  'corrections': corrections,
  'one_shot_mobilenet_v1': lambda: one_shot('one_shot_mobilenet_v1'),
  'smollm2_rows': lambda: language_model('smollm2', language_tables.all_rows),
  'smollm2_beside_rivals': lambda: language_model('smollm2', language_tables.beside_rivals),
  'iglm_beside_rivals': lambda: language_model('iglm', language_tables.beside_rivals),
  'iglm_rows': lambda: language_model('iglm', language_tables.all_rows),
  'finetune_resnet20_cifar10': lambda: markdown(finetune(RESULTS / 'finetune_resnet20_cifar10')),
}
"""The name that a page marks a table by -> the function that makes it."""
