"""What the name of a leaf says that it is, by the conventions of the frameworks.

Two axes do not make a matrix: the biases of stacked layers are [layers, dim], those of attention
[heads, dim], and a mask is [tokens, tokens].  They take part elementwise, are few, and an error of
theirs moves whole channels.  Names tell them from kernels where no function is at hand that
`opq_jax.usage` could ask.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class NamePattern(NamedTuple):
  """Names of leaves that are no matrices.

  Attributes:
    pattern: a regular expression, searched in the name as `plain_name` writes it.
    kind: what these leaves are.
    examples: names of frameworks that match.
  """

  pattern: str
  kind: str
  examples: tuple[str, ...]


NAME_PATTERNS = (
  NamePattern(
    r'(^|[/_])bias(es)?\d*(_(ih|hh|k|v)\w*)?$',
    'biases',
    ('params/Dense_0/bias', 'in_proj_bias', 'bias_hh_l0', 'attention_biases'),
  ),
  NamePattern(
    # look-ups, but of one number a head, which is added to the scores of attention
    r'(^|[/_])rel(ative)?_?(pos(ition)?|attention)?_?([xyhw]_)?bias(_table)?(/\w+)?$',
    'tables of attention biases',
    (
      'SelfAttention.relative_attention_bias.weight',
      'relpos_bias/rel_embedding',
      'relative_position_bias_table',
    ),
  ),
  NamePattern(
    # the layers `norm_proj` and `adaLN_modulation` multiply; `input_layernorm` and `conv1_bn` scale
    r'(^|/)(?!\w*(proj|projection|dense|linear|mlp|conv|fc|head|modulation|embedder)\d*/)'
    r'(\w*_)?([a-z]*norms?\d*|(ln|bn|gn)\d*[a-z]?)(_\w*)?/(weights?|scale|w|g)$',
    'scales of normalizations',
    ('LayerNorm_0/scale', 'input_layernorm.weight', 'layers.0.norm1.weight', 'ln_f/g', 'bn1/scale'),
  ),
  NamePattern(
    r'(^|[/_])(scales?|gammas?|betas?|offsets?|gains?|alphas?|temperature|absmax|zero_points?)'
    r'(_inv)?_?\d*$|(^|[/_])lambda(_\w+|\d*)$|/g$|scale_shift(_table)?$',
    'scales and offsets',
    ('bn/gamma', 'layer_scale', 'haiku_bn/offset', 'weight_scale_inv', 'scale_shift_table'),
  ),
  NamePattern(
    # `gate` and `w_gate` alone are matrices of a gated MLP or of a router
    r'(^|[/_])(attn|attention|mlp|ffn?|ffw|skip|res|residual|layer)_gates?$'
    r'|(^|[/_])gates?_(attn|msa|mlp|ffn|skip|residual)$',
    'gates of whole channels',
    ('cross_attn_attn_gate', 'attn_gate', 'gate_msa'),
  ),
  NamePattern(
    r'(^|[/_])masks?$|(^|/)(tril|triu)$',
    'masks',
    ('attn_mask', 'conv.weight_mask', 'tril'),
  ),
  NamePattern(
    r'(^|/)batch_stats/|(^|/)(running|moving)_\w+$|_ema/(hidden|average)$'
    r'|(^|/)(mean|var|variance|std|cluster_size|embed_avg)$',
    'running statistics',
    ('bn1.running_mean', 'bn/moving_variance', 'batch_stats/bn/var', 'bn/~/mean_ema/average'),
  ),
  NamePattern(
    r'(^|/)((\w+_)?inv_freq|freqs?(_cis|_cos|_sin|_complex)?|(cos|sin)(_cached|_cache|_table)?|pe'
    r'|position_(ids|index)|relative_position_(index|ids)|relative_coords_table|timescale)$'
    r'|(^|/)(rotary|rope)\w*/\w+$',
    'tables of positions that are computed, not learned',
    ('rotary_emb.inv_freq', 'cos_cached', 'freqs_cis', 'pos_encoder.pe', 'relative_coords_table'),
  ),
  NamePattern(
    r'(^|/)(a_log|log_a|time_decay|time_first|time_faaaa|time_mix_\w+|time_maa_[a-z])$',
    'rates of state-space and recurrent layers',
    ('mixer.A_log', 'attention.time_decay', 'attention.time_mix_key'),
  ),
)
"""Names of leaves that pass through by default, whatever their shape."""

_MAX_LENGTH = 1000  # characters of a name that the patterns see
_BIAS = re.compile(r'(?P<place>(.*[/.])?)b(?P<number>\d*)', re.DOTALL)
_COMPILED = [(re.compile(each.pattern), each.kind) for each in NAME_PATTERNS]


def kind_of_name(path: str) -> str | None:
  """Returns what a leaf is by its name; None where the name may be that of a matrix.

  >>> kind_of_name('params/LayerNorm_0/scale'), kind_of_name('encoder.layer.0.output.dense.weight')
  ('scales of normalizations', None)
  """
  name = plain_name(path)
  return next((kind for pattern, kind in _COMPILED if pattern.search(name)), None)


def biases_beside_kernels(paths: Iterable[str]) -> list[str]:
  """Returns the paths of leaves called `b` (b1, ...) beside a `w` (w1, ...), as Haiku names them.

  A name of one letter says nothing by itself.

  >>> biases_beside_kernels(['linear/w', 'linear/b', 'net/a', 'net/b'])
  ['linear/b']
  """
  paths = list(paths)
  known = set(paths)
  return [
    path
    for path in paths
    if (match := _BIAS.fullmatch(path)) and match['place'] + 'w' + match['number'] in known
  ]


def plain_name(path: str) -> str:
  """Returns a path in lower case with '/' between its parts, without numbers and boxes.

  A part that is a number is the place in a list, and `value` is the box of a variable (Flax NNX).

  >>> plain_name('blocks[3].self_attn.LayerNorm.weight'), plain_name('layers/0/kernel/value')
  ('blocks/self_attn/layer_norm/weight', 'layers/kernel')
  """
  # only the end of a very long name, so that a hostile one takes no time
  parts = [part.removesuffix(':0') for part in re.split(r'[/.\[\]\'"]+', path[-_MAX_LENGTH:])]
  parts = [part for part in parts if part and not part.isdecimal()]
  while len(parts) > 1 and parts[-1] in ('value', 'raw_value'):
    parts.pop()
  # LayerNorm, RMSNorm, adaLN: a word begins at a capital after a small letter, or before one
  words = [re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', part) for part in parts]
  return '/'.join(words).lower()
