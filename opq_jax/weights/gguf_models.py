"""Language models in GGUF files: their configuration, and their tensors as transformers has them.

A GGUF file of llama.cpp holds the configuration in its metadata, under the name of its
architecture: Llama (Mistral and SmolLM2 too), Qwen2 and Qwen3 are known.  In files of the
architecture llama, the rows of every head's queries and keys are in another order: llama.cpp turns
the features 2 i and 2 i + 1 of a head by one angle, transformers i and i + features / 2.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

Field = Callable[[str], Any]
"""Returns the value of a key of the metadata, None where it is missing."""

_CLASSES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}
"""Class of transformers by architecture."""

_OUTER = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_OF_LAYER = {
  'attn_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_LAYER = re.compile(r'blk\.(\d+)\.(\w+)\.(weight|bias)')
_ROPE_FACTORS = 'rope_freqs.weight'

_REFUSED = (
  *('attention.sliding_window', 'attention.scale', 'attention.clamp_kqv', 'expert_count'),
  *('logit_scale', 'residual_scale', 'embedding_scale', 'attention.max_alibi_bias'),
)
"""Keys of what the networks of `opq_jax.models` do not compute, unless their value is 0."""

# of Llama 3.1 to 3.3: their converter keeps no more of the rotation than its factors
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


class Source(NamedTuple):
  """Where a tensor of transformers is.

  Attributes:
    name: in the GGUF file.
    heads: in whose order its rows are, where these are another in the file; 0 of all others.
  """

  name: str
  heads: int

  def in_order(self, array: Shaped[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns the tensor with its rows in the order of transformers.

    >>> Source('blk.0.attn_q.weight', heads=1).in_order(np.array([0, 2, 1, 3])).tolist()
    [0, 1, 2, 3]
    """
    if not self.heads:
      return array
    pairs = array.reshape(self.heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


class GgufModel(NamedTuple):
  """A language model.

  Attributes:
    config: as in config.json of a Hugging Face folder.
    sources: its tensors in the file, by the names of transformers.
  """

  config: dict[str, Any]
  sources: dict[str, Source]


def described(
  field: Field,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], Shaped[np.ndarray, '...']],
) -> GgufModel:
  """Returns the language model that a file holds.

  Args:
    field: of its metadata.
    shapes: of its tensors by name, outputs first.
    read: returns a tensor by name.

  Raises:
    ValueError: it holds another network, or tensors that are not of this one.
  """
  kind = field('general.architecture')
  if kind not in _CLASSES:
    raise ValueError(f'general.architecture: found {kind!r}, expected one of {", ".join(_CLASSES)}')
  config = _config(kind, field, shapes, read)
  heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
  heads = heads if kind == 'llama' else {}
  sources, unknown = {}, []
  for name in shapes:
    found = _LAYER.fullmatch(name)
    if name in _OUTER:
      sources[_OUTER[name]] = Source(name, 0)
    elif found is not None and found[2] in _OF_LAYER:
      layer, module, suffix = found.groups()
      own = heads.get(module, 0)
      if own and shapes[name][0] % (2 * own):
        raise ValueError(f'{name}: found {shapes[name][0]} rows, expected pairs in {own} heads')
      sources[f'model.layers.{layer}.{_OF_LAYER[module]}.{suffix}'] = Source(name, own)
    elif name != _ROPE_FACTORS:
      unknown.append(name)
  if unknown:
    raise ValueError(f'found the tensors {", ".join(unknown[:5])}, expected those of {kind} alone')
  return GgufModel(config, sources)


