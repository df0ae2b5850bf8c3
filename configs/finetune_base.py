"""Fields that every finetuning config has, and the changes of a smoke run; run by neither itself.

A config of `experiments.finetune` starts from `base_config`, sets what belongs to its networks and
dataset, and ends with `make_smoke` where the argument asks for it.
"""

import ml_collections


def base_config(name: str) -> ml_collections.ConfigDict:
  """Returns the shared fields with their defaults.

  Args:
    name: FILE.py:ARGUMENT under configs/, which results.json records as part of the command.
  """
  config = ml_collections.ConfigDict()
  config.name = name

  config.model_options = ml_collections.ConfigDict()  # attributes of the model's class
  config.dtype = 'float32'  # of the computation
  config.data_dir = '../shared/tfds'

  # the target: file_rate, or else compression_rate, or else sparsity with bits
  config.file_rate = 0.0
  config.growth = 0.03  # share of the file left free for what finetuning adds to it
  config.compression_rate = 0.0
  config.sparsity = 0.0
  config.bits = 0.0
  config.same_size = False  # True: the one target whose file is as large as that of sparsity, bits
  config.objective = 'balanced_error'
  config.inference_only = True  # file: BatchNorm in two vectors, other uncompressed leaves bfloat16
  config.feedback = False  # start from codes chosen layer by layer
  # weights beyond this share of the threshold may become zero and come back; None: masks are fixed
  config.zero_cell = ml_collections.config_dict.placeholder(float)
  config.unlabelled_batches = 8  # of noise_shape[0] training images, for feedback and biases

  config.epochs = 4.0
  config.steps = 0  # overrides epochs, if not 0
  config.optimizer = 'sgd'
  config.learning_rate = 0.01
  config.warmup_steps = 100
  config.momentum = 0.9
  config.nesterov = False
  config.weight_decay = 1e-4
  config.label_smoothing = 0.0
  config.distillation = 0.0  # share of a teacher's answers in the loss
  config.teacher = ''  # its name, as config.model; '' for the float network itself
  config.teacher_weights = ''
  config.temperature = 4.0
  config.accumulation = 1
  config.ema_decay = ml_collections.config_dict.placeholder(float)
  config.clip_to_grid = False  # True: no gradient that moves a weight further beyond the last cell
  config.price_of_bits = 0.0  # in the loss, of a bit per weight beyond those of the start

  config.seed = 0
  config.log_every = 20  # steps
  config.eval_every = 0  # steps; 0: an epoch
  config.checkpoint_every = 100  # steps
  return config


def make_smoke(config: ml_collections.ConfigDict) -> None:
  """Changes a config to two steps with random weights on noise, which need no files."""
  config.weights = ''
  config.dataset = 'fake'
  config.steps = 2
  config.batch_size = 8
  config.eval_batch_size = 8
  config.warmup_steps = 0
  config.noise_shape = (8, *config.fake_shape)
  config.log_every = 1
  config.checkpoint_every = 1


def is_rate(word: str) -> bool:
  """Returns whether a word of the argument is a file rate.

  >>> [is_rate(word) for word in ('15', '12.5', 'smoke')]
  [True, True, False]
  """
  return word.replace('.', '', 1).isdigit()
