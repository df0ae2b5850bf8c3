"""Tokenizers in GGUF files, as the tokenizer.json that the package `tokenizers` reads.

The metadata hold the vocabulary, and the name of the expression that cuts a text into words, which
llama.cpp has for every family of models.  Byte-level BPE of the families below is known, and the
BPE with scores of SentencePiece, of Llama 2 and Mistral.
"""

import json
from collections.abc import Sequence
from typing import Any

from opq_jax.weights.gguf_models import Field

_KEY = 'tokenizer.ggml'
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of tokens

_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
  r'\s*[\r\n]+|\s+(?!\S)|\s+'
)
_LLAMA_3, _QWEN_2 = _WORDS % '{1,3}', _WORDS % ''
_LONGEST = 1 << 10  # characters of a token: all ways to halve it are tried
_SPACE = '\u2581'  # of SentencePiece


def _byte_level(use_regex: bool) -> dict[str, Any]:
  flags = {'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex}
  return {'type': 'ByteLevel', **flags}


def _split(expression: str) -> dict[str, Any]:
  pattern = {'pattern': {'Regex': expression}, 'behavior': 'Isolated', 'invert': False}
  return {'type': 'Sequence', 'pretokenizers': [{'type': 'Split', **pattern}, _byte_level(False)]}


_DIGITS = {
  'type': 'Sequence',
  'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _byte_level(True)],
}
_CUT_BY = {
  **dict.fromkeys(('gpt-2', 'gpt2', 'phi-2'), _byte_level(True)),
  **dict.fromkeys(('smollm', 'starcoder'), _DIGITS),
  **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3'), _split(_LLAMA_3)),
  **dict.fromkeys(('qwen2', 'deepseek-r1-qwen'), _split(_QWEN_2)),
}
"""How a text is cut into words, by the names of llama.cpp."""


def tokenizer_files(field: Field) -> dict[str, bytes]:
  """Returns tokenizer.json and tokenizer_config.json of a file.

  Args:
    field: of the metadata of the file.

  Raises:
    ValueError: its tokenizer is of another kind, or there is none.
  """
  if (text := field('tokenizer.huggingface.json')) is not None:
    return {'tokenizer.json': str(text).encode()}
  kind, tokens = field(f'{_KEY}.model'), field(f'{_KEY}.tokens')
  if kind is None or tokens is None:
    raise ValueError(f'{_KEY}.tokens: found no tokenizer, expected one')
  types = field(f'{_KEY}.token_type') or [1] * len(tokens)
  if len(types) != len(tokens):
    raise ValueError(f'{_KEY}.token_type: found {len(types)}, expected {len(tokens)}')
  if kind == 'gpt2':
    parts = _of_bytes(field, tokens)
  elif kind == 'llama':
    parts = _of_sentencepiece(field, tokens, types)
  else:
    raise ValueError(f'{_KEY}.model: found {kind!r}, expected gpt2 or llama')
  added = [
    {
      'id': number,
      'content': token,
      'special': types[number] != _USER_DEFINED,
      **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False),
    }
    for number, token in enumerate(tokens)
    if types[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
  ]
  content = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': None,
    'post_processor': _with_first(field, tokens),
    **parts,
  }
  about: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  for name in ('bos', 'eos', 'unk', 'pad'):
    key = 'unknown' if name == 'unk' else 'padding' if name == 'pad' else name
    if (number := field(f'{_KEY}.{key}_token_id')) is not None and number < len(tokens):
      about[f'{name}_token'] = tokens[number]
  if (template := field('tokenizer.chat_template')) is not None:
    about['chat_template'] = template
  as_json = lambda value: json.dumps(value, ensure_ascii=False).encode()
  return {'tokenizer.json': as_json(content), 'tokenizer_config.json': as_json(about)}


def _of_bytes(field: Field, tokens: Sequence[str]) -> dict[str, Any]:
  """Returns the parts of a tokenizer of byte-level BPE."""
  name = field(f'{_KEY}.pre')
  if name not in _CUT_BY:
    raise ValueError(f'{_KEY}.pre: found {name!r}, expected one of {", ".join(_CUT_BY)}')
  merges = [merge.split(' ', 1) for merge in field(f'{_KEY}.merges') or []]
  is_llama = _CUT_BY[name] is _CUT_BY['llama3']
  is_qwen = _CUT_BY[name] is _CUT_BY['qwen2']
  return {
    'normalizer': {'type': 'NFC'} if is_qwen else None,
    'pre_tokenizer': _CUT_BY[name],
    'decoder': _byte_level(True),
    'model': _bpe(tokens, merges, ignore_merges=is_llama),
  }


def _of_sentencepiece(field: Field, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
  """Returns the parts of a tokenizer of SentencePiece with scores."""
  scores = field(f'{_KEY}.scores')
  if scores is None or len(scores) != len(tokens):
    count = 0 if scores is None else len(scores)
    raise ValueError(f'{_KEY}.scores: found {count}, expected {len(tokens)}, one a token')
  numbers = {token: number for number, token in enumerate(tokens)}
  pairs = []
  for number, token in enumerate(tokens):
    if types[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
      continue
    if len(token) > _LONGEST:
      raise ValueError(f'{_KEY}.tokens: found one of {len(token)} characters, expected {_LONGEST}')
    halves = [(token[:at], token[at:]) for at in range(1, len(token))]
    halves = [pair for pair in halves if pair[0] in numbers and pair[1] in numbers]
    halves.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    pairs += [(scores[number], pair) for pair in halves]
  # the best score first; those of one score as they come
  pairs.sort(key=lambda pair: -pair[0])
  prefix = field(f'{_KEY}.add_space_prefix')
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}
  back = {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '}
  has_prefix = prefix is None or bool(prefix)
  first = [{'type': 'Prepend', 'prepend': _SPACE}] if has_prefix else []
  strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if has_prefix else []
  unknown = field(f'{_KEY}.unknown_token_id')
  return {
    'normalizer': {'type': 'Sequence', 'normalizers': [*first, replace]},
    'pre_tokenizer': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}, *strip],
    },
    'model': _bpe(
      tokens,
      [list(pair) for _, pair in pairs],
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=_BYTE in types,
    ),
  }


def _bpe(tokens: Sequence[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': None,
    'end_of_word_suffix': None,
    'fuse_unk': False,
    'byte_fallback': False,
    'ignore_merges': False,
    **options,
    'vocab': {token: number for number, token in enumerate(tokens)},
    'merges': merges,
  }


def _with_first(field: Field, tokens: Sequence[str]) -> dict[str, Any] | None:
  """Returns what puts the token of the begin in front of a text; None where nothing does."""
  number = field(f'{_KEY}.bos_token_id')
  if not field(f'{_KEY}.add_bos_token') or number is None:
    return None
  first = {'SpecialToken': {'id': tokens[number], 'type_id': 0}}
  text = lambda name, kind: {'Sequence': {'id': name, 'type_id': kind}}
  special = {'id': tokens[number], 'ids': [number], 'tokens': [tokens[number]]}
  return {
    'type': 'TemplateProcessing',
    'single': [first, text('A', 0)],
    'pair': [first, text('A', 0), text('B', 1)],
    'special_tokens': {tokens[number]: special},
  }
