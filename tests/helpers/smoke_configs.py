"""Configs of finetuning runs of a few steps on noise."""

from configs.finetune_resnet20_cifar10 import get_config


def smoke(**changes):
  """Returns the config of ResNet-20, of fewer blocks and of small images, with these changes."""
  config = get_config('15,smoke')
  config.fake_shape = (8, 8, 3)
  config.update(changes)
  return config
