r"""Compresses a pretrained network in one shot and finetunes it with masks and codebooks frozen.

    python -m experiments.finetune --config=configs/finetune_resnet20_cifar10.py:15 --workdir=DIR

A run that is killed and started again with the same command continues from its last checkpoint and
ends with the same result; after SIGTERM it saves and exits with 0.  DIR then holds

    network.opq      the finetuned network; quoted accuracies are those of this file
    results.json     command, config, and accuracy and size of the network at every stage
    metrics.jsonl    a line for every record of training or evaluation
    events.out.…     the same for TensorBoard: tensorboard --logdir DIR
    accuracy.png     test accuracy over the epochs
    checkpoints/     see opq_jax/finetuning/checkpoints.py

On many hosts, start it on each with --distributed and a shared DIR.  Slurm, Kubernetes, MPI and TPU
pods tell JAX the processes; elsewhere add --coordinator=HOST:PORT --processes=N --process=I.
"""

import json
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import opq_jax
from experiments import finetune_setup
from experiments.metric_log import MetricLog
from opq_jax import encoders, finetuning
from opq_jax.compression import CompressionState
from opq_jax.data import streams
from opq_jax.importers import networks
from opq_jax.report import plots


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, overrides: Sequence[str] = ()
) -> dict[str, Any] | None:
  """Runs the experiment; returns the content of results.json, or None after SIGTERM."""
  begin = time.perf_counter()
  workdir.mkdir(parents=True, exist_ok=True)
  is_first = jax.process_index() == 0
  console = Console(quiet=not is_first)
  if not console.is_terminal:
    console = Console(width=132, quiet=not is_first)

  imported = finetune_setup.float_network(config)
  model, variables, source = imported
  original = networks.Network(config.model, *imported)
  train_examples, test_batches = finetune_setup.examples_and_test_batches(
    config, source.preprocessing
  )
  steps_per_epoch = len(train_examples) // config.batch_size
  steps = config.steps or round(config.epochs * steps_per_epoch)

  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup_steps, steps
  )
  optimizer = finetune_setup.make_optimizer(config, schedule)
  eval_fn = finetuning.pmap_eval_step(model.apply)

  # masks and codebooks: chosen once, restored afterwards
  checkpoints = finetuning.Checkpoints(workdir / 'checkpoints')
  log = MetricLog(workdir)
  # allocated on the weights themselves: a leaf of zeros is not compressed
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    like = jax.eval_shape(opq_jax.init_state, variables, opq_jax.allocate(variables))
  whole_state = checkpoints.restore_compression(like)
  images = []  # without BatchNorm, noise has nothing to correct
  if config.feedback or not networks.has_batch_norm(variables):
    images = finetune_setup.few_images(config, source.preprocessing, train_examples)
  is_new = whole_state is None
  if is_new:
    whole_state = finetune_setup.compress(config, original, images)
  if config.feedback:
    # Feedback({}): moments of each layer's inputs are measured on the way.  Masks are chosen too,
    # by the first start alone.
    encoder = encoders.LayerByLayer(model.apply, np.concatenate(images), encoders.Feedback({}))
    compressed, chosen = encoder.choose_codes(variables, whole_state)
    whole_state = chosen if is_new else whole_state
  else:
    compressed = opq_jax.apply_compression(variables, whole_state)
  if is_new:
    checkpoints.save_compression(whole_state)
  if config.zero_cell is not None:
    whole_state = opq_jax.compression.add_zero_cell(variables, whole_state, config.zero_cell)
  if images:
    corrected = opq_jax.correction.correct_on_images(model.apply, variables, compressed, images)
  else:
    key = jax.random.key(config.seed)
    corrected = opq_jax.correction.correct_batch_norm(
      model.apply, variables, compressed, key, config.noise_shape
    )

  # latent weights: values of the codes chosen by feedback, or else the float weights; with the
  # corrected bias
  codes_of = compressed if config.feedback else variables
  start = {**corrected, 'params': finetune_setup.latent(codes_of, corrected, whole_state)}
  params_state = CompressionState(whole_state.tree['params'])
  bits_limit = 0.0
  if config.price_of_bits:
    bits_limit = float(opq_jax.compression.bits_per_weight(start['params'], params_state))
  teacher_model, teacher_variables, _ = finetune_setup.teacher(config, imported)
  step_fn = finetuning.pmap_train_step(
    model.apply,
    optimizer,
    loss_fn=finetuning.classification_loss(
      label_smoothing=config.label_smoothing,
      distillation=config.distillation,
      temperature=config.temperature,
    ),
    accumulation=config.accumulation,
    ema_decay=config.ema_decay,
    clip_to_grid=config.clip_to_grid,
    price_of_bits=config.price_of_bits,
    bits_limit=bits_limit,
    teacher_apply=teacher_model.apply if config.distillation else None,
  )
  train_state = finetuning.init_train_state(
    start, optimizer, jax.random.key(config.seed), with_average=config.ema_decay is not None
  )
  batches = streams.stream(
    train_examples,
    batch_size=config.batch_size,
    preprocessing=source.preprocessing,
    augmentation=finetune_setup.augmentation_of(config),
    seed=config.seed,
    threads=config.loader_threads,
  )
  restored = checkpoints.restore(train_state)
  if restored is not None:
    train_state, position = restored
    batches.set_state(position)
    log.keep_until(int(train_state.step))
  else:
    train_state = finetuning.replicate(train_state)
    log.keep_until(-1)
    for name, network in (
      ('float32', variables),
      ('one shot', compressed),
      ('one shot, corrected', corrected),
    ):
      size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
      if name != 'float32':
        network = finetune_setup.to_save(config, original, network)
        size = opq_jax.size_report(network, whole_state).file
      scores = evaluate(eval_fn, network, test_batches)
      log.write(0, kind='network', network=name, file_bytes=size, **scores)
      console.print(f'{name}: top-1 {scores["top1"]:.2%}, {size:,} bytes')

  state = finetuning.replicate(params_state)
  teacher = finetuning.replicate(teacher_variables) if config.distillation else None
  columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn()
  with (
    finetuning.StopRequest() as stop,
    Progress(*columns, TimeRemainingColumn(), console=console) as progress,
  ):
    task = progress.add_task('finetuning', total=steps, completed=int(train_state.step))
    last_time, last_step = time.perf_counter(), int(train_state.step)
    for step in range(last_step + 1, steps + 1):
      train_state, metrics = step_fn(train_state, state, next(batches), teacher)
      if step % config.log_every == 0 or step == steps:
        values = {name: float(value) for name, value in metrics.items()}
        this_time = time.perf_counter()
        speed = config.batch_size * (step - last_step) / (this_time - last_time)
        last_time, last_step = this_time, step
        log.write(step, kind='train', **values, images_per_second=speed)
        description = f'finetuning, loss {values["loss"]:.3f}, {speed:.0f} images/s'
        progress.update(task, completed=step, description=description)
      if step % (config.eval_every or steps_per_epoch) == 0 and step < steps:
        network, _ = finetuning.network(train_state, state, averaged=config.ema_decay is not None)
        network = finetune_setup.to_save(config, original, network)
        scores = evaluate(eval_fn, network, test_batches)
        size = opq_jax.size_report(network, whole_state).file
        log.write(step, kind='test', file_bytes=size, **scores)
        console.print(f'step {step:,}: top-1 {scores["top1"]:.2%}')
        last_time = time.perf_counter()
      is_stopping = stop.is_requested(step)
      if step % config.checkpoint_every == 0 or step == steps or is_stopping:
        checkpoints.save(train_state, batches.get_state(), wait=is_stopping)
      if is_stopping and step < steps:
        log.close()
        console.print(f'SIGTERM: saved after step {step:,}; the same command goes on from there')
        return None
  checkpoints.close()

  # the quoted accuracy is that of the file, read again
  network, network_state = finetuning.network(
    train_state, state, averaged=config.ema_decay is not None
  )
  network = finetune_setup.to_save(config, original, network)
  path = workdir / 'network.opq'
  if is_first:
    opq_jax.save(path, network, network_state, networks.metadata(original))
  multihost_utils.sync_global_devices('the file is written')
  loaded, _ = opq_jax.load(path)
  size = path.stat().st_size
  scores = evaluate(eval_fn, loaded, test_batches)
  log.write(steps, kind='test', file_bytes=size, **scores)
  log.write(steps, kind='network', network='finetuned, its file', file_bytes=size, **scores)
  log.close()
  if not is_first:
    return {}
  records = log.records()
  judged = [record for record in records if record['kind'] == 'network']
  float_bytes = judged[0]['file_bytes']
  rows = [
    {name: row[name] for name in ('network', 'step', 'top1', 'top5', 'file_bytes')}
    | {'file_rate': round(float_bytes / row['file_bytes'], 3)}
    for row in judged
  ]
  result = {
    'command': ' '.join([command(config), *overrides]),
    'config': public(config),
    'steps': steps,
    'rows': rows,
    'seconds_since_start': round(time.perf_counter() - begin),
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'versions': {'opq_jax': opq_jax.__version__, 'jax': jax.__version__},
  }
  (workdir / 'results.json').write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n')
  # the curve starts at the network that finetuning started from
  tests = [judged[-2], *(record for record in records if record['kind'] == 'test')]
  plots.accuracy_over_epochs(
    workdir / 'accuracy.png',
    [record['step'] / steps_per_epoch for record in tests],
    [record['top1'] for record in tests],
    baseline=rows[0]['top1'],
    title=f'{config.model}, file {rows[-1]["file_rate"]:.1f} times smaller',
  )
  console.print(table(rows))
  return result


