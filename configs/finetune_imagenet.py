r"""The paper's networks on ImageNet, finetuned after one shot.

    python experiments/finetune.py \
      --config=configs/finetune_imagenet.py:resnet50,paper --workdir=/tmp/finetune \
      --config.weights=resnet50.pth --config.data_dir=TFDS_FOLDER

needs    weights that `opq_jax.importers` knows; imagenet2012 in a TFDS folder of array_record
         files (train and validation, 160 GB); an accelerator or several.
gives    network.opq, results.json, metrics.jsonl, accuracy.png and checkpoints.

After the colon: one of alexnet, vgg16, mobilenet_v1, resnet50; `paper` for the paper's two targets
(its pruning rate and bits), or a number, how many times smaller the whole file is to be; `smoke` is
two steps of random weights on noise.  The paper's change of top-1 in points, at its own accounting
of the size: AlexNet +0.46, VGG-16 about 0, MobileNet-V1 +0.55, ResNet-50 +0.40.

Nothing but `smoke` has been run: the full dataset was not at hand.
"""

import ml_collections

# pruning rate, bits of a survivor; learning rate
PAPER = {
  'alexnet': (0.92, 3.0, 1e-3),
  'vgg16': (0.94, 3.0, 1e-3),
  'mobilenet_v1': (0.60, 4.0, 1e-2),
  'resnet50': (0.74, 3.0, 1e-2),
}


def get_config(argument: str = 'resnet50,paper') -> ml_collections.ConfigDict:
  words = argument.split(',')
  networks = [word for word in words if word in PAPER]
  rates = [word for word in words if word.replace('.', '', 1).isdigit()]
  targets = rates + [word for word in words if word == 'paper']
  unknown = set(words) - {*networks, *targets, 'smoke'}
  if unknown or len(networks) != 1 or len(targets) != 1:
    raise ValueError(
      f'argument: found {argument!r}, expected a network of {", ".join(PAPER)} and a target, such '
      'as resnet50,paper or resnet50,15'
    )
  sparsity, bits, learning_rate = PAPER[networks[0]]

  config = ml_collections.ConfigDict()
  config.name = f'finetune_imagenet.py:{argument}'

  config.model = networks[0]
  config.num_classes = 1000
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

  # file_rate, or else compression_rate, or else the paper's two
  config.file_rate = float(rates[0]) if rates else 0.0
  config.growth = 0.03  # of the file while finetuning, for which room is left
  config.compression_rate = 0.0
  config.sparsity = sparsity
  config.bits = bits
  config.objective = 'retained_signal'
  config.inference_only = True  # the file: BatchNorm in two vectors, bfloat16 where not compressed
  config.feedback = False  # codes to start from by opq_jax.encode_layer_by_layer
  config.unlabelled_batches = 8  # of noise_shape[0] training images, for feedback and biases
  config.noise_shape = (16, 224, 224, 3)

  config.epochs = 10.0
  config.steps = 0  # in place of epochs, if not 0
  config.optimizer = 'sgd'
  config.learning_rate = learning_rate
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
    config.dataset = 'fake'
    config.steps = 2
    config.batch_size = 8
    config.eval_batch_size = 8
    config.warmup_steps = 0
    config.log_every = 1
    config.checkpoint_every = 1
  return config
