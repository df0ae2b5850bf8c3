"""The images that `configs/one_shot_NETWORK.py` judges a network by, for benchmarks of many."""

import importlib.util
import pathlib

import ml_collections
import numpy as np

from opq_jax import data, networks

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def config_of(name: str) -> ml_collections.ConfigDict:
  """The images and their number that `configs/one_shot_NAME.py` judges a network by."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'one_shot_{name}.py')
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def batches_of(
  config: ml_collections.ConfigDict, network: networks.Network, data_dir: str, split: str
) -> list[dict[str, np.ndarray]]:
  """A split of a config's dataset, prepared for a network."""
  options = {'batch_size': config.batch_size, 'preprocessing': network.source.preprocessing}
  return list(data.batches(config.dataset, split, data_dir=data_dir, **options))