def evaluate(eval_fn: Any, network: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
  """Returns top-1 and top-5 over all processes' batches."""
  network = finetuning.replicate(network)
  counts = [eval_fn(network, batch) for batch in batches]
  total = jax.tree.map(lambda *values: sum(int(value) for value in values), *counts)
  return {name: total[name] / total['examples'] for name in ('top1', 'top5')}


def command(config: ml_collections.ConfigDict) -> str:
  """Returns the command of a run, without its overrides."""
  return f'python -m experiments.finetune --config=configs/{config.name} --workdir=DIR'


def public(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config without folders of the machine."""
  files = {name: pathlib.Path(config[name]).name for name in ('weights', 'teacher_weights')}
  return config.to_dict() | files | {'data_dir': '…'}


def table(rows: list[dict[str, Any]]) -> Table:
  """Returns the stages of a run as a table for the terminal."""
  result = Table()
  result.add_column('network')
  for name in ('top-1, %', 'top-5, %', 'file, bytes', 'times smaller'):
    result.add_column(name, justify='right')
  for row in rows:
    result.add_row(
      row['network'],
      f'{100 * row["top1"]:.2f}',
      f'{100 * row["top5"]:.2f}',
      f'{row["file_bytes"]:,}',
      f'{row["file_rate"]:.2f}',
    )
  return result


def main(_: list[str]) -> None:
  if DISTRIBUTED.value or COORDINATOR.value:
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file
  folders = '--config.weights', '--config.teacher_weights', '--config.data_dir'
  overrides = [w for w in sys.argv[1:] if w.startswith('--config.') and not w.startswith(folders)]
  run(CONFIG.value, pathlib.Path(WORKDIR.value), overrides)


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
  WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the results.')
  DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'One of many processes.')
  COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of the first process.')
  PROCESSES = flags.DEFINE_integer('processes', None, 'How many.')
  PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0.')
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
