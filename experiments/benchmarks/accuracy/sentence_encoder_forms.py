"""One network in the forms that people write it in: the same grids, bytes and embeddings.

    pip install tokenizers
    python -m experiments.benchmarks.accuracy.sentence_encoder_forms MODEL_FOLDER \
      [--forms dense scan ...] [--codes plain feedback 'layer by layer']

The folder is that of `experiments.benchmarks.accuracy.sentence_encoder`, and so are the sentences.
Every form of `encoder_forms` has the same float weights.  Leaves, slices and channels are those
that `opq_jax.usage` finds.  Rows of forms and codes that are not asked for are kept.  Each row
compares a form with `dense`, whose layers are `nn.Dense`:

    grids        how many matrices have the same step and threshold within 0.1 %
    bits off     largest difference of a matrix's bits a weight
    codes        bytes of all leaves in the file, without names and headers
    cosine       mean over sentences of the cosine with the float network's embeddings
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.accuracy import encoder_forms, sentence_encoder
from experiments.benchmarks.accuracy.encoder_forms import Form, Grid
from opq_jax import encoders, importers, models

BITS = 3.0, 2.0
CODES = 'plain', 'feedback', 'layer by layer'
JUDGED, UNLABELLED = 128, 128  # sentences, and rows of LENGTH tokens
SAME = 1e-3  # of a step or threshold, relative: the search for a rate ends within 1e-4 of it


def rows_of(
  folder: pathlib.Path, names: list[str], kinds: list[str]
) -> Iterator[dict[str, object]]:
  """Yields a row for every form, kind of codes and number of bits; `dense` comes first."""
  model = models.SentenceEncoder()
  tensors = load_file(folder / 'model.safetensors')
  canonical = importers.language_models.from_tensors(model, tensors).variables['params']
  texts = sentence_encoder.sentences()
  order = np.random.default_rng(0).permutation(len(texts))
  tokens = sentence_encoder.tokens_of([texts[i] for i in order], folder / 'tokenizer.json')
  judged, others = tokens[:JUDGED], tokens[JUDGED:]
  length = sentence_encoder.LENGTH
  unlabelled = others[others > 0][: UNLABELLED * length].reshape(-1, length)
  expected: Any = None
  dense: dict[tuple[str, float], dict[str, Grid]] = {}
  for name in ['dense', *(name for name in names if name != 'dense')]:
    form = encoder_forms.form(name, canonical, model.heads)
    forward = jax.jit(form.fn)
    found = np.asarray(forward(form.params, judged))
    if expected is None:
      expected = found
    np.testing.assert_allclose(found, expected, atol=1e-5)
    used = opq_jax.usage(form.fn, form.params, judged)
    moments = None
    if set(kinds) - {'plain'}:
      moments = opq_jax.network.second_moments(form.fn, form.params, unlabelled)
    for kind in kinds:
      encoder = encoder_of(kind, form, moments, unlabelled)
      for bits in BITS:
        tree, state, allocation = opq_jax.compress(
          form.params, bits_per_weight=bits, encoder=encoder, usage=used
        )
        grids = encoder_forms.grids(form, allocation)
        row: dict[str, object] = {'form': name, 'codes': kind, 'bits asked': f'{bits:g}'}
        row |= differences(grids, dense.setdefault((kind, bits), grids)) | bytes_of(tree, state)
        cosine = np.sum(np.asarray(forward(tree, judged)) * expected, axis=1)
        yield row | {'cosine': round(float(cosine.mean()), 5)}


def encoder_of(kind: str, form: Form, moments: Any, tokens: np.ndarray) -> encoders.Encoder:
  if kind == 'plain':
    return encoders.Rounding()
  feedback = encoders.Feedback(moments)
  if kind == 'feedback':
    return feedback
  return encoders.LayerByLayer(form.fn, tokens, first=feedback)


def differences(grids: dict[str, Grid], dense: dict[str, Grid]) -> dict[str, object]:
  """Compares the grids of a form with those of `dense`.

  >>> differences({'a': Grid(1.0, 2.0, 3.01)}, {'a': Grid(1.0, 2.0, 3.0)})
  {'grids': '1 of 1', 'bits off': 0.01}
  """
  same, off = 0, 0.0
  for name, grid in grids.items():
    one, other = np.array(grid), np.array(dense[name])
    same += bool(np.allclose(one[:2], other[:2], rtol=SAME, atol=0))
    off = max(off, abs(grid.payload - dense[name].payload))
  return {'grids': f'{same} of {len(grids)}', 'bits off': float(f'{off:.2g}')}


def bytes_of(tree: Any, state: opq_jax.CompressionState) -> dict[str, object]:
  """Returns the bytes of the file of a network."""
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / 'encoder.opq'
    opq_jax.save(path, tree, state)
    with opq_jax.OpqFile(path) as file:
      stored = sum(file.sizes().values())
    return {'file, bytes': f'{path.stat().st_size:,}', 'codes, bytes': f'{stored:,}'}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a sentence-transformers model')
  names = list(encoder_forms.FORMS)
  parser.add_argument('--forms', nargs='+', choices=names, default=names)
  parser.add_argument('--codes', nargs='+', choices=CODES, default=list(CODES))
  arguments = parser.parse_args()
  rows = []
  for row in rows_of(arguments.folder, arguments.forms, arguments.codes):
    rows.append(row)
    print(json.dumps(row), flush=True)
  rows = harness.with_earlier('sentence_encoder_forms', rows, ['form', 'codes', 'bits asked'])
  order = lambda row: (names.index(str(row['form'])), CODES.index(str(row['codes'])))
  module = 'experiments.benchmarks.accuracy.sentence_encoder_forms'
  harness.report(
    'sentence_encoder_forms',
    'a BERT encoder of sentences in several forms',
    f'python -m {module} MODEL_FOLDER',
    sorted(rows, key=order),
  )


if __name__ == '__main__':
  main()
