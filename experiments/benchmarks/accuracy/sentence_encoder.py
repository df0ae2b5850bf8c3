"""A held-out network, on which no default was chosen: a BERT sentence encoder, against NNCodec.

    pip install tokenizers
    python -m experiments.benchmarks.accuracy.sentence_encoder MODEL_FOLDER \
      --nncodec_python NNCODEC/bin/python

The folder is that of a sentence-transformers model such as all-MiniLM-L6-v2: `model.safetensors`,
`config.json` and `tokenizer.json`.  Without BatchNorm nothing is corrected.  Moments for error
feedback come from random tokens, or from sentences outside the test set, concatenated without
padding, since padding would count as any other token.  Block after block, codes are chosen for the
same sentences as `opq compress --calibration` does; `--calibrated` makes these rows alone, and
keeps the others.

Every codec is judged by the embeddings of the same sentences, means of the last layer over tokens,
normalised: their cosine with those of the float32 network (mean, and the 5 % worst), and how many
sentences keep their nearest neighbour.  The sentences are from the docstrings of Python's standard
library.
"""

import argparse
import importlib
import inspect
import json
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.rivals.nncodec_jobs import LAMBDA, NNCodec
from opq_jax import importers, language, models, weights
from opq_jax.core import trees
from opq_jax.report import accuracy

BITS = 4.0, 3.0, 2.5, 2.0
QPS = -33, -30, -27, -24
TUNED_QPS = -30, -27, -24
JUDGED, UNLABELLED, LENGTH = 512, 256, 48
BEGIN, END, FIRST_WORD = 101, 102, 999  # of BERT's uncased vocabulary
MODULES = (
  *('argparse', 'ast', 'asyncio', 'calendar', 'collections', 'configparser', 'csv', 'datetime'),
  *('decimal', 'difflib', 'email.message', 'fractions', 'functools', 'gzip', 'heapq'),
  *('http.client', 'inspect', 'ipaddress', 'json', 'logging', 'mailbox', 'os', 'pathlib', 'pdb'),
  *('random', 're', 'shutil', 'smtplib', 'socket', 'sqlite3', 'ssl', 'statistics', 'string'),
  *('subprocess', 'tarfile', 'tempfile', 'textwrap', 'threading', 'turtle', 'typing', 'unittest'),
  *('urllib.request', 'uuid', 'wave', 'weakref', 'xml.dom.minidom', 'xml.etree.ElementTree'),
  'zipfile',
)


def sentences() -> list[str]:
  """Returns sentences of 6 to 40 words from docstrings of Python's modules, in a fixed order.

  >>> texts = sentences()
  >>> len(texts) > 1000, len(set(texts)) == len(texts)
  (True, True)
  """
  chosen: dict[str, None] = {}
  for name in MODULES:
    module = importlib.import_module(name)
    with warnings.catch_warnings():
      # members of some modules warn that they are deprecated when their docstring is read
      warnings.simplefilter('ignore', DeprecationWarning)
      members = [thing for _, thing in sorted(vars(module).items())]
      members = [thing for thing in members if inspect.isclass(thing) or inspect.isfunction(thing)]
      texts = [inspect.getdoc(thing) or '' for thing in (module, *members)]
    for text in texts:
      for sentence in re.split(r'(?<=[.!?])\s+|\n\n', text):
        words = sentence.split()
        if 6 <= len(words) <= 40 and words[0][:1].isupper() and sentence.endswith('.'):
          chosen[' '.join(words)] = None
  return list(chosen)


