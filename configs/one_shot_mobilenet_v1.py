r"""MobileNet-V1 compressed in one shot: no finetuning, no data; 200 ImageNet photographs to look at.

    python experiments/one_shot.py \
      --config=configs/one_shot_mobilenet_v1.py --workdir=/tmp/one_shot \
      --config.weights=weights/mobilenet_v1.safetensors --config.data_dir=../shared/tfds

needs    TF-slim's weights as safetensors; imagenet2012 in a TFDS folder of array_record files;
         `pip install opq_jax[plots]`; minutes on two cores.
gives    results.csv, top1_over_file_size.png, run.json and an .opq file per objective and size.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.weights = 'weights/mobilenet_v1.safetensors'
  config.num_classes = 1000
  config.width = 1.0

  config.dataset = 'imagenet2012:5.1.0'
  config.split = 'train+validation'
  config.data_dir = '../shared/tfds'
  config.batch_size = 50  # divides the 200 photographs, so that one compilation serves all

  config.bits = (4.0, 3.25, 2.5, 2.0, 1.75)  # entropy per weight; compression_rate = 32 / bits
  config.objectives = ('retained_signal', 'relative_error', 'squared_error')

  config.noise_seed = 0
  config.noise_shape = (16, 224, 224, 3)

  return config
