"""The two language models, the tokens that they are judged on, and those for calibration.

Tokens of measurement and of calibration are of one source, and never overlap.  Of the text, a
window of calibration shares no 16 tokens in a row with those of measurement: the documentation
repeats whole paragraphs.  Of the antibodies, alleles of one gene differ in a few residues:
sequences that a chain of neighbours joins, each within 5 substitutions of the next, are on one
side.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import Int
from scipy.sparse import csgraph

from opq_jax import models
from opq_jax.importers import language_files

NAMES = 'smollm2', 'iglm'
LEAST_TOKENS = 16_384  # of measurement
WINDOW = {'smollm2': 256, 'iglm': 96}  # tokens
CALIBRATION_WINDOWS = {'smollm2': 32, 'iglm': 112}
COMMON = 16  # tokens in a row that a window of calibration has not in common with measurement
SUBSTITUTIONS = 5  # within which two antibodies are neighbours

Tokens = Int[np.ndarray, 'windows length']


class Network(NamedTuple):
  """A language model with its tokens.

  Attributes:
    name: one of `NAMES`.
    model, params: as `model.apply(params, tokens)`; params are float32 arrays.
    measured: the tokens that it is judged on.
    calibration: the tokens that encoders may see.
  """

  name: str
  model: models.Decoder
  params: dict[str, Any]
  measured: Tokens
  calibration: Tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what `open_network` is called with: the network, its folder and its text."""
  parser.add_argument('network', choices=NAMES)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--text', type=pathlib.Path)


def open_network(name: str, folder: pathlib.Path, text: pathlib.Path | None = None) -> Network:
  """Returns a network of `NAMES`.

  Args:
    name: of the network.
    folder: that `shared/tools/language_models.py` wrote: a Hugging Face folder, with
      sequences.json for `iglm`.
    text: for `smollm2`, a text in UTF-8.
  """
  loaded = language_files.load(folder)
  window, count = WINDOW[name], CALIBRATION_WINDOWS[name]
  if name == 'smollm2':
    from tokenizers import Tokenizer

    if text is None:
      raise ValueError('text: found none, expected a file')
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokens = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    measured, calibration = split_text(tokens, window)
  else:
    sequences = json.loads((folder / 'sequences.json').read_text())
    measured, calibration = split_sequences(sequences, window)
  if len(calibration) < count:
    raise ValueError(f'{name}: found {len(calibration)} calibration windows, expected {count}')
  params = traverse_util.flatten_dict(loaded.variables, sep='/')
  params = {path: np.asarray(leaf, np.float32) for path, leaf in params.items()}
  tree = traverse_util.unflatten_dict(params, sep='/')
  return Network(name, loaded.model, tree, measured, calibration[:count])


def split_text(tokens: Iterable[int], window: int) -> tuple[Tokens, Tokens]:
  """Returns the first windows of a text for measurement, and those for calibration.

  >>> measured, calibration = split_text([*range(16_384), *range(100, 200), *range(5, 8)], 100)
  >>> measured.shape, calibration.shape     # the one window that is left repeats tokens
  ((164, 100), (0, 100))
  """
  every = np.array(list(tokens))
  every = every[: len(every) // window * window].reshape(-1, window)
  count = -(-LEAST_TOKENS // window)
  measured, rest = every[:count], every[count:]
  seen = set(_in_a_row(measured.reshape(-1)))
  kept = [row for row in rest if seen.isdisjoint(_in_a_row(row))]
  return measured, np.array(kept, every.dtype).reshape(-1, window)


def split_sequences(sequences: Iterable[list[int]], length: int) -> tuple[Tokens, Tokens]:
  """Returns sequences for measurement, and those for calibration, cut to one length.

  Those that are shorter, and repeated ones, are left out.  Groups of neighbours are drawn at
  random, seeded, until there are tokens enough to predict.
  """
  every = np.array(sorted({tuple(row[:length]) for row in sequences if len(row) >= length}))
  distances = np.array([np.count_nonzero(every != row, axis=1) for row in every])
  count, group = csgraph.connected_components(distances <= SUBSTITUTIONS)
  chosen = np.zeros(len(every), bool)
  for number in np.random.default_rng(0).permutation(count):
    if chosen.sum() * (length - 1) >= LEAST_TOKENS:
      break
    chosen |= group == number
  return every[chosen], every[~chosen]


def batches(tokens: Tokens, size: int) -> Tokens:
  """Returns [batches, size, length]: means over batches of one size are means over all windows.

  Raises:
    ValueError: the windows do not fill batches of this size.
  """
  if len(tokens) % size:
    raise ValueError(f'tokens: found {len(tokens)} windows, expected a multiple of {size}')
  return tokens.reshape(-1, size, tokens.shape[1])


def leaves(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the leaves of a tree by path."""
  return traverse_util.flatten_dict(params, sep='/')


def kernels(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the kernels of the blocks by path: [layers, inputs, outputs]."""
  return {path: leaf for path, leaf in leaves(params).items() if is_kernel(path)}


def is_kernel(path: str) -> bool:
  """Returns whether a path is that of the kernels of all blocks."""
  return '/layers/' in path and path.endswith('/kernel')


def replaced(params: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tree with other leaves at some paths."""
  return traverse_util.unflatten_dict(leaves(params) | dict(new), sep='/')


def _in_a_row(tokens: Tokens) -> Iterable[tuple[int, ...]]:
  """Yields all `COMMON` tokens in a row."""
  return map(tuple, np.lib.stride_tricks.sliding_window_view(tokens, COMMON).tolist())
