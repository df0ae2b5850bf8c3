r"""Accuracy of a pretrained network after one shot, before and after the correction of BatchNorm.

    python -m experiments.one_shot --config=configs/one_shot.py:NETWORK --workdir=DIR

For every objective and number of bits per weight: allocates, compresses, corrects BatchNorm from
noise and from unlabelled images, and measures accuracy and file size.  In a network without
BatchNorm (AlexNet, VGG-16), images correct the biases, and noise has nothing to correct.  The first
objective is run again with error feedback, in files of the same size, with moments of synthetic
images (no data) and of the same unlabelled images.  Compare rows, not papers: samples are small,
and the networks may have been trained on the photographs.
"""

import csv
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import opq_jax
from opq_jax import data
from opq_jax.importers import networks
from opq_jax.report import plots, sizes
from opq_jax.report.accuracy import scores


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Runs the experiment; returns the rows of results.csv, the float network first."""
  begin = time.perf_counter()
  workdir.mkdir(parents=True, exist_ok=True)
  console = Console()
  if not console.is_terminal:
    console = Console(width=132)

  pretrained = networks.load(config.weights, name=config.model, num_classes=config.num_classes)
  name, model, variables, source = pretrained

  def batches_of(split: str) -> list[dict[str, np.ndarray]]:
    return list(
      data.batches(
        config.dataset,
        split,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
        preprocessing=source.preprocessing,
      )
    )

  batches = batches_of(config.split)
  images = [jax.device_put(batch['image']) for batch in batches]
  labels = np.concatenate([batch['label'] for batch in batches])
  unlabelled = [jax.device_put(batch['image']) for batch in batches_of(config.unlabelled_split)]

  # weights are arguments: one compiled program serves every network
  forward = jax.jit(model.apply)
  logits_of = lambda network: np.concatenate([np.asarray(forward(network, x)) for x in images])

  float_logits = logits_of(variables)
  float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  rows = [
    {'objective': 'float32', 'moments': 'none', 'correction': 'none'}
    | {'bits_asked': 32.0, 'bits_per_weight': 32.0}
    | {'sparsity': 0.0, 'file_bytes': float_bytes, 'file_rate': 1.0}
    | scores(float_logits, labels, float_logits)
  ]

  metadata = networks.metadata(pretrained)

  def add(
    setting: dict[str, Any], corrected: dict[str, Any], state: opq_jax.CompressionState
  ) -> None:
    for correction, network in corrected.items():
      report = sizes.size_report(network, state, metadata=metadata)
      logits = logits_of(network)
      rows.append(
        {**setting, 'correction': correction}
        | {'bits_per_weight': report.entropy * 8 / report.weights, 'sparsity': report.sparsity}
        | {'file_bytes': report.file, 'file_rate': report.file_rate}
        | scores(logits, labels, float_logits)
      )

  corrections = {
    'none': lambda network: network,
    'noise': lambda network: networks.correct_batch_norm(pretrained, network, config.noise_seed),
    'images': lambda network: opq_jax.correction.correct_on_images(
      model.apply, variables, network, unlabelled
    ),
  }
  if not networks.has_batch_norm(variables):
    del corrections['noise']
  images_of = {'images': unlabelled}
  if 'synthetic' in config.moments:
    images_of['synthetic'] = networks.synthetic_batches(pretrained, config.noise_seed)
  matrices_of = {
    kind: opq_jax.network.mean_moments(model.apply, variables, images_of[kind])
    for kind in config.moments
  }

  settings = [(objective, bits) for objective in config.objectives for bits in config.bits]
  with Progress(console=console) as progress:
    task = progress.add_task('compressing', total=len(settings))
    for objective, bits in settings:
      progress.update(task, description=f'{name}, {objective}, {bits:g} bits')
      options = {'compression_rate': 32 / bits, 'objective': objective}
      state = opq_jax.init_state(variables, opq_jax.allocate(variables, **options))
      compressed = opq_jax.apply_compression(variables, state)
      corrected = {kind: correct(compressed) for kind, correct in corrections.items()}
      setting = {'objective': objective, 'moments': 'none', 'bits_asked': bits}
      add(setting, corrected, state)
      path = workdir / f'{objective}_{bits:g}_bits.opq'
      # corrected without data, if possible
      saved = corrected.get('noise', corrected['images'])
      opq_jax.save(path, saved, state, metadata)
      if (objective, bits) == settings[0]:
        # quoted accuracies are those of the file, read again
        loaded = networks.load(path).variables
        np.testing.assert_array_equal(logits_of(loaded), logits_of(saved), f'{path} differs')

      for kind, matrices in matrices_of.items() if objective == config.objectives[0] else ():
        encoder = opq_jax.encoders.Feedback(matrices)
        coded, coded_state, _ = opq_jax.compress(variables, encoder=encoder, **options)
        corrected = {'none': coded}
        # without BatchNorm, synthetic images carry no information about biases
        if kind == 'images' or networks.has_batch_norm(variables):
          corrected[kind] = opq_jax.correction.correct_on_images(
            model.apply, variables, coded, images_of[kind]
          )
        add({**setting, 'moments': kind}, corrected, coded_state)
        path = workdir / f'{objective}_{bits:g}_bits_feedback_{kind}.opq'
        opq_jax.save(path, corrected.get(kind, coded), coded_state, metadata)
      progress.advance(task)

  with open(workdir / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    for row in rows:
      writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
  title = (
    f'{name} ({float_bytes / 1e6:.1f} MB as float32), one shot, no finetuning\n'
    f'{len(labels):,} images of {config.dataset}, {config.split}'
  )
  draw(workdir / 'top1_over_file_size.png', rows, title)
  record = {
    'command': f'python -m experiments.one_shot --config=configs/one_shot.py:{name} --workdir=DIR',
    'config': config.to_dict(),
    'images': len(labels),
    'seconds': round(time.perf_counter() - begin),
    'versions': {'opq_jax': opq_jax.__version__, 'jax': jax.__version__},
  }
  # without folders of the machine
  record['config'] |= {'weights': pathlib.Path(config.weights).name, 'data_dir': '…'}
  (workdir / 'run.json').write_text(json.dumps(record, indent=1, ensure_ascii=False) + '\n')
  console.print(table(rows, title))
  return rows


def draw(path: pathlib.Path, rows: list[dict[str, Any]], title: str) -> None:
  """Plots top-1 over file size, a colour an objective; more curves for the first objective."""
  objectives = list(dict.fromkeys(row['objective'] for row in rows[1:]))
  settings = [
    (objective, 'none', correction) for objective in objectives for correction in ('noise', 'none')
  ]
  settings += [(objectives[0], 'none', 'images')]
  settings += [(objectives[0], kind, kind) for kind in ('synthetic', 'images')]
  curves = []
  for objective, kind, correction in settings:
    points = [
      row
      for row in rows
      if (row['objective'], row['moments'], row['correction']) == (objective, kind, correction)
    ]
    if not points:
      continue
    # one band: several of this width would overlap
    has_band = not curves
    label = objective if kind == 'none' else f'{objective}, feedback'
    curves.append(
      plots.Curve(
        f'{label}, on images' if correction == 'images' else label,
        [row['file_bytes'] for row in points],
        [row['top1'] for row in points],
        [(row['top1_low'], row['top1_high']) for row in points] if has_band else (),
        'BatchNorm not corrected' if correction == 'none' else '',
      )
    )
  title += f'; band: 95 % interval of {objectives[0]}'
  plots.accuracy_over_size(path, curves, baseline=rows[0]['top1'], title=title)


def table(rows: list[dict[str, Any]], title: str) -> Table:
  """Returns the rows as a table for the terminal."""
  result = Table(title=title, title_justify='left')
  for name in ('objective', 'feedback', 'BatchNorm'):
    result.add_column(name, justify='left')
  for name in ('bits/weight', 'pruned', 'file, MB', 'times smaller'):
    result.add_column(name, justify='right')
  for name in ('top-1, %', '95 %', 'top-5, %', 'same answer, %'):
    result.add_column(name, justify='right')
  how = {'none': '', 'noise': 'from noise', 'synthetic': 'synthetic', 'images': 'on images'}
  for row in rows:
    result.add_row(
      row['objective'],
      how[row['moments']],
      how[row['correction']],
      f'{row["bits_per_weight"]:.3f}',
      f'{row["sparsity"]:.1%}',
      f'{row["file_bytes"] / 1e6:.3f}',
      f'{row["file_rate"]:.2f}',
      f'{100 * row["top1"]:.1f}',
      f'{100 * row["top1_low"]:.0f}…{100 * row["top1_high"]:.0f}',
      f'{100 * row["top5"]:.1f}',
      f'{100 * row["agreement"]:.1f}',
      style='bold' if row['correction'] in ('noise', 'synthetic') else '',
    )
  return result


def main(_: list[str]) -> None:
  run(CONFIG.value, pathlib.Path(WORKDIR.value))


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
  WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results.')
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
