r"""ResNet-20 for CIFAR-10 compressed in one shot; judged on the 10,000 test images.

    python experiments/one_shot.py \
      --config=configs/one_shot_resnet20.py --workdir=/tmp/one_shot \
      --config.weights=weights/resnet20_cifar10.safetensors --config.data_dir=../shared/tfds

needs    akamaster's weights as safetensors; cifar10 in a TFDS folder of array_record files;
         `pip install opq_jax[plots]`.
gives    results.csv, top1_over_file_size.png, run.json and an .opq file per size.

Top-1 (float32: .917):

    bits per weight          3      2.5    2      1.5    1
    file, KB (1084)          102    86     71     56     41
    compressed               .906   .893   .851   .670   .367
    corrected from noise     .915   .915   .902   .867   .764
    corrected on images      .915   .914   .904   .871   .780
    feedback, synthetic      .915   .915   .911   .901   .841
    feedback on images       .915   .914   .912   .901   .861

All of it: experiments/results/one_shot_resnet20/.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.model = 'resnet20'
  config.weights = 'weights/resnet20_cifar10.safetensors'
  config.num_classes = 10

  config.dataset = 'cifar10:3.0.2'
  config.split = 'test'
  config.unlabelled_split = 'train[:1000]'  # for correction and feedback on images, no others
  config.data_dir = '../shared/tfds'
  config.batch_size = 500  # divides both splits, so that one compilation serves all

  # entropy-coded bits per weight: compression_rate = 32 / bits
  config.bits = (3.0, 2.5, 2.0, 1.5, 1.0)
  config.objectives = ('balanced_error',)
  config.moments = ('synthetic', 'images')  # for error feedback, with the first of the objectives
  config.noise_seed = 0

  return config
