"""Writes the result tables of README.md from experiments/results.

    python -m experiments.make_readme

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; everything else is left alone.
"""

import csv
import json
import pathlib
import re
from typing import Any

import jax

from opq_jax import importers, models

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'experiments' / 'results'


def markdown(rows: list[dict[str, object]]) -> str:
  """A table of rows, columns in the order in which they first appear."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  lines += [
    '| ' + ' | '.join(str(row.get(column, '')).replace('|', '\\|') for column in columns) + ' |'
    for row in rows
  ]
  return '\n'.join(lines)


def benchmark(name: str) -> str:
  """The rows of one benchmark, under the command that made them."""
  document = json.loads((RESULTS / 'benchmarks' / f'{name}.json').read_text())
  return f'`{document["command"]}`\n\n{markdown(document["rows"])}'


def one_shot(name: str) -> str:
  """Top-1 of the default objective over file sizes, with and without the correction."""
  with open(RESULTS / name / 'results.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  return markdown(select(rows))


def select(rows: list[dict[str, str]]) -> list[dict[str, object]]:
  """One line per number of bits of what `experiments/one_shot.py` wrote."""
  percent = lambda row, name: f'{100 * float(row[name]):.1f} %'
  interval = lambda row: (
    f'{percent(row, "top1")} ({percent(row, "top1_low")} to {percent(row, "top1_high")})'
  )
  chosen = [
    row
    for row in rows
    if row['objective'] in ('float32', 'retained_signal') and row.get('moments', 'none') == 'none'
  ]
  by_bits: dict[str, dict[str, dict[str, str]]] = {}
  for row in chosen:
    by_bits.setdefault(row['bits_asked'], {})[row['correction']] = row
  lines: list[dict[str, object]] = []
  for found in by_bits.values():
    plain, corrected = found['none'], found.get('noise')
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
  """Top-1 of every network that has real weights, by what BatchNorm was corrected with."""
  lines: list[dict[str, object]] = []
  for folder in sorted(RESULTS.glob('one_shot_*')):
    with open(folder / 'results.csv', newline='') as file:
      rows = list(csv.DictReader(file))
    top_1 = lambda row: f'{100 * float(row["top1"]):.1f} %'
    chosen = [row for row in rows if row['objective'] == 'retained_signal']
    for bits in dict.fromkeys(row['bits_asked'] for row in chosen):
      same = [row for row in chosen if row['bits_asked'] == bits]
      found = {row['correction']: row for row in same if row.get('moments', 'none') == 'none'}
      feedback = {
        f'feedback, {where}': top_1(row)
        for where, kind in (('from noise', 'noise'), ('from unlabelled images', 'images'))
        for row in same
        if (row.get('moments', 'none'), row['correction']) == (kind, kind)
      }
      lines.append(
        {
          'network': folder.name.removeprefix('one_shot_'),
          'float32': top_1(rows[0]),
          'bits per weight': f'{float(bits):g}',
          'file, times smaller': f'{float(found["noise"]["file_rate"]):.1f}',
          'not corrected': top_1(found['none']),
          'from noise': top_1(found['noise']),
          'from unlabelled images': top_1(found['images']),
        }
        | feedback
      )
  return markdown(lines)


def against_nncodec() -> str:
  """A line a question, a column a network: ours over NNCodec's."""
  document = json.loads((RESULTS / 'benchmarks' / 'against_nncodec.json').read_text())
  lines: dict[tuple[object, ...], dict[str, object]] = {}
  for row in document['rows']:
    key = tuple(row[name] for name in ('question', 'ours', 'NNCodec', 'goal'))
    line = lines.setdefault(key, dict(zip(('', 'ours', 'NNCodec', 'goal'), key, strict=True)))
    cell = row['ratio'] if row['ratio'] != '' else 'not reached'
    if 'ours, s' in row:
      cell = f'{cell} ({row["ours, s"]} s, {row["NNCodec, s"]} s)'
    line[row['network']] = cell
  ordered = sorted(lines.values(), key=lambda line: str(line[''])[0])
  return f'`{document["command"]}`\n\n{markdown(ordered)}'


