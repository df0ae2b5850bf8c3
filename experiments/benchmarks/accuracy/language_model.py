"""A language model at a few bits a weight: divergence from its float answers, and perplexity.

    pip install torch transformers tokenizers
    python -m experiments.benchmarks.accuracy.language_model FOLDER TEXT \
      [--bits 2 3 4 5 6] [--kinds plain trellis] [--bfloat16 FOLDER_OF_BFLOAT16]

FOLDER is that of a Hugging Face model: `config.json`, `tokenizer.json`, and `model.safetensors` or
its shards.  Compressed are the matrices of its blocks, without data; embeddings, norms and biases
stay as they are, and are not in the file.  The decoded matrices of a file that was written and read
back then take the place of the model's own, and torch runs it in float32, whatever dtype the
weights are stored in.

    error       ||w - w^||^2 / ||w||^2 over all compressed weights
    KL          KL(floats || compressed), nats a token, over 4,096 tokens of TEXT in windows of 256
    perplexity  of the same tokens, the first of each window given
    bits        of the file a compressed weight, with tables, escaped weights and grids

Where `allocate` or `save` refuses a number of bits, the row says why.  With --bfloat16, another
folder's values are compressed twice, as bfloat16 and as float32: the last column is how many times
the bits of float32 bfloat16 needs for the same error, on a line through its own rows in the
logarithm of the error.
"""

import argparse
import json
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from tokenizers import Tokenizer

import opq_jax
from experiments.benchmarks import harness

KINDS = 'plain', 'trellis'
TOKENS, WINDOW = 4096, 256
BEYOND = 0.1  # bits by which a line through measured points is followed past its ends
RATIO = 'bits of bfloat16 / of float32, equal error'
COLUMNS = (
  *('weights', 'codes', 'bits asked', 'bits', 'file, bytes', 'error', 'KL', 'perplexity'),
  *('escaped', 'seconds', 'note', RATIO),
)


