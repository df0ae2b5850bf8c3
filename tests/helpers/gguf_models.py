"""Small language models as GGUF files, as llama.cpp's converter writes them."""

import re

import numpy as np

from opq_jax.weights.gguf_models import _OF_LAYER, _OUTER, llama3_factors
from tests.helpers.language_models import CONFIGS, network

MODULES = {theirs: ours for ours, theirs in _OF_LAYER.items()}
OUTER = {theirs: ours for ours, theirs in _OUTER.items()}


def gguf_name(name):
  """The name that llama.cpp gives a tensor of transformers."""
  if name in OUTER:
    return OUTER[name]
  layer, module, suffix = re.fullmatch(r'model\.layers\.(\d+)\.(.*)\.(\w+)', name).groups()
  return f'blk.{layer}.{MODULES[module]}.{suffix}'


def permuted(tensor, heads):
  """Rows of queries or keys as the converter of Llama writes them: halves of a head in turn."""
  halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
  return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def write_gguf(path, config, tensors, fields=lambda writer: None, kind=None):
  """Writes a language model.

  Args:
    path: of the file.
    config: as in config.json.
    tensors: of transformers, by name.
    fields: adds further metadata to the writer.
    kind: name of the type of all matrices; None of float32.
  """
  import gguf

  arch = {'mistral': 'llama'}.get(config['model_type'], config['model_type'])
  heads = config['num_attention_heads']
  key_heads = config.get('num_key_value_heads', heads)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(heads)
  writer.add_head_count_kv(key_heads)
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  if 'head_dim' in config:
    writer.add_key_length(config['head_dim'])
    writer.add_value_length(config['head_dim'])
  features = config.get('head_dim', config['hidden_size'] // heads)
  writer.add_rope_dimension_count(features)
  theta = config.get('rope_theta', 10000.0)
  if 'rope_theta' in config:
    writer.add_rope_freq_base(theta)
  scaling = config.get('rope_scaling', {})
  if scaling.get('rope_type') == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(scaling['factor'])
  if scaling.get('rope_type') == 'llama3':
    factors = llama3_factors(theta, features, scaling['factor'])
    writer.add_tensor('rope_freqs.weight', factors.astype(np.float32))
  fields(writer)
  for name, tensor in tensors.items():
    own = gguf_name(name)
    turned = {'attn_q': heads, 'attn_k': key_heads} if arch == 'llama' else {}
    parts = own.split('.')
    if len(parts) > 2 and parts[2] in turned:
      tensor = permuted(tensor, turned[parts[2]])
    if kind is None or tensor.ndim < 2 or tensor.shape[1] % 32:
      writer.add_tensor(own, tensor)
      continue
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(own, gguf.quants.quantize(np.asarray(tensor), raw), raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def write_named(path, name, **options):
  """Writes one of the networks of `tests.helpers.language_models`; with Llama 3's own context.

  Its base is such that some of the angles are stretched there.
  """
  config = dict(CONFIGS[name])
  if name == 'llama_3':
    config['rope_theta'] = 1e6
    config['rope_scaling'] = config['rope_scaling'] | {'original_max_position_embeddings': 8192}
  write_gguf(path, config, network(name)[1], **options)
  return config
