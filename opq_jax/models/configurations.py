"""Language models by the `config.json` of a Hugging Face folder."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
  import flax.linen as nn

Config: TypeAlias = Mapping[str, Any]

_SILU = 'silu', 'swish'
_TANH_GELU = 'gelu_new', 'gelu_pytorch_tanh'
# what a key means that is not there: transformers' own defaults, of configurations as of version 5
_QWEN = {'num_key_value_heads': 32, 'max_position_embeddings': 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {
  'llama': {'max_position_embeddings': 2048},
  'mistral': {
    'num_key_value_heads': 8,
    'max_position_embeddings': 131072,
    'sliding_window': 4096,
  },
  'qwen2': _QWEN,
  'qwen3': {**_QWEN, 'head_dim': 128},
}
_ROTATIONS = 'default', 'linear', 'llama3'

# a file from anywhere may claim anything: sizes that no network has would be shapes, or lists of
# names, that fill all memory
_LARGEST = 1 << 24
_MOST_LAYERS = 1 << 12
_SIZES = {
  **dict.fromkeys(('num_hidden_layers', 'n_layer'), _MOST_LAYERS),
  **dict.fromkeys(
    (
      *('vocab_size', 'hidden_size', 'intermediate_size', 'num_attention_heads', 'head_dim'),
      *('num_key_value_heads', 'max_position_embeddings', 'sliding_window', 'type_vocab_size'),
      *('n_embd', 'n_inner', 'n_head', 'n_positions', 'max_window_layers'),
    ),
    _LARGEST,
  ),
}
"""Keys of sizes, with the largest of each."""
_NUMBERS = (
  *('rms_norm_eps', 'layer_norm_epsilon', 'layer_norm_eps', 'rope_theta', 'factor'),
  *('low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
)
_OBJECTS = 'rope_parameters', 'rope_scaling'
_FLAGS = 'tie_word_embeddings', 'attention_bias', 'mlp_bias', 'use_sliding_window'
_NEVER_NULL = (
  *('max_position_embeddings', 'n_positions', 'type_vocab_size', 'max_window_layers', 'factor'),
  *('rms_norm_eps', 'layer_norm_epsilon', 'layer_norm_eps', 'low_freq_factor', 'high_freq_factor'),
)
"""Keys that have a default where they are missing, and none where they are null."""


def from_config(config: Config, **options: Any) -> 'nn.Module':
  """Returns the network that a `config.json` describes, as transformers would build it.

  Llama (SmolLM2 too), Mistral, Qwen2 and Qwen3 give a `Llama`, GPT-2 a `GPT2`, BERT a
  `SentenceEncoder`.

  Args:
    config: the parsed file.
    **options: attributes of the class, such as `dtype=jnp.bfloat16`.

  Raises:
    ValueError: the file describes a network that these classes do not compute, by the name of the
      key that says so, or lacks a key.

  >>> config = {'model_type': 'llama', 'vocab_size': 99, 'hidden_size': 32, 'num_hidden_layers': 2,
  ...           'intermediate_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2}
  >>> from_config(config).head_features
  8
  >>> from_config({**config, 'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}})
  Traceback (most recent call last):
  ValueError: rope_scaling: found rope_type 'yarn', expected one of default, linear, llama3
  """
  _check_values(config)
  kind = _taken(config, 'model_type')
  if kind not in _FAMILIES:
    raise ValueError(f'model_type: found {kind!r}, expected one of {", ".join(_FAMILIES)}')
  _refuse(config, 'quantization_config', (None,))
  return _FAMILIES[kind](config, options)


def _llama(config: Config, options: dict[str, Any]) -> 'nn.Module':
  from opq_jax.models.llama import Llama

  kind = config['model_type']
  config = {**_DEFAULTS[kind], **config}
  _refuse(config, 'hidden_act', _SILU, 'silu')
  _refuse(config, 'partial_rotary_factor', (None, 1.0))
  heads, features = _taken(config, 'num_attention_heads'), _taken(config, 'hidden_size')
  key_heads = config.get('num_key_value_heads') or heads
  if heads % key_heads:
    raise ValueError(f'num_key_value_heads: found {key_heads}, expected a divisor of {heads} heads')
  head_features = config.get('head_dim') or _head_features(features, heads)
  if head_features % 2:
    raise ValueError(f'found {head_features} features in a head, expected pairs, which are rotated')
  # Qwen2 has them always and Mistral never, whatever the configuration says
  has_bias = kind == 'qwen2' or (kind != 'mistral' and bool(config.get('attention_bias', False)))
  attributes = {
    'vocabulary': _taken(config, 'vocab_size'),
    'depth': _taken(config, 'num_hidden_layers'),
    'features': features,
    'hidden': _taken(config, 'intermediate_size'),
    'heads': heads,
    'key_heads': key_heads,
    'head_features': head_features,
    'positions': config['max_position_embeddings'],
    'epsilon': config.get('rms_norm_eps', 1e-6),
    'is_tied': bool(config.get('tie_word_embeddings', False)),
    'window': _window(config),
    'rotation': _rotation(config),
    'has_bias': has_bias,
    'has_output_bias': has_bias and kind != 'qwen2',
    'has_hidden_bias': bool(config.get('mlp_bias', False)),
    'has_head_norms': kind == 'qwen3',
  }
  return Llama(**{**attributes, **options})


def _gpt2(config: Config, options: dict[str, Any]) -> 'nn.Module':
  from opq_jax.models.gpt2 import GPT2

  _refuse(config, 'activation_function', _TANH_GELU, 'gelu_new')
  _refuse(config, 'scale_attn_weights', (True,), True)
  _refuse(config, 'scale_attn_by_inverse_layer_idx', (False,), False)
  _refuse(config, 'add_cross_attention', (False,), False)
  heads, features = _taken(config, 'n_head'), _taken(config, 'n_embd')
  attributes = {
    'vocabulary': _taken(config, 'vocab_size'),
    'depth': _taken(config, 'n_layer'),
    'features': features,
    'hidden': config.get('n_inner') or 4 * features,
    'heads': heads,
    'key_heads': heads,
    'head_features': _head_features(features, heads),
    'positions': config.get('n_positions', 1024),
    'epsilon': config.get('layer_norm_epsilon', 1e-5),
    'is_tied': bool(config.get('tie_word_embeddings', True)),
  }
  return GPT2(**{**attributes, **options})


def _bert(config: Config, options: dict[str, Any]) -> 'nn.Module':
  from opq_jax.models.bert import SentenceEncoder

  _refuse(config, 'hidden_act', ('gelu',), 'gelu')
  _refuse(config, 'position_embedding_type', ('absolute',), 'absolute')
  _refuse(config, 'is_decoder', (False,), False)
  attributes = {
    'layers': _taken(config, 'num_hidden_layers'),
    'features': _taken(config, 'hidden_size'),
    'hidden': _taken(config, 'intermediate_size'),
    'heads': _taken(config, 'num_attention_heads'),
    'vocabulary': _taken(config, 'vocab_size'),
    'positions': config.get('max_position_embeddings', 512),
    'types': config.get('type_vocab_size', 2),
    'epsilon': config.get('layer_norm_eps', 1e-12),
  }
  return SentenceEncoder(**{**attributes, **options})


_FAMILIES: dict[str, Callable[[Config, dict[str, Any]], 'nn.Module']] = {
  'llama': _llama,
  'mistral': _llama,
  'qwen2': _llama,
  'qwen3': _llama,
  'gpt2': _gpt2,
  'bert': _bert,
}


def _check_values(config: Config) -> None:
  """Raises a ValueError unless sizes, numbers and lists of a configuration are such."""
  expected: dict[str, tuple[bool, str]] = {}
  for key, value in config.items():
    is_number = type(value) in (int, float)
    if value is None:
      if key in _NEVER_NULL:
        raise ValueError(f'{key}: found null, expected a number, or no such key')
      continue
    if key in _SIZES:
      least, most = int(key != 'max_window_layers'), _SIZES[key]
      is_right = type(value) is int and least <= value <= most
      expected[key] = is_right, f'a whole number from {least} to {most}'
    elif key in _NUMBERS:
      expected[key] = is_number and 0 < value < math.inf, 'a number above 0'
    elif key in _OBJECTS:
      expected[key] = isinstance(value, Mapping), 'an object'
    elif key in _FLAGS:
      expected[key] = type(value) is bool, 'true or false'
    elif key == 'layer_types':
      is_right = isinstance(value, list) and all(type(one) is str for one in value)
      expected[key] = is_right and bool(value), 'a list of names'
    elif key == 'model_type':
      expected[key] = type(value) is str, 'a name'
  for key, (is_right, what) in expected.items():
    if not is_right:
      raise ValueError(f'{key}: found {str(config[key])[:80]!r}, expected {what}')
  for key in _OBJECTS:
    if config.get(key):
      _check_values(config[key])


def _head_features(features: int, heads: int) -> int:
  """Returns the features of a head.

  Raises:
    ValueError: heads do not divide the features.
  """
  if features % heads:
    raise ValueError(f'found {features} features in {heads} heads, expected as many in each')
  return features // heads


def _taken(config: Config, key: str) -> Any:
  """Returns the value of a key that has no default."""
  if config.get(key) is None:
    raise ValueError(f'config.json: found no {key}, expected one')
  return config[key]


def _refuse(config: Config, key: str, known: Collection[Any], default: Any = None) -> None:
  """Raises a ValueError unless the value of a key is one of those that are computed."""
  value = config.get(key, default)
  if value not in known:
    expected = ' or '.join(repr(one) if one is not None else f'no {key}' for one in known)
    raise ValueError(f'{key}: found {value!r}, expected {expected}')


def _rotation(config: Config) -> Any:
  """Returns the rotation of `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`.

  Raises:
    ValueError: it is of an unknown kind.
  """
  from opq_jax.models.attention import Rotation

  key = 'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'
  found = config.get(key) or {}
  kind = found.get('rope_type', found.get('type', 'default'))
  if kind not in _ROTATIONS:
    raise ValueError(f'{key}: found rope_type {kind!r}, expected one of {", ".join(_ROTATIONS)}')
  _refuse(found, 'partial_rotary_factor', (None, 1.0))
  theta = found.get('rope_theta') or config.get('rope_theta') or 10000.0
  if kind == 'default':
    return Rotation(theta)
  missing = {'llama3': ('factor', 'low_freq_factor', 'high_freq_factor')}.get(kind, ('factor',))
  for name in missing:
    if name not in found:
      raise ValueError(f'{key}: found no {name} for rope_type {kind!r}, expected one')
  if kind == 'linear':
    return Rotation(theta, 'linear', found['factor'])
  original = found.get('original_max_position_embeddings') or config.get('max_position_embeddings')
  if original is None:
    raise ValueError(f'{key}: found no original_max_position_embeddings, expected one')
  turns = found['low_freq_factor'], found['high_freq_factor']
  if turns[0] > turns[1]:
    raise ValueError(
      f'{key}: found low_freq_factor {turns[0]:g} and high_freq_factor {turns[1]:g}, expected no '
      'smaller high_freq_factor'
    )
  return Rotation(theta, 'llama3', found['factor'], *turns, original)


def _window(config: Config) -> int | None:
  """Returns how many tokens a query sees at most, None for all before it.

  Raises:
    ValueError: some layers have a window and others none: all layers are one stack.
  """
  window = config.get('sliding_window')
  kind = config['model_type']
  if kind.startswith('qwen') and not config.get('use_sliding_window', False):
    window = None
  layers = config['num_hidden_layers']
  kinds = config.get('layer_types')
  if kinds is None and kind.startswith('qwen') and window is not None:
    # transformers' default for a configuration that counts them
    full = min(config.get('max_window_layers', 28), layers)
    kinds = ['full_attention'] * full + ['sliding_attention'] * (layers - full)
  if kinds is None:
    return window
  known = {'full_attention', 'sliding_attention'}
  if not set(kinds) <= known or len(set(kinds)) > 1:
    raise ValueError(
      f'layer_types: found {", ".join(sorted(set(kinds)))}, expected full_attention in all layers, '
      'or sliding_attention in all'
    )
  if kinds[0] == 'full_attention':
    return None
  if window is None:
    raise ValueError('layer_types: found sliding_attention and no sliding_window, expected one')
  return window