class Judge:
  """A model in torch, with the log-probabilities of its own weights on some tokens.

  Args:
    folder: of the model.
    tokens: [windows, length].
    place: a folder for the log-probabilities, 4 bytes times tokens times vocabulary.
  """

  def __init__(self, folder: pathlib.Path, tokens: np.ndarray, place: pathlib.Path):
    self._model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    self._parameters = dict(self._model.named_parameters())
    self._tokens = torch.from_numpy(tokens)
    shape = *tokens.shape, self._model.config.vocab_size
    self._reference = np.memmap(place / 'log_probs', np.float32, 'w+', shape=shape)
    for i in range(len(tokens)):
      self._reference[i] = self._log_probs(i).numpy()

  def scores(self, weights: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns KL and perplexity with these matrices; all other weights are the model's own.

    Args:
      weights: of every compressed leaf, so that none of an earlier call remains.
    """
    for name, value in weights.items():
      prefixed = f'{self._model.base_model_prefix}.{name}'
      parameter = self._parameters[name if name in self._parameters else prefixed]
      with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value, np.float32)))
    divergence, loss = 0.0, 0.0
    for i, window in enumerate(self._tokens):
      found, expected = self._log_probs(i), torch.from_numpy(np.array(self._reference[i]))
      divergence += float((expected.exp() * (expected - found)).sum(-1).double().mean())
      loss -= float(found[:-1].gather(1, window[1:, None]).double().mean())
    windows = len(self._tokens)
    return {
      'KL': round(divergence / windows, 5),
      'perplexity': round(float(np.exp(loss / windows)), 2),
    }

  def perplexity(self) -> float:
    """Returns the perplexity of the model's own weights."""
    targets = self._tokens[:, 1:, None].numpy()
    found = np.take_along_axis(self._reference[:, :-1], targets, -1)
    return round(float(np.exp(-found.mean(dtype=np.float64))), 2)

  def _log_probs(self, i: int) -> torch.Tensor:
    with torch.inference_mode():
      return self._model(self._tokens[i : i + 1]).logits[0].log_softmax(-1)


def windows_of(text: pathlib.Path, folder: pathlib.Path) -> np.ndarray:
  """Returns the first tokens of a text, [windows, length]."""
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokens = tokenizer.encode(text.read_text(), add_special_tokens=False).ids[:TOKENS]
  if len(tokens) < TOKENS:
    raise ValueError(f'{text}: found {len(tokens)} tokens, expected {TOKENS}')
  return np.array(tokens).reshape(-1, WINDOW)


def kernels_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the matrices of the model's blocks, whose names have a number."""
  paths = sorted(folder.glob('model*.safetensors'))
  if not paths:
    raise ValueError(f'{folder}: found no model*.safetensors, expected weights of that name')
  leaves = {
    name: leaf for path in paths for name, leaf in opq_jax.weights.read_weights(path).items()
  }
  return {
    name: leaf for name, leaf in leaves.items() if leaf.ndim == 2 and re.search(r'\.\d+\.', name)
  }


def channel_axis(folder: pathlib.Path) -> int:
  """Returns the output axis: GPT-2's matrices are laid out as in JAX, all others as in torch."""
  config = json.loads((folder / 'config.json').read_text())
  return -1 if config['model_type'] == 'gpt2' else 0


def compress(
  kernels: Mapping[str, np.ndarray], bits: float, kind: str, axis: int
) -> tuple[Any, opq_jax.CompressionState]:
  options: dict[str, Any] = {'compression_rate': 32 / bits, 'channel_axis': axis}
  if kind == 'trellis':
    return opq_jax.compress(kernels, **options, encoder=opq_jax.encoders.Trellis())[:2]
  return kernels, opq_jax.init_state(kernels, opq_jax.allocate(kernels, **options))


def squared_error(kernels: Mapping[str, np.ndarray], decoded: Mapping[str, np.ndarray]) -> float:
  """Returns the squared error of all kernels together, relative to their energy."""
  error, energy = 0.0, 0.0
  for name, kernel in kernels.items():
    before, after = kernel.astype(np.float32), decoded[name].astype(np.float32)
    error += float(np.sum(np.square(before - after), dtype=np.float64))
    energy += float(np.sum(np.square(before), dtype=np.float64))
  return error / energy


def rows_of(
  kernels: Mapping[str, np.ndarray],
  judge: Judge,
  settings: list[tuple[str, float]],
  axis: int,
  place: pathlib.Path,
) -> Iterator[dict[str, object]]:
  """Yields a row for every kind of codes and number of bits."""
  weights = sum(kernel.size for kernel in kernels.values())
  path = place / 'kernels.opq'
  for kind, bits in settings:
    row: dict[str, object] = {'codes': kind, 'bits asked': f'{bits:g}'}
    start = time.perf_counter()
    try:
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        opq_jax.save(path, *compress(kernels, bits, kind, axis))
    except ValueError as error:
      yield row | {'note': f'refused: {error}'}
      continue
    seconds = time.perf_counter() - start
    with opq_jax.OpqFile(path) as file:
      stored = sum(file.sizes().values())
    decoded, state = opq_jax.load(path)
    records = list(state.tree.values())
    row |= {
      'bits': round(8 * stored / weights, 4),
      'file, bytes': f'{path.stat().st_size:,}',
      'error': float(f'{squared_error(kernels, decoded):.4g}'),
    } | judge.scores(decoded)
    if all(hasattr(record, 'escaped') for record in records):
      row['escaped'] = sum(int(np.count_nonzero(record.escaped)) for record in records)
    # leaves far from the Laplace density are every language model's
    notes = [str(warning.message) for warning in caught if 'Laplace' not in str(warning.message)]
    yield row | {'seconds': round(seconds), 'note': '; '.join(dict.fromkeys(notes))}


def bits_at(error: float, rows: list[dict[str, Any]]) -> float | None:
  """Returns the bits of an error, on a line through rows in its logarithm; None outside the rows.

  >>> rows = [{'bits': 2, 'error': 0.1}, {'bits': 3, 'error': 0.025}, {'note': 'refused'}]
  >>> round(bits_at(0.05, rows), 6), bits_at(0.01, rows)
  (2.5, None)
  """
  points = sorted((-np.log(row['error']), row['bits']) for row in rows if 'error' in row)
  if len(points) < 2:
    return None
  place, bits = np.array(points).T
  i = int(np.clip(np.searchsorted(place, -np.log(error)), 1, len(points) - 1))
  slope = (bits[i] - bits[i - 1]) / (place[i] - place[i - 1])
  found = float(bits[i] + slope * (-np.log(error) - place[i]))
  return found if bits[0] - BEYOND <= found <= bits[-1] + BEYOND else None


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a Hugging Face model')
  parser.add_argument('text', type=pathlib.Path)
  parser.add_argument('--bits', nargs='+', type=float, default=[2, 3, 4, 5, 6])
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=list(KINDS))
  parser.add_argument('--bfloat16', type=pathlib.Path, help='of the same model in bfloat16')
  arguments = parser.parse_args()
  settings = [(kind, bits) for kind in arguments.kinds for bits in arguments.bits]
  plain = [(kind, bits) for kind, bits in settings if kind == 'plain']
  tokens = windows_of(arguments.text, arguments.folder)
  rows: list[dict[str, Any]] = []
  console = Console(stderr=True)
  with Progress(
    *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
  ) as progress:
    total = len(settings) + 2 * len(plain) * bool(arguments.bfloat16)
    task = progress.add_task('', total=total)

    def measure(
      label: str,
      kernels: Mapping[str, np.ndarray],
      judge: Judge,
      settings: list[tuple[str, float]],
      place: str,
    ) -> list[dict[str, Any]]:
      made = []
      progress.update(task, description=label)
      axis = channel_axis(arguments.folder)
      for row in rows_of(kernels, judge, settings, axis, pathlib.Path(place)):
        made.append({'weights': label} | row)
        print(json.dumps(made[-1]), flush=True)
        progress.advance(task)
      return made

    with tempfile.TemporaryDirectory() as place:
      judge = Judge(arguments.folder, tokens, pathlib.Path(place))
      kernels = kernels_of(arguments.folder)
      dtype = next(iter(kernels.values())).dtype
      own = {'bits': 8 * dtype.itemsize, 'perplexity': judge.perplexity()}
      rows.append({'weights': dtype.name} | own)
      rows += measure(dtype.name, kernels, judge, settings, place)
      del judge, kernels
    if arguments.bfloat16:
      with tempfile.TemporaryDirectory() as place:
        judge = Judge(arguments.bfloat16, tokens, pathlib.Path(place))
        narrow = kernels_of(arguments.bfloat16)
        narrow_rows = measure('bfloat16', narrow, judge, plain, place)
        wide = {name: kernel.astype(np.float32) for name, kernel in narrow.items()}
        wide_rows = measure('the same values as float32', wide, judge, plain, place)
      for row in wide_rows:
        if 'error' in row:
          found = bits_at(row['error'], narrow_rows)
          row[RATIO] = round(found / row['bits'], 4) if found else 'not reached'
      rows += narrow_rows + wide_rows
  # in order, and none that no row has
  columns = [column for column in COLUMNS if any(row.get(column, '') != '' for row in rows)]
  rows = [{column: row.get(column, '') for column in columns} for row in rows]
  words = [f'--bits {" ".join(f"{bits:g}" for bits in arguments.bits)}']
  words += [f'--kinds {" ".join(arguments.kinds)}']
  words += ['--bfloat16 FOLDER_OF_BFLOAT16'] if arguments.bfloat16 else []
  command = (
    f'python -m experiments.benchmarks.accuracy.language_model FOLDER TEXT {" ".join(words)}'
  )
  count = sum(kernel.size for kernel in kernels_of(arguments.folder).values())
  harness.report(
    'language_model', f'a language model, {count / 1e6:.0f} M compressed weights', command, rows
  )


if __name__ == '__main__':
  main()