def tokens_of(texts: list[str], path: pathlib.Path) -> np.ndarray:
  """Returns the tokens of texts, [texts, LENGTH], padded with 0."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(path))
  tokenizer.enable_truncation(LENGTH)
  tokenizer.enable_padding(length=LENGTH, pad_id=0)
  return np.array([encoded.ids for encoded in tokenizer.encode_batch(texts)], np.int32)


def scores(found: np.ndarray, expected: np.ndarray) -> dict[str, object]:
  """Compares embeddings with those of the float32 network.

  >>> scores(np.eye(3), np.eye(3))['cosine']
  1.0
  """
  cosine = np.sum(found * expected, axis=1)
  nearest = lambda x: np.argmax(x @ x.T - 2 * np.eye(len(x)), axis=1)
  same = nearest(found) == nearest(expected)
  low, high = accuracy.interval(int(same.sum()), len(same))
  return {
    'cosine': round(float(cosine.mean()), 4),
    'cosine of the worst 5 %': round(float(np.quantile(cosine, 0.05)), 4),
    'same neighbour, % (95 %)': f'{100 * same.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})',
  }


def compare(
  folder: pathlib.Path, python: str, calibrated: list[float] | None
) -> Iterator[dict[str, object]]:
  model = models.SentenceEncoder()
  tensors = load_file(folder / 'model.safetensors')
  variables_of = lambda found: importers.language_models.from_tensors(model, found).variables
  variables = variables_of(tensors)
  texts = sentences()
  # of every module some: those that are judged, and those that moments are from
  rng = np.random.default_rng(0)
  tokens = tokens_of([texts[i] for i in rng.permutation(len(texts))], folder / 'tokenizer.json')
  judged, others = tokens[:JUDGED], tokens[JUDGED:]
  unlabelled = others[others > 0][: UNLABELLED * LENGTH].reshape(-1, LENGTH)
  drawn = rng.integers(FIRST_WORD, model.vocabulary, unlabelled.shape)
  drawn[:, 0], drawn[:, -1] = BEGIN, END
  forward = jax.jit(model.apply)
  embeddings = lambda tree: np.concatenate(
    [np.asarray(forward(tree, part)) for part in np.split(judged, 8)]
  )
  expected = embeddings(variables)
  leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(variables).items()}
  whole = sum(leaf.nbytes for leaf in leaves.values())

  def row(method: str, setting: str, tree: Any, size: int) -> dict[str, object]:
    sizes = {'file, bytes': f'{size:,}', 'times smaller': round(whole / size, 2)}
    return {'codec': method, 'setting': setting} | sizes | scores(embeddings(tree), expected)

  for bits in BITS if calibrated is None else calibrated:
    for label, encoder in (
      ('block after block', opq_jax.encoders.Feedback({})),
      ('block after block, trellis', opq_jax.encoders.Trellis()),
    ):
      with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place) / 'encoder.opq'
        stored = weights.open_folder(folder).leaves
        language.compress_calibrated(
          language.stored_network(model, stored),
          stored,
          path,
          language.Calibration('text', unlabelled),
          encoder=encoder,
          bits_per_weight=bits,
          channel_axis=weights.channel_axis,
        )
        with opq_jax.OpqFile(path) as file:
          tree = variables_of(file.params())
        yield row(f'opq_jax, {label}, from sentences', f'{bits:g} bits', tree, path.stat().st_size)
  if calibrated is not None:
    return
  moments = {
    'random tokens': opq_jax.network.second_moments(model.apply, variables, drawn),
    'sentences': opq_jax.network.second_moments(model.apply, variables, unlabelled),
  }
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / 'encoder.opq'

    def decoded(tree: Any, state: opq_jax.CompressionState) -> tuple[Any, int]:
      opq_jax.save(path, tree, state)
      return opq_jax.load(path)[0], path.stat().st_size

    for bits in BITS:
      setting = f'{bits:g} bits'
      state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / bits))
      yield row('opq_jax', setting, *decoded(variables, state))
      for label, matrices in (
        ('trellis', None),
        *((f'trellis, feedback from {kind}', matrices) for kind, matrices in moments.items()),
      ):
        trellis = opq_jax.encoders.Trellis(matrices)
        tree, state, _ = opq_jax.compress(variables, compression_rate=32 / bits, encoder=trellis)
        yield row(f'opq_jax, {label}', setting, *decoded(tree, state))
    nncodec = NNCodec(python, pathlib.Path(place))
    for method, qps, more in (
      ('NNCodec', QPS, {}),
      ('NNCodec, tuned', TUNED_QPS, {'lambda_scale': LAMBDA}),
    ):
      for qp in qps:
        found, answer = nncodec(leaves, {'qp': qp, **more})
        yield row(method, f'qp={qp}', trees.replaced(variables, found), answer['bytes'])
    nncodec.close()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a sentence-transformers model')
  parser.add_argument('--nncodec_python', default=sys.executable)
  parser.add_argument('--calibrated', type=float, nargs='+', help='bits of these rows alone')
  arguments = parser.parse_args()
  rows = []
  for row in compare(arguments.folder, arguments.nncodec_python, arguments.calibrated):
    rows.append(row)
    print(json.dumps(row), flush=True)
  if arguments.calibrated is not None:
    rows = harness.with_earlier('sentence_encoder', rows, ['codec', 'setting'])
  command = 'python -m experiments.benchmarks.accuracy.sentence_encoder MODEL_FOLDER'
  harness.report(
    'sentence_encoder',
    'a BERT encoder of sentences',
    f'{command} --nncodec_python NNCODEC/bin/python',
    rows,
  )


if __name__ == '__main__':
  main()
