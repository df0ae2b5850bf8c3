r"""Compresses a pretrained network in one shot and finetunes it with masks and codebooks frozen.

    python -m experiments.finetune --config=configs/finetune_resnet20_cifar10.py:15 --workdir=DIR

Killed at any moment and started again with the same command, it goes on from its last checkpoint
and ends as if nothing had happened; after SIGTERM it saves and exits with 0.  DIR then holds

    network.opq      the finetuned network; the accuracy that is quoted is that of this file
    results.json     command, config, and accuracy and size of every network on the way
    metrics.jsonl    one line of training, or of evaluation, a line
    events.out.…     the same for TensorBoard: tensorboard --logdir DIR
    accuracy.png     test accuracy over the epochs
    checkpoints/     see opq_jax/finetuning/checkpoints.py

On many hosts, start it on each with --distributed and one DIR that all share: Slurm, Kubernetes,
MPI and TPU pods say who is who; elsewhere add --coordinator=HOST:PORT --processes=N --process=I.
"""

import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

import opq_jax
from opq_jax import data, encoders, finetuning, importers, models
from opq_jax.compression import CompressionState
from opq_jax.data import augmentation, streams
from opq_jax.file import rate as file_rate
from opq_jax.importers import networks
from opq_jax.network import moments
from opq_jax.report import plots