def _config(
  kind: str,
  field: Field,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], Shaped[np.ndarray, '...']],
) -> dict[str, Any]:
  """Returns the configuration that the metadata describe.

  Raises:
    ValueError: a key is missing, or has a value of another network.
  """

  def number(key: str, default: Any = None) -> Any:
    value = field(f'{kind}.{key}')
    value = default if value is None else value
    if not isinstance(value, int | float):
      found = 'no such key' if value is None else f'{str(value)[:80]!r}'
      raise ValueError(f'{kind}.{key}: found {found}, expected a number')
    return _decimal(value) if isinstance(value, float) else value

  def count(key: str, default: int | None = None) -> int:
    value = number(key, default)
    if type(value) is not int or value < 1:
      raise ValueError(f'{kind}.{key}: found {str(value)[:80]}, expected a whole number above 0')
    return value

  for key in _REFUSED:
    if (value := field(f'{kind}.{key}')) not in (None, 0, False):
      raise ValueError(f'{kind}.{key}: found {str(value)[:80]}, expected none')
  table = 'token_embd.weight'
  if table not in shapes:
    raise ValueError(f'{table}: found no such tensor, expected one')
  heads, features = count('attention.head_count'), count('embedding_length')
  head_features = count('attention.key_length', features // heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if count(key, head_features) != head_features:
      raise ValueError(f'{kind}.{key}: found {count(key)}, expected {head_features} as of keys')
  config = {
    'architectures': [_CLASSES[kind]],
    'model_type': kind,
    'vocab_size': shapes[table][0],
    'hidden_size': features,
    'intermediate_size': count('feed_forward_length'),
    'num_hidden_layers': count('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': count('attention.head_count_kv', heads),
    'head_dim': head_features,
    'max_position_embeddings': count('context_length'),
    'rms_norm_eps': number('attention.layer_norm_rms_epsilon'),
    'rope_theta': number('rope.freq_base', 10000.0),
    'hidden_act': 'silu',
    'tie_word_embeddings': 'output.weight' not in shapes,
  }
  if kind != 'qwen2':  # which has them always
    config['attention_bias'] = 'blk.0.attn_q.bias' in shapes
  if kind == 'llama':
    config['mlp_bias'] = 'blk.0.ffn_gate.bias' in shapes
  if (scaling := _scaling(kind, field, config, shapes, read)) is not None:
    config['rope_scaling'] = scaling
  for key in ('bos_token_id', 'eos_token_id'):
    if (token := field(f'tokenizer.ggml.{key}')) is not None:
      config[key] = int(token)
  return config


def _scaling(
  kind: str,
  field: Field,
  config: Mapping[str, Any],
  shapes: Iterable[str],
  read: Callable[[str], Shaped[np.ndarray, '...']],
) -> dict[str, Any] | None:
  """Returns how the rotation is stretched for longer contexts, as in config.json; None if not.

  Raises:
    ValueError: in a way that is not known.
  """
  scaling = field(f'{kind}.rope.scaling.type') or 'none'
  if _ROPE_FACTORS in shapes:
    factors, features = read(_ROPE_FACTORS).astype(np.float64), config['head_dim']
    factor = round(float(np.max(factors, initial=1)), 4)
    is_known = factors.shape == (features // 2,)
    if is_known:
      expected = llama3_factors(config['rope_theta'], features, factor)
      is_known = bool(np.allclose(factors, expected, rtol=1e-4))
    if not is_known:
      raise ValueError(f'{_ROPE_FACTORS}: found other factors than those of Llama 3')
    return {
      'rope_type': 'llama3',
      'factor': factor,
      'low_freq_factor': _LOW,
      'high_freq_factor': _HIGH,
      'original_max_position_embeddings': _ORIGINAL,
    }
  if scaling == 'none':
    return None
  if scaling != 'linear':
    raise ValueError(f'{kind}.rope.scaling.type: found {scaling!r}, expected none or linear')
  factor = field(f'{kind}.rope.scaling.factor') or 1.0
  return {'rope_type': 'linear', 'factor': _decimal(factor)}


def _decimal(number: float) -> float:
  """Returns the shortest decimal that is this number in float32: what the converter has read.

  >>> _decimal(float(np.float32(1e-5)))
  1e-05
  """
  return float(str(np.float32(number)))


def llama3_factors(theta: float, features: int, factor: float) -> Shaped[np.ndarray, ' pairs']:
  """Returns what Llama 3 divides the frequencies of a head's pairs of features by.

  >>> llama3_factors(5e5, 128, 8.0)[[0, 32, 63]].round(2).tolist()
  [1.0, 2.69, 8.0]
  """
  frequencies = theta ** (-np.arange(0, features, 2) / features)
  turns = _ORIGINAL * frequencies / (2 * math.pi)
  kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
  return 1 / (kept + (1 - kept) / factor)
