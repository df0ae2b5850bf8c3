r"""MobileNet-V1 compressed in one shot, without data; judged on 200 ImageNet photographs.

    python experiments/one_shot.py \
      --config=configs/one_shot_mobilenet_v1.py --workdir=/tmp/one_shot \
      --config.weights=weights/mobilenet_v1.safetensors --config.data_dir=../shared/tfds

needs    TF-slim's weights as safetensors; imagenet2012 in a TFDS folder of array_record files;
         `pip install opq_jax[plots]`.
gives    results.csv, top1_over_file_size.png, run.json and an .opq file per objective and size.

Top-1 with the default objective (float32: .905; 95 % intervals of 4 to 7 points either way):

    bits per weight          4      3.25   2.5    2      1.75
    file, MB (17.02)         2.23   1.84   1.45   1.18   1.05
    compressed               .675   .350   .030   .000   .000
    corrected from noise     .900   .880   .885   .760   .600
    corrected on images      .900   .895   .890   .785   .640
    feedback, synthetic      .905   .870   .900   .840   .755
    feedback on images       .900   .890   .895   .825   .810

All of it: experiments/results/one_shot_mobilenet_v1/.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.model = 'mobilenet_v1'
  config.weights = 'weights/mobilenet_v1.safetensors'
  config.num_classes = 1000

  config.dataset = 'imagenet2012:5.1.0'
  config.split = 'train+validation'
  config.unlabelled_split = 'train'  # for correction and feedback on images, no others
  config.data_dir = '../shared/tfds'
  config.batch_size = 50  # divides both splits, so that one compilation serves all

  # entropy-coded bits per weight: compression_rate = 32 / bits
  config.bits = (4.0, 3.25, 2.5, 2.0, 1.75)
  config.objectives = ('balanced_error', 'retained_signal', 'relative_error', 'squared_error')
  config.moments = ('synthetic', 'images')  # for error feedback, with the first of the objectives
  config.noise_seed = 0

  return config
