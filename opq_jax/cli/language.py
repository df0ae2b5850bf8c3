"""Language models and their tokenizers, for the commands that run them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opq_jax.cli.console import note
from opq_jax.core import extras
from opq_jax.importers import language_files
from opq_jax.importers.language_files import LanguageModel

_TOKENIZER = 'tokenizer.json'


def load(path: str, folder: str | None) -> LanguageModel:
  """Returns the language model of a folder or a file, and notes the tensors that are not its own.

  Raises:
    ValueError, OSError: as `language_files.load`.
  """
  found = language_files.load(path, folder=folder)
  if found.ignored:
    note(
      f'{path}: left out {len(found.ignored)} tensors that the network has not, such as '
      f'{found.ignored[0]}'
    )
  return found


def tokenizer_of(side_file: Callable[[str], bytes | None], path: str) -> Any:
  """Returns the tokenizer beside a network's weights.

  Args:
    side_file: as of a `LanguageModel`.
    path: the weights, for messages.

  Raises:
    ValueError: there is none, it is damaged, or the package `tokenizers` is not installed.
  """
  text = side_file(_TOKENIZER)
  if text is None:
    raise ValueError(
      f'{path}: found no {_TOKENIZER}, expected one (--folder FOLDER names a folder that has it)'
    )
  package = extras.require('tokenizers', 'language', _TOKENIZER)
  try:
    tokenizer = package.Tokenizer.from_str(text.decode())
  except Exception as error:  # the package raises bare exceptions
    raise ValueError(
      f'{_TOKENIZER} of {path}: expected a tokenizer, found this: {error}'
    ) from error
  # a text is read whole, also by tokenizers that are made for sentences
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def same_tokenizer(first: LanguageModel, second: LanguageModel) -> bool:
  """Returns whether two networks have one tokenizer; True where one of them has none."""
  one, other = map(_tokenizer_text, (first, second))
  if one is None or other is None or one == other:
    return True
  return json.loads(one) == json.loads(other)


def _tokenizer_text(network: LanguageModel) -> bytes | None:
  try:
    return network.side_file(_TOKENIZER)
  except ValueError:  # of a GGUF file, a tokenizer that is not known
    return None


def tokens_in(path: str) -> list[list[int]]:
  """Returns the texts of a JSON file: a list of tokens, or a list of such lists.

  Raises:
    ValueError: the file holds something else.
    OSError: it cannot be read.
  """
  try:
    found = json.loads(Path(path).read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: expected JSON, found this: {error}') from error
  rows = found if isinstance(found, list) and all(isinstance(x, list) for x in found) else [found]
  for row in rows:
    if not isinstance(row, list) or not row or not all(type(token) is int for token in row):
      raise ValueError(f'{path}: found {str(row)[:60]!r}, expected a list of tokens, or of lists')
  return rows


def texts(path: str, folder: str) -> list[list[int]]:
  """Returns the tokens of a text in UTF-8, or those in a JSON file (`tokens_in`).

  Args:
    path: the text, or a file that ends in .json.
    folder: the model folder whose tokenizer reads the text; no special tokens are added.

  Raises:
    ValueError: the text is not UTF-8, or there is no tokenizer.
    OSError: a file cannot be read.
  """
  if Path(path).suffix.lower() == '.json':
    return tokens_in(path)
  tokenizer = tokenizer_of(language_files.side_files(Path(folder)), folder)
  return [tokenizer.encode(read_text(path), add_special_tokens=False).ids]


def frame_of(path: str, folder: str) -> tuple[int, ...]:
  """Returns the two tokens that frame a sentence; () where `texts` reads tokens, or without them.

  Args:
    path, folder: as for `texts`.

  Raises:
    ValueError, OSError: as `tokenizer_of`.
  """
  if Path(path).suffix.lower() == '.json':
    return ()
  tokenizer = tokenizer_of(language_files.side_files(Path(folder)), folder)
  found = tuple(map(tokenizer.token_to_id, ('[CLS]', '[SEP]')))
  return () if None in found else found


def read_text(path: str | Path) -> str:
  """Returns a text in UTF-8.

  Raises:
    ValueError: it is in another encoding.
    OSError: it cannot be read.
  """
  try:
    return Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: expected a text in UTF-8, found this: {error}') from error
