r"""MobileNet-V2 compressed in one shot; judged on 200 ImageNet photographs.

    python experiments/one_shot.py \
      --config=configs/one_shot_mobilenet_v2.py --workdir=/tmp/one_shot \
      --config.weights=weights/mobilenet_v2.safetensors --config.data_dir=../shared/tfds

needs    torchvision's first weights as safetensors; imagenet2012 in a TFDS folder, array_record;
         `pip install opq_jax[plots]`.
gives    results.csv, top1_over_file_size.png, run.json and an .opq file per size.

Top-1 (float32: .855):

    bits per weight          4      3.25   2.5    2
    file, MB (14.16)         1.96   1.63   1.31   1.09
    compressed               .845   .735   .565   .170
    corrected from noise     .850   .820   .805   .665
    corrected on images      .845   .830   .825   .700
    feedback, synthetic      .850   .845   .805   .705
    feedback on images       .860   .830   .795   .775

All of it: experiments/results/one_shot_mobilenet_v2/.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.model = 'mobilenet_v2'
  config.weights = 'weights/mobilenet_v2.safetensors'
  config.num_classes = 1000

  config.dataset = 'imagenet2012:5.1.0'
  config.split = 'train+validation'
  config.unlabelled_split = 'train'  # for correction and feedback on images, no others
  config.data_dir = '../shared/tfds'
  config.batch_size = 50  # divides both splits, so that one compilation serves all

  # entropy-coded bits per weight: compression_rate = 32 / bits
  config.bits = (4.0, 3.25, 2.5, 2.0)
  config.objectives = ('balanced_error',)
  config.moments = ('synthetic', 'images')  # for error feedback, with the first of the objectives
  config.noise_seed = 0

  return config
