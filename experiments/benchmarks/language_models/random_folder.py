"""Model folders of Hugging Face with random weights, of the shapes of Llama networks."""

import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from opq_jax import models
from opq_jax.importers import language_models

_CONFIG = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 2048,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
}
# features, hidden features, layers, heads, heads of keys, vocabulary: those of SmolLM2-135M,
# Llama-3.2-1B and Llama-3.2-3B, as their config.json has them
_SHAPES = {
  '135M': (576, 1536, 30, 9, 3, 49152),
  '1B': (2048, 8192, 16, 32, 8, 128256),
  '3B': (3072, 8192, 28, 24, 8, 128256),
}
SIZES = tuple(_SHAPES)


def config(size: str, layers: int | None = None, vocabulary: int | None = None) -> dict[str, Any]:
  """Returns the config.json of a network of one of `SIZES`.

  Args:
    size: one of `SIZES`.
    layers, vocabulary: in the place of its own.

  >>> config('135M', layers=2)['num_hidden_layers']
  2
  """
  features, hidden, depth, heads, key_heads, tokens = _SHAPES[size]
  return _CONFIG | {
    'hidden_size': features,
    'intermediate_size': hidden,
    'num_hidden_layers': layers or depth,
    'num_attention_heads': heads,
    'num_key_value_heads': key_heads,
    'vocab_size': vocabulary or tokens,
  }


def write(folder: pathlib.Path, config: Mapping[str, Any], shard_weights: int = 500_000_000) -> int:
  """Writes shards of bfloat16 weights, one after the other; returns the number of weights.

  Kernels are Laplace weights of a trained network's scale, 1 / sqrt(fan in); norms are 1.
  """
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  places, count = {}, 0
  for number, shard in enumerate(_shards(config, shard_weights)):
    name = f'model-{number:05d}.safetensors'
    save_file({key: _drawn(key, shape) for key, shape in shard.items()}, folder / name)
    places |= dict.fromkeys(shard, name)
    count += sum(int(np.prod(shape)) for shape in shard.values())
  index = {'metadata': {'total_size': 2 * count}, 'weight_map': places}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return count


def _shards(config: Mapping[str, Any], most: int) -> Iterator[dict[str, tuple[int, ...]]]:
  shard: dict[str, tuple[int, ...]] = {}
  for place in language_models.places(models.from_config(config)).values():
    for name in place.names:
      if shard and sum(map(np.prod, shard.values())) + np.prod(place.source_shape) > most:
        yield shard
        shard = {}
      shard[name] = place.source_shape
  yield shard


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  if len(shape) == 1:
    return np.ones(shape, ml_dtypes.bfloat16)
  rng, array = np.random.default_rng(zlib.crc32(name.encode())), np.empty(shape, ml_dtypes.bfloat16)
  scale = np.float32(1 / np.sqrt(2 * shape[-1]))
  for begin in range(0, shape[0], 4096):
    part = array[begin : begin + 4096]
    size = part.shape
    exponential = rng.standard_exponential(size, np.float32)
    part[:] = scale * np.copysign(exponential, rng.random(size, np.float32) - np.float32(0.5))
  return array
