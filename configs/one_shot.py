r"""A pretrained network compressed in one shot, without data: `configs/one_shot.py:NETWORK`.

    python -m experiments.one_shot \
      --config=configs/one_shot.py:mobilenet_v1 --workdir=/tmp/one_shot \
      --config.weights=mobilenet_v1.safetensors --config.data_dir=TFDS_FOLDER

needs    the network's weights as safetensors: TF-slim's for mobilenet_v1, torchvision's first for
         mobilenet_v2, those of pytorch_resnet_cifar10 for resnet20 and resnet32; imagenet2012 or
         cifar10 in a TFDS folder of array_record files; `pip install opq_jax[plots]`.
gives    results.csv, top1_over_file_size.png, run.json, and an .opq file for every objective and
         number of bits.

Expected top-1 of the default objective.  MobileNets are judged on 200 ImageNet photographs (95 %
intervals of 4 to 7 points either way), ResNets on the 10,000 test images of CIFAR-10.

    mobilenet_v1, float32 .905
      bits per weight          4      3.25   2.5    2      1.75
      file, MB (17.02)         2.23   1.84   1.45   1.18   1.05
      compressed               .675   .350   .030   .000   .000
      corrected from noise     .900   .880   .885   .760   .600
      corrected on images      .900   .895   .890   .785   .640
      feedback, synthetic      .905   .870   .900   .840   .755
      feedback on images       .900   .890   .895   .825   .810

    mobilenet_v2, float32 .855
      bits per weight          4      3.25   2.5    2
      file, MB (14.16)         1.96   1.63   1.31   1.09
      compressed               .845   .735   .565   .170
      corrected from noise     .850   .820   .805   .665
      corrected on images      .845   .830   .825   .700
      feedback, synthetic      .850   .845   .805   .705
      feedback on images       .860   .830   .795   .775

    resnet20, float32 .917
      bits per weight          3      2.5    2      1.5    1
      file, KB (1084)          102    86     71     56     41
      compressed               .910   .890   .845   .586   .380
      corrected from noise     .916   .912   .904   .866   .748
      corrected on images      .916   .912   .904   .871   .773
      feedback, synthetic      .916   .914   .910   .901   .832
      feedback on images       .915   .916   .911   .901   .852

    resnet32, float32 .926
      bits per weight          3      2.5    2      1.5    1
      file, KB (1866)          171    145    119    94     69
      compressed               .921   .912   .892   .805   .275
      corrected from noise     .924   .921   .917   .894   .816
      corrected on images      .924   .921   .918   .899   .842
      feedback, synthetic      .926   .925   .922   .913   .879
      feedback on images       .925   .926   .921   .917   .887

All rows: experiments/results/one_shot_NETWORK/.
"""

from typing import Any

import ml_collections

# unlabelled_split: for the correction and for feedback on images, never judged on ResNets
# batch_size: divides both splits, so that one compiled program serves all batches
IMAGENET: dict[str, Any] = {
  'num_classes': 1000,
  'dataset': 'imagenet2012:5.1.0',
  'split': 'train+validation',
  'unlabelled_split': 'train',
  'batch_size': 50,
}
CIFAR10: dict[str, Any] = {
  'num_classes': 10,
  'dataset': 'cifar10:3.0.2',
  'split': 'test',
  'unlabelled_split': 'train[:1000]',
  'batch_size': 500,
}
# bits: of the entropy-coded payload per weight; compression_rate = 32 / bits
NETWORKS: dict[str, dict[str, Any]] = {
  'mobilenet_v1': IMAGENET
  | {
    'weights': 'weights/mobilenet_v1.safetensors',
    'bits': (4.0, 3.25, 2.5, 2.0, 1.75),
    'objectives': ('balanced_error', 'retained_signal', 'relative_error', 'squared_error'),
  },
  'mobilenet_v2': IMAGENET
  | {'weights': 'weights/mobilenet_v2.safetensors', 'bits': (4.0, 3.25, 2.5, 2.0)},
  'resnet20': CIFAR10
  | {'weights': 'weights/resnet20_cifar10.safetensors', 'bits': (3.0, 2.5, 2.0, 1.5, 1.0)},
  'resnet32': CIFAR10
  | {'weights': 'weights/resnet32_cifar10.safetensors', 'bits': (3.0, 2.5, 2.0, 1.5, 1.0)},
}


def get_config(network: str) -> ml_collections.ConfigDict:
  if network not in NETWORKS:
    raise ValueError(f'network: found {network!r}, expected one of {", ".join(NETWORKS)}')
  config = ml_collections.ConfigDict()
  config.model = network
  config.data_dir = '../shared/tfds'
  config.objectives = ('balanced_error',)
  config.moments = ('synthetic', 'images')  # inputs of error feedback, for the first objective
  config.noise_seed = 0
  for name, value in NETWORKS[network].items():
    config[name] = value
  return config