def finetune(name: str) -> str:
  """A row for every run of a config: what it began with, and what its file gives."""
  lines: list[dict[str, object]] = []
  for path in (RESULTS / name).glob('*/results.json'):
    document = json.loads(path.read_text())
    config, (before, *one_shot, after) = document['config'], document['rows']
    lines.append(
      {
        'network': config['model'],
        'file, times smaller': f'{after["file_rate"]:.2f}',
        'file, bytes': f'{after["file_bytes"]:,}',
        'contexts': after.get('contexts', 'yes'),
        'of inference only': 'yes' if config.get('inference_only') else '',
        'recipe': recipe(config),
        'float32': f'{100 * before["top1"]:.2f} %',
        'one shot': f'{100 * one_shot[0]["top1"]:.2f} %',
        'BatchNorm corrected': f'{100 * one_shot[1]["top1"]:.2f} %',
        'finetuned': f'{100 * after["top1"]:.2f} %',
        'results': f'`{path.parent.name}`',
      }
    )
  place = lambda line: (line['network'], float(str(line['file, times smaller'])))
  return markdown(sorted(lines, key=place))


def recipe(config: dict[str, Any]) -> str:
  """The epochs of a run, and what is not as its config has it."""
  words = [f'{config["epochs"]:g} epochs']
  usual = {'distillation': 0.0, 'learning_rate': 0.01, 'weight_decay': 1e-4, 'seed': 0}
  words += [
    f'{name.replace("_", " ")} {config[name]:g}'
    for name, value in usual.items()
    if config[name] != value
  ]
  if config.get('feedback'):
    words.append('from codes of feedback')
  if not (config['file_rate'] or config['compression_rate']):
    words.append(f'targets: sparsity {config["sparsity"]:g}, {config["bits"]:g} bits')
  return ', '.join(words)


def networks() -> str:
  """Every network of the registry, with its parameters and where its weights may come from."""
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
  shapes = models.variable_shapes(models.create(name))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))


TABLES = {
  'networks': networks,
  'speed': lambda: benchmark('speed'),
  'finetuning': lambda: benchmark('finetuning'),
  'payload': lambda: benchmark('payload'),
  'rate_control': lambda: benchmark('rate_control'),
  'paper_targets': lambda: benchmark('paper_targets'),
  'inference': lambda: benchmark('inference'),
  'inference_layers': lambda: benchmark('inference_layers'),
  'inference_profile': lambda: benchmark('inference_profile'),
  'joint_target': lambda: benchmark('joint_target'),
  'error_feedback': lambda: benchmark('error_feedback'),
  'uncompressed_leaves': lambda: benchmark('uncompressed_leaves'),
  'cell_rule': lambda: benchmark('cell_rule'),
  'large_trees': lambda: benchmark('large_trees'),
  'large_trees_orbax': lambda: benchmark('large_trees_orbax'),
  'large_trees_in_memory': lambda: benchmark('large_trees_in_memory'),
  'hostile_files': lambda: benchmark('hostile_files'),
  'killed_writes': lambda: benchmark('killed_writes'),
  'mutants': lambda: benchmark('mutants'),
  'against_nncodec': against_nncodec,
  'corrections': corrections,
  'one_shot_mobilenet_v1': lambda: one_shot('one_shot_mobilenet_v1'),
  'finetune_resnet20_cifar10': lambda: finetune('finetune_resnet20_cifar10'),
}


def main() -> None:
  path = ROOT / 'README.md'
  text = path.read_text()
  for name, table in TABLES.items():
    pattern = rf'<!-- {name} -->.*?<!-- end of {name} -->'
    if not re.search(pattern, text, re.DOTALL):
      raise ValueError(f'README.md: found no place for {name}, expected <!-- {name} -->')
    new = f'<!-- {name} -->\n{table()}\n<!-- end of {name} -->'
    text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
  path.write_text(text)


if __name__ == '__main__':
  main()
