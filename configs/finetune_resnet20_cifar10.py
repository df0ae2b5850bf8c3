r"""ResNet-20 on CIFAR-10, finetuned in a file 10, 15, 20 or 30 times smaller than float32.

    python experiments/finetune.py \
      --config=configs/finetune_resnet20_cifar10.py:15 --workdir=/tmp/finetune \
      --config.weights=weights/resnet20_cifar10.safetensors --config.data_dir=../shared/tfds

needs    the weights of pytorch_resnet_cifar10's ResNet-20 as safetensors; cifar10 in a TFDS folder
         of array_record files; `pip install opq_jax[plots]`.
gives    network.opq, results.json, metrics.jsonl, accuracy.png and checkpoints.

Top-1 on the 10,000 test images (95 % interval: 0.6 points either way), one seed; bytes of the file,
and how many times smaller it is:

    float32                                               91.73 %   1,084,392 bytes
    :15, BatchNorm corrected, no training                 89.65 %      70,108 bytes   15.47
    :15 --config.distillation=0.9 --config.epochs=2       91.31 %      70,762 bytes   15.32
    :15 --config.distillation=0.9 --config.epochs=6       91.51 %      71,459 bytes   15.18
    :20, BatchNorm corrected, no training                 86.23 %      52,605 bytes   20.61
    :20 --config.distillation=0.9 --config.epochs=6       91.24 %      54,571 bytes   19.87

from codes of error feedback, which need no training (--config.feedback --config.growth=0):

    :15, BatchNorm corrected, no training                 91.32 %      71,964 bytes   15.07
    :15, distillation, 2 epochs at a rate of 0.003        91.30 %      72,008 bytes   15.06
    :10, BatchNorm corrected, no training                 91.59 %     108,260 bytes   10.02
    :10, distillation, 2 epochs at a rate of 0.003        91.64 %     108,298 bytes   10.01
    :30, BatchNorm corrected, no training                 85.68 %      35,436 bytes   30.60
    :30, distillation, 2 epochs                           88.16 %      35,599 bytes   30.46

and with --config.inference_only=False, which has a BatchNorm's four vectors in float32, and so less
room for the codes:

    BatchNorm corrected, no training                      88.56 %      72,353 bytes   14.99
    4 epochs                                              90.73 %      72,296 bytes   15.00
    distillation of 0.9, 2 epochs                         91.29 %      72,643 bytes   14.93
    distillation of 0.9, 6 epochs                         91.49 %      73,073 bytes   14.84

The more the weights move, the more the file grows: 2 to 4 % in six epochs.  `config.growth` leaves
room for 3 %; the runs with inference_only=False had 0, 0.3, and 1 %.  Six epochs take 24 minutes on
two cores that have other work to do.  Commands and every epoch:
experiments/results/finetune_resnet20_cifar10/.

After the colon: how many times smaller the whole file is to be; `smoke` is two steps of random
weights on noise, which needs nothing; `15,resnet32` is another network of the family.
"""

import ml_collections


def get_config(argument: str = '15') -> ml_collections.ConfigDict:
  words = argument.split(',')
  rates = [word for word in words if word.replace('.', '', 1).isdigit()]
  networks = [word for word in words if word.startswith('resnet')]
  unknown = set(words) - {*rates, *networks, 'smoke'}
  if unknown or len(rates) > 1 or len(networks) > 1:
    raise ValueError(f'argument: found {argument!r}, expected something like 15 or 15,resnet32')

  config = ml_collections.ConfigDict()
  config.name = f'finetune_resnet20_cifar10.py:{argument}'

  config.model = networks[0] if networks else 'resnet20'
  config.num_classes = 10
  config.weights = f'weights/{config.model}_cifar10.safetensors'
  config.dtype = 'float32'  # of the computation

  config.dataset = 'cifar10:3.0.2'
  config.train_split = 'train'
  config.test_split = 'test'
  config.data_dir = '../shared/tfds'
  config.in_memory = True
  config.augmentation = 'cifar'
  config.loader_threads = 2
  config.fake_shape = (32, 32, 3)
  config.batch_size = 128
  config.eval_batch_size = 500

  # file_rate, or else compression_rate, or else the paper's two
  config.file_rate = float(rates[0]) if rates else 15.0
  config.growth = 0.03  # of the file while finetuning, for which room is left
  config.compression_rate = 0.0
  config.sparsity = 0.0
  config.bits = 0.0
  config.objective = 'retained_signal'
  config.inference_only = True  # the file: BatchNorm in two vectors, bfloat16 where not compressed
  config.feedback = False  # codes to start from by opq_jax.encode_layer_by_layer
  config.unlabelled_batches = 8  # of noise_shape[0] training images, for feedback and biases
  config.noise_shape = (128, 32, 32, 3)

  config.epochs = 4.0
  config.steps = 0  # in place of epochs, if not 0
  config.optimizer = 'sgd'
  config.learning_rate = 0.01
  config.warmup_steps = 100
  config.momentum = 0.9
  config.nesterov = False
  config.weight_decay = 1e-4
  config.label_smoothing = 0.0
  config.distillation = 0.0  # share of the float network's answers in the loss
  config.temperature = 4.0
  config.accumulation = 1
  config.ema_decay = ml_collections.config_dict.placeholder(float)

  config.seed = 0
  config.log_every = 20
  config.eval_every = 0  # an epoch
  config.checkpoint_every = 100

  if 'smoke' in words:
    config.weights = ''
    config.dataset = 'fake'
    config.steps = 2
    config.batch_size = 8
    config.eval_batch_size = 8
    config.warmup_steps = 0
    config.noise_shape = (8, 32, 32, 3)
    config.log_every = 1
    config.checkpoint_every = 1
  return config
