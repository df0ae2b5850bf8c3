r"""The paper's networks on ImageNet, finetuned after one shot.

    python experiments/finetune.py \
      --config=configs/finetune_imagenet.py:resnet50,paper --workdir=/tmp/finetune \
      --config.weights=resnet50.pth --config.data_dir=TFDS_FOLDER

needs    weights that `opq_jax.importers` knows; imagenet2012 in a TFDS folder of array_record
         files (train and validation, 160 GB); an accelerator or several.
gives    network.opq, results.json, metrics.jsonl, accuracy.png and checkpoints.

After the colon a network and a target, `resnet50,paper`; `resnet50,paper,smoke` is two steps of
a smaller one with random weights on noise, which needs nothing.  Targets:

    paper        the paper's two, its pruning rate and bits (`opq_jax/allocation/paper.py`)
    same_size    one compression rate, found such that the file has the size that `paper` gives
    15           any number: how many times smaller the whole file is to be

Expected, the paper's change of top-1 in points at its nominal rate; measured, how many times
smaller the whole file of `paper` is before finetuning, and the rate at which `same_size` has it
(`python -m experiments.benchmarks.paper_targets`; biases and BatchNorm are float32 there, and the
weights of all but MobileNet-V1 are random):

                    top-1    nominal    whole file    compression_rate of `same_size`
    alexnet         +0.46    138.96     63.54         64.13
    vgg16           about 0  195.87    100.81        101.68
    mobilenet_v1    +0.55     23.26     15.17         17.05
    resnet50        +0.40     38.03     22.20         23.80

No accuracy is measured: the full dataset was not at hand, and nothing but `smoke` has been run.
"""

import ml_collections

from opq_jax.allocation import paper

# networks without BatchNorm take smaller steps
LEARNING_RATES = {'alexnet': 1e-3, 'vgg16': 1e-3, 'mobilenet_v1': 1e-2, 'resnet50': 1e-2}


def get_config(argument: str = 'resnet50,paper') -> ml_collections.ConfigDict:
  words = argument.split(',')
  networks = [word for word in words if word in paper.TARGETS]
  rates = [word for word in words if word.replace('.', '', 1).isdigit()]
  targets = rates + [word for word in words if word in ('paper', 'same_size')]
  unknown = set(words) - {*networks, *targets, 'smoke'}
  if unknown or len(networks) != 1 or len(targets) != 1:
    raise ValueError(
      f'argument: found {argument!r}, expected a network of {", ".join(paper.TARGETS)} and a '
      'target, such as resnet50,paper or resnet50,same_size or resnet50,15'
    )
  target = paper.TARGETS[networks[0]]

  config = ml_collections.ConfigDict()
  config.name = f'finetune_imagenet.py:{argument}'

  config.model = networks[0]
  config.num_classes = 1000
  config.model_options = ml_collections.ConfigDict()  # attributes of its class
  config.weights = f'weights/{config.model}.safetensors'
  config.dtype = 'bfloat16'  # of the computation

  config.dataset = 'imagenet2012:5.1.0'
  config.train_split = 'train'
  config.test_split = 'validation'
  config.data_dir = '../shared/tfds'
  config.in_memory = False
  config.augmentation = 'imagenet'
  config.loader_threads = 16
  config.fake_shape = (224, 224, 3)
  config.batch_size = 256
  config.eval_batch_size = 200

  # file_rate, or else compression_rate, or else sparsity and bits
  config.file_rate = float(rates[0]) if rates else 0.0
  config.growth = 0.03  # of the file while finetuning, for which room is left
  config.compression_rate = 0.0
  config.sparsity = target.sparsity
  config.bits = target.bits
  config.same_size = 'same_size' in words  # one target, for the size that sparsity and bits give
  config.objective = 'balanced_error'
  config.inference_only = True  # the file: BatchNorm in two vectors, bfloat16 where not compressed
  config.feedback = False  # codes to start from by opq_jax.encode_layer_by_layer
  config.unlabelled_batches = 8  # of noise_shape[0] training images, for feedback and biases
  config.noise_shape = (16, 224, 224, 3)

  config.epochs = 10.0
  config.steps = 0  # in place of epochs, if not 0
  config.optimizer = 'sgd'
  config.learning_rate = LEARNING_RATES[config.model]
  config.warmup_steps = 1000
  config.momentum = 0.9
  config.nesterov = False
  config.weight_decay = 1e-4
  config.label_smoothing = 0.0
  config.distillation = 0.0  # share of the float network's answers in the loss
  config.temperature = 4.0
  config.accumulation = 1
  config.ema_decay = ml_collections.config_dict.placeholder(float)
  config.clip_to_grid = False  # no gradient that moves a weight further beyond the last cell

  config.seed = 0
  config.log_every = 50
  config.eval_every = 0  # an epoch
  config.checkpoint_every = 500

  if 'smoke' in words:
    config.weights = ''
    config.num_classes = 10
    # less to compile: a layer or block a stage, and few channels
    if config.model == 'resnet50':
      config.model_options.blocks = (1, 1, 1, 1)
    if config.model == 'mobilenet_v1':
      config.model_options.width = 0.25
    if config.model == 'vgg16':
      config.model_options.stacks = ((1, 16), (1, 32), (1, 64), (1, 64), (1, 64))
    if config.model in ('alexnet', 'vgg16'):
      config.model_options.hidden = 64
    config.dataset = 'fake'
    config.fake_shape = (64, 64, 3)
    config.noise_shape = (8, 64, 64, 3)
    config.steps = 2
    config.batch_size = 8
    config.eval_batch_size = 8
    config.warmup_steps = 0
    config.log_every = 1
    config.checkpoint_every = 1
  return config
