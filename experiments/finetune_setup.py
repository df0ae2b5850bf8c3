"""What a finetuning run starts from: network, data, optimizer, compression, by the config."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import opq_jax
from opq_jax import data, encoders, finetuning, importers, models
from opq_jax.compression import CompressionState
from opq_jax.data import augmentation, streams
from opq_jax.file import rate as file_rate
from opq_jax.importers import networks
from opq_jax.network import moments

_AUGMENTATIONS: dict[str, data.Augmentation | None] = {
  'cifar': augmentation.PadCropFlip(),
  'cifar_reflect': augmentation.PadCropFlip(mode='reflect'),
  'imagenet': augmentation.RandomResizedCrop(),
  'none': None,
}


def float_network(config: ml_collections.ConfigDict) -> importers.Imported:
  """Returns the model, its variables and their source, with random weights if no file is named."""
  options = {'num_classes': config.num_classes, 'dtype': jnp.dtype(config.dtype)}
  options |= config.model_options.to_dict()
  if config.weights:
    return importers.load(config.model, config.weights, **options)
  model = models.create(config.model, **options)
  image = jnp.zeros((1, *config.fake_shape))
  variables = jax.jit(model.init)(jax.random.key(config.seed), image)
  return importers.Imported(model, variables, importers.sources(config.model)[0])


def teacher(config: ml_collections.ConfigDict, own: importers.Imported) -> importers.Imported:
  """Returns the network that is distilled from: the float network itself, or the one named.

  Raises:
    ValueError: a teacher is named without weights, or they without it; it has no share in the
      loss; or it reads images in another way.
  """
  if bool(config.teacher) != bool(config.teacher_weights):
    raise ValueError(
      f'config.teacher, config.teacher_weights: found {config.teacher!r}, '
      f'{config.teacher_weights!r}, expected both or neither'
    )
  if not config.teacher:
    return own
  if not config.distillation:
    raise ValueError(
      f'config.teacher: found {config.teacher!r} and distillation 0, expected its share of the loss'
    )
  other = config.copy_and_resolve_references()
  other.update(model=config.teacher, weights=config.teacher_weights)
  other.model_options = {}  # those of the network that is compressed
  imported = float_network(other)
  found, expected = imported.source.preprocessing, own.source.preprocessing
  if found != expected:
    raise ValueError(f'config.teacher: found a network that reads {found}, expected {expected}')
  return imported


def examples_and_test_batches(
  config: ml_collections.ConfigDict, preprocessing: data.Preprocessing
) -> tuple[streams.Examples, list[dict[str, Any]]]:
  """Returns the training examples, and this process's rows of padded test batches."""
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


def augmentation_of(config: ml_collections.ConfigDict) -> data.Augmentation | None:
  """Returns the augmentation of a config, or None."""
  if config.augmentation not in _AUGMENTATIONS:
    raise ValueError(
      f'augmentation: found {config.augmentation!r}, expected one of {", ".join(_AUGMENTATIONS)}'
    )
  return _AUGMENTATIONS[config.augmentation]


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimizer of a config, with weight decay on kernels alone."""
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
  """Returns batches of the first training images, without their labels."""
  batches = streams.in_order(
    examples, batch_size=config.noise_shape[0], preprocessing=preprocessing
  )
  return [batch['image'] for batch in itertools.islice(batches, config.unlabelled_batches)]


def compress(
  config: ml_collections.ConfigDict, network: networks.Network, images: list[Any]
) -> CompressionState:
  """Returns masks and codebooks of the whole network, for the target of the config."""
  variables = to_save(config, network, network.variables)
  options = {'objective': config.objective}
  targets = {'sparsity': config.sparsity, 'bits': config.bits}
  rate = 0.0
  if config.same_size:
    two = opq_jax.init_state(variables, opq_jax.allocate(variables, **targets, **options))
    rate = opq_jax.size_report(variables, two).file_rate
  elif config.file_rate:
    # room for growth: finetuning moves weights to other levels, which take more bits
    rate = (1 + config.growth) * config.file_rate
  if rate:
    search = file_rate.at_file_rate(variables, rate, **options)
    if not config.feedback:
      return search.state
    targets = {'compression_rate': search.compression_rate}
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
  """Returns the variables that a file holds: as trained, or for inference only."""
  return networks.for_inference(network, variables) if config.inference_only else variables


def latent(variables: Any, corrected: Any, state: CompressionState) -> Any:
  """Returns the latent weights: `variables` where compressed, `corrected` (a bias) elsewhere."""
  return jax.tree.map(
    lambda record, float_leaf, leaf: leaf if record is None else float_leaf,
    state.tree['params'],
    variables['params'],
    corrected['params'],
    is_leaf=lambda node: node is None or isinstance(node, opq_jax.compression.LeafState),
  )