AUGMENTATIONS = {
  'cifar': augmentation.PadCropFlip(),
  'imagenet': augmentation.RandomResizedCrop(),
  'none': None,
}


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, overrides: Sequence[str] = ()
) -> dict[str, Any] | None:
  """The whole experiment: what is written to results.json, or None if it was asked to stop."""
  begin = time.perf_counter()
  workdir.mkdir(parents=True, exist_ok=True)
  is_first = jax.process_index() == 0
  console = Console(quiet=not is_first)
  if not console.is_terminal:
    console = Console(width=132, quiet=not is_first)

  imported = float_network(config)
  model, variables, source = imported
  original = networks.Network(config.model, *imported)
  train_examples, test_batches = examples_and_test_batches(config, source.preprocessing)
  steps_per_epoch = len(train_examples) // config.batch_size
  steps = config.steps or round(config.epochs * steps_per_epoch)

  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup_steps, steps
  )
  optimizer = make_optimizer(config, schedule)
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
  )
  eval_fn = finetuning.pmap_eval_step(model.apply)

  # masks and codebooks: made once, or read again
  checkpoints = finetuning.Checkpoints(workdir / 'checkpoints')
  log = MetricLog(workdir)
  # only the weights say which leaves are compressed: leaves of zeros are not
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    like = jax.eval_shape(opq_jax.init_state, variables, opq_jax.allocate(variables))
  whole_state = checkpoints.restore_compression(like)
  images = []  # without BatchNorm, noise has nothing to correct
  if config.feedback or not networks.has_batch_norm(variables):
    images = few_images(config, source.preprocessing, train_examples)
  is_new = whole_state is None
  if is_new:
    whole_state = compress(config, original, images)
  if config.feedback:
    # it chooses masks too, which are kept from the start
    # feedback without moments of its own: those of each layer's inputs are measured on the way
    encoder = encoders.LayerByLayer(model.apply, np.concatenate(images), encoders.Feedback({}))
    compressed, chosen = encoder.choose_codes(variables, whole_state)
    whole_state = chosen if is_new else whole_state
  else:
    compressed = opq_jax.apply_compression(variables, whole_state)
  if is_new:
    checkpoints.save_compression(whole_state)
  if images:
    corrected = opq_jax.correction.correct_on_images(model.apply, variables, compressed, images)
  else:
    key = jax.random.key(config.seed)
    corrected = opq_jax.correction.correct_batch_norm(
      model.apply, variables, compressed, key, config.noise_shape
    )

  # the latent weights are those of the codes that feedback chose, or else the float network's,
  # with what the correction moved
  codes_of = compressed if config.feedback else variables
  start = {**corrected, 'params': latent(codes_of, corrected, whole_state)}
  train_state = finetuning.init_train_state(
    start, optimizer, jax.random.key(config.seed), with_average=config.ema_decay is not None
  )
  batches = streams.stream(
    train_examples,
    batch_size=config.batch_size,
    preprocessing=source.preprocessing,
    augmentation=AUGMENTATIONS[config.augmentation],
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
        network = to_save(config, original, network)
        size = opq_jax.size_report(network, whole_state).file
      scores = evaluate(eval_fn, network, test_batches)
      log.write(0, kind='network', network=name, file_bytes=size, **scores)
      console.print(f'{name}: top-1 {scores["top1"]:.2%}, {size:,} bytes')

  state = finetuning.replicate(CompressionState(whole_state.tree['params']))
  teacher = finetuning.replicate(variables) if config.distillation else None
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
        now = time.perf_counter()
        speed = config.batch_size * (step - last_step) / (now - last_time)
        last_time, last_step = now, step
        log.write(step, kind='train', **values, images_per_second=speed)
        description = f'finetuning, loss {values["loss"]:.3f}, {speed:.0f} images/s'
        progress.update(task, completed=step, description=description)
      if step % (config.eval_every or steps_per_epoch) == 0 and step < steps:
        network, _ = finetuning.network(train_state, state, averaged=config.ema_decay is not None)
        network = to_save(config, original, network)
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

  # what is quoted is what a reader of the file gets
  network, network_state = finetuning.network(
    train_state, state, averaged=config.ema_decay is not None
  )
  network = to_save(config, original, network)
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
  # from what finetuning started with: the last of the networks before it
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


def float_network(config: ml_collections.ConfigDict) -> importers.Imported:
  """The model, its variables and their source; random weights where no file is named."""
  options = {'num_classes': config.num_classes, 'dtype': jnp.dtype(config.dtype)}
  options |= config.model_options.to_dict()
  if config.weights:
    return importers.load(config.model, config.weights, **options)
  model = models.create(config.model, **options)
  image = jnp.zeros((1, *config.fake_shape))
  variables = jax.jit(model.init)(jax.random.key(config.seed), image)
  return importers.Imported(model, variables, importers.sources(config.model)[0])


def examples_and_test_batches(
  config: ml_collections.ConfigDict, preprocessing: data.Preprocessing
) -> tuple[streams.Examples, list[dict[str, Any]]]:
  """What is trained with, and this process's rows of batches of one size to judge with."""
  size, count, index = config.eval_batch_size, jax.process_count(), jax.process_index()
  if config.dataset == 'fake':
    shape = config.fake_shape
    train = streams.fake(shape, classes=10, count=4 * config.batch_size, seed=0)
    test = streams.fake(shape, classes=10, count=config.batch_size + 1, seed=1)
    loader = streams.in_order(test, batch_size=size, preprocessing=preprocessing)
  else:
    train = data.source(config.dataset, config.train_split, config.data_dir)
    if config.in_memory:
      train = streams.in_memory(train)
    loader = data.batches(
      config.dataset,
      config.test_split,
      data_dir=config.data_dir,
      batch_size=size,
      preprocessing=preprocessing,
      shard=(0, 1),
    )
  rows = slice(index * size // count, (index + 1) * size // count)
  padded = [finetuning.pad_batch(batch, size) for batch in loader]
  return train, [{name: leaf[rows] for name, leaf in batch.items()} for batch in padded]


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  if config.optimizer == 'sgd':
    return optax.chain(
      optax.add_decayed_weights(config.weight_decay, mask=finetuning.kernels),
      optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )
  if config.optimizer == 'adamw':
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=finetuning.kernels)
  raise ValueError(f'optimizer: found {config.optimizer!r}, expected sgd or adamw')


def few_images(
  config: ml_collections.ConfigDict, preprocessing: data.Preprocessing, examples: streams.Examples
) -> list[Any]:
  """Batches of the first training images, without their labels."""
  batches = streams.in_order(
    examples, batch_size=config.noise_shape[0], preprocessing=preprocessing
  )
  return [batch['image'] for batch in itertools.islice(batches, config.unlabelled_batches)]


def compress(
  config: ml_collections.ConfigDict, network: networks.Network, images: list[Any]
) -> CompressionState:
  """Masks and codebooks of the whole network, by whichever target the config has."""
  variables = to_save(config, network, network.variables)
  options = {'objective': config.objective}
  targets = {'sparsity': config.sparsity, 'bits': config.bits}
  rate = 0.0
  if config.same_size:
    two = opq_jax.init_state(variables, opq_jax.allocate(variables, **targets, **options))
    rate = opq_jax.size_report(variables, two).file_rate
  elif config.file_rate:
    # finetuning moves weights to other levels, and the file grows
    rate = (1 + config.growth) * config.file_rate
  if rate:
    found = file_rate.at_file_rate(variables, rate, **options)
    if not config.feedback:
      return found.state
    targets = {'compression_rate': found.compression_rate}
  elif config.compression_rate:
    targets = {'compression_rate': config.compression_rate}
  if not config.feedback:
    return opq_jax.init_state(variables, opq_jax.allocate(variables, **targets, **options))
  if 'bits' in targets:
    raise ValueError(
      'config.feedback: found sparsity and bits, expected file_rate or compression_rate'
    )
  matrices = moments.mean_moments(network.model.apply, network.variables, images)
  encoder = encoders.Feedback(matrices)
  return opq_jax.compress(variables, encoder=encoder, **targets, **options).state


def to_save(config: ml_collections.ConfigDict, network: networks.Network, variables: Any) -> Any:
  """What the file is to hold: all as it was trained, or what inference needs of it."""
  return networks.for_inference(network, variables) if config.inference_only else variables


def latent(variables: Any, corrected: Any, state: CompressionState) -> Any:
  """The variables' weights where compressed, the corrected ones (the last bias) elsewhere."""
  return jax.tree.map(
    lambda record, float_leaf, leaf: leaf if record is None else float_leaf,
    state.tree['params'],
    variables['params'],
    corrected['params'],
    is_leaf=lambda node: node is None or isinstance(node, opq_jax.compression.LeafState),
  )


def evaluate(eval_fn: Any, network: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
  network = finetuning.replicate(network)
  counts = [eval_fn(network, batch) for batch in batches]
  total = jax.tree.map(lambda *values: sum(int(value) for value in values), *counts)
  return {name: total[name] / total['examples'] for name in ('top1', 'top5')}


class MetricLog:
  """metrics.jsonl and TensorBoard's events; neither tells of steps a killed run had not saved."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._path = folder / 'metrics.jsonl'
    self._events: SummaryWriter | None = None

  def write(self, step: int, **values: Any) -> None:
    """A line; of training and of tests ('kind') the numbers are curves too: kind/name."""
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
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    # the last line of a killed run may be torn
    return [json.loads(line) for line in lines if line.endswith('}')]

  def keep_until(self, step: int) -> None:
    """Forgets what comes after `step`; what is written from here on are curves too."""
    if jax.process_index() != 0:
      return
    kept = [record for record in self.records() if record['step'] <= step]
    self._path.write_text(''.join(json.dumps(record) + '\n' for record in kept))
    # TensorBoard drops what earlier files of the folder have from the purged step on
    self._events = SummaryWriter(str(self._folder), purge_step=step + 1)

  def close(self) -> None:
    if self._events is not None:
      self._events.close()


def command(config: ml_collections.ConfigDict) -> str:
  return f'python -m experiments.finetune --config=configs/{config.name} --workdir=DIR'


def public(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config without the folders of whoever ran it."""
  return config.to_dict() | {'weights': pathlib.Path(config.weights).name, 'data_dir': '…'}


def table(rows: list[dict[str, Any]]) -> Table:
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
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
  folders = '--config.weights', '--config.data_dir'
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
