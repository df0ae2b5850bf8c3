r"""The paper's networks on ImageNet, finetuned after one shot.

    python -m experiments.finetune \
      --config=configs/finetune_imagenet.py:resnet50,paper --workdir=/tmp/finetune \
      --config.weights=resnet50.pth --config.data_dir=TFDS_FOLDER

needs    weights that `opq_jax.importers` can read; imagenet2012 in a TFDS folder of array_record
         files (train and validation, 160 GB); an accelerator or several.
gives    network.opq, results.json, metrics.jsonl, accuracy.png and checkpoints.

The argument after the colon is a network and a target, `resnet50,paper`.  A third word, `smoke`,
runs two steps of a smaller network with random weights on noise and needs no files.  Targets:

    paper        the paper's pruning rate and number of bits (`opq_jax/allocation/paper.py`)
    same_size    the one compression rate whose file is as large as that of `paper`
    15           any number: the file rate, bytes of the float32 network over bytes of the file

Expected: the paper's change of top-1, in points, at its nominal rate.  Measured: the file rate of
`paper` before finetuning, and the compression rate of `same_size`
(`python -m experiments.benchmarks.rate.paper_targets`; biases and BatchNorm are float32 there, and
all weights but MobileNet-V1's are random).

                    top-1    nominal    file rate    compression_rate of `same_size`
    alexnet         +0.46    138.96     63.54         64.13
    vgg16           about 0  195.87    100.81        101.68
    mobilenet_v1    +0.55     23.26     15.17         17.05
    resnet50        +0.40     38.03     22.20         23.80

No accuracy has been measured: the full dataset was not available, and only `smoke` has been run.
"""

import ml_collections

from configs.finetune_base import base_config, is_rate, make_smoke
from opq_jax.allocation import paper

# networks without BatchNorm take smaller steps
LEARNING_RATES = {'alexnet': 1e-3, 'vgg16': 1e-3, 'mobilenet_v1': 1e-2, 'resnet50': 1e-2}


def get_config(argument: str = 'resnet50,paper') -> ml_collections.ConfigDict:
  words = argument.split(',')
  networks = [word for word in words if word in paper.TARGETS]
  rates = [word for word in words if is_rate(word)]
  targets = rates + [word for word in words if word in ('paper', 'same_size')]
  unknown = set(words) - {*networks, *targets, 'smoke'}
  if unknown or len(networks) != 1 or len(targets) != 1:
    raise ValueError(
      f'argument: found {argument!r}, expected a network of {", ".join(paper.TARGETS)} and a '
      'target, such as resnet50,paper or resnet50,same_size or resnet50,15'
    )
  target = paper.TARGETS[networks[0]]

  config = base_config(f'finetune_imagenet.py:{argument}')

  config.model = networks[0]
  config.num_classes = 1000
  config.weights = f'weights/{config.model}.safetensors'
  config.dtype = 'bfloat16'

  config.dataset = 'imagenet2012:5.1.0'
  config.train_split = 'train'
  config.test_split = 'validation'
  config.in_memory = False
  config.augmentation = 'imagenet'
  config.loader_threads = 16
  config.fake_shape = (224, 224, 3)
  config.batch_size = 256
  config.eval_batch_size = 200

  config.file_rate = float(rates[0]) if rates else 0.0
  config.sparsity = target.sparsity
  config.bits = target.bits
  config.same_size = 'same_size' in words
  config.noise_shape = (16, 224, 224, 3)

  config.epochs = 10.0
  config.learning_rate = LEARNING_RATES[config.model]
  config.warmup_steps = 1000
  config.log_every = 50
  config.checkpoint_every = 500

  if 'smoke' in words:
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
    config.fake_shape = (64, 64, 3)
    make_smoke(config)
  return config
