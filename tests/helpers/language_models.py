"""Small language models of every family: configurations, and weights drawn by their names."""

import functools
import json
import zlib

import numpy as np
import safetensors.numpy

from opq_jax import models
from opq_jax.importers import language_models

_LLAMA = {
  'model_type': 'llama',
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': True,
}
_GPT2 = {
  'model_type': 'gpt2',
  'vocab_size': 40,
  'n_embd': 32,
  'n_layer': 2,
  'n_head': 4,
  'n_positions': 64,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 24,
}

CONFIGS = {
  'llama': _LLAMA,
  'llama_biases': _LLAMA
  | {'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': False, 'head_dim': 12},
  'llama_3': _LLAMA | {'rope_theta': 100.0, 'rope_scaling': _LLAMA3},
  'llama_linear': _LLAMA | {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}},
  'mistral': _LLAMA | {'model_type': 'mistral', 'sliding_window': 5, 'head_dim': 8},
  'qwen2': _LLAMA | {'model_type': 'qwen2', 'sliding_window': 4, 'use_sliding_window': False},
  'qwen2_window': _LLAMA
  | {
    'model_type': 'qwen2',
    'sliding_window': 4,
    'use_sliding_window': True,
    'max_window_layers': 0,
  },
  'qwen3': _LLAMA | {'model_type': 'qwen3', 'head_dim': 16, 'rope_theta': 1e6},
  'gpt2': _GPT2,
  'gpt2_wide': _GPT2 | {'n_inner': 40, 'tie_word_embeddings': False},
  'bert': {
    'model_type': 'bert',
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'max_position_embeddings': 64,
  },
}
TOKENS = np.random.default_rng(0).integers(1, 40, (2, 12)).astype(np.int32)


def drawn(name, shape):
  """The tensor of a name: norms about 1, all else about 0, large enough that all of it is felt."""
  noise = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) - np.float32(
    0.5
  )
  is_norm = 'norm' in name.lower() or '.ln_' in name
  return noise + 1 if is_norm and name.endswith('weight') else noise


@functools.cache
def network(name):
  """A model, and its tensors as transformers names them."""
  model = models.from_config(CONFIGS[name])
  places = language_models.places(model).values()
  return model, {key: drawn(key, place.source_shape) for place in places for key in place.names}


def write_folder(folder, name, **more):
  """Writes a Hugging Face folder of one of the networks."""
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(
    network(name)[1], folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  (folder / 'config.json').write_text(json.dumps(CONFIGS[name] | more))
  return folder
