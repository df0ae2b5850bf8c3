"""What an error in a table of embeddings costs beside the same error in kernels.

    pip install tokenizers torch transformers
    python -m experiments.benchmarks.accuracy.look_ups ENCODER_FOLDER \
      [--language_model FOLDER --text FILE]

`allocate` gives every leaf the term F = D / sqrt(S), with D its squared error and S its energy,
whether rows of it are looked up or it is multiplied.  Measured is the loss with the table alone
compressed, and with the kernels alone, on the grids of one allocation:

    price     loss / F of the table, over loss / F of the kernels: the factor of the table's F that
              the loss asks for, where it is linear in F
    together  loss with all compressed; and with the table's F times a factor, at equal bits

The loss is 1 - cosine of a sentence encoder's embeddings, and the KL divergence (nats a token) of a
language model's answers, whose table is compressed where it is looked up alone: its last layer
keeps the float table.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.accuracy import sentence_encoder
from opq_jax import importers, models

BITS = 2.0, 3.0
FACTORS = 0.125, 0.25, 0.5, 2.0, 4.0
SENTENCES, TOKENS, WINDOW = 96, 512, 128

Leaves = Mapping[str, np.ndarray]


class Model(NamedTuple):
  """A network with tables.

  Attributes:
    name: of the network.
    leaves: its matrices, by path.
    tables: paths of those that are looked up.
    axis: of the kernels' output channels.
    loss: (some leaves compressed) -> loss, 0 for none.
  """

  name: str
  leaves: Leaves
  tables: list[str]
  axis: int
  loss: Callable[[Leaves], float]


def encoder(folder: pathlib.Path) -> Model:
  """Returns the sentence encoder; without BERT's small tables, which stay as they are."""
  model = models.SentenceEncoder()
  tensors = load_file(folder / 'model.safetensors')
  params = importers.language_models.from_tensors(model, tensors).variables['params']
  texts = sentence_encoder.sentences()
  order = np.random.default_rng(0).permutation(len(texts))[:SENTENCES]
  tokens = sentence_encoder.tokens_of([texts[i] for i in order], folder / 'tokenizer.json')
  forward = jax.jit(lambda params: model.apply({'params': params}, tokens))
  expected = np.asarray(forward(params))

  def loss(changed: Leaves) -> float:
    tree = jax.tree.map(lambda leaf: leaf, params)
    for path, value in changed.items():
      name, _, kind = path.partition('/')
      tree[name][kind] = value
    return float(1 - np.sum(np.asarray(forward(tree)) * expected, axis=1).mean())

  leaves = {
    f'{name}/{kind}': own[kind]
    for name, own in params.items()
    for kind in ('kernel', 'embedding')
    if kind in own and name not in ('position', 'type')
  }
  return Model('MiniLM', leaves, ['word/embedding'], -1, loss)


def language_model(folder: pathlib.Path, text: pathlib.Path) -> Model:
  import torch
  import transformers
  from tokenizers import Tokenizer

  model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
  table = 'model.embed_tokens.weight'
  # untied: the last layer keeps the table
  model.model.embed_tokens.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokens = tokenizer.encode(text.read_text(), add_special_tokens=False).ids[:TOKENS]
  windows = torch.tensor(tokens).reshape(-1, WINDOW)
  parameters = dict(model.named_parameters())
  leaves = {
    name: value.detach().numpy().copy()
    for name, value in parameters.items()
    if value.ndim == 2 and name != 'lm_head.weight'
  }

  def answers() -> Any:
    with torch.inference_mode():
      return model(windows).logits.log_softmax(-1)

  def place(values: Leaves) -> None:
    with torch.no_grad():
      for name, value in values.items():
        parameters[name].copy_(torch.from_numpy(np.array(value)))

  expected = answers()

  def loss(changed: Leaves) -> float:
    place(changed)
    found = answers()
    place({name: leaves[name] for name in changed})
    return float((expected.exp() * (expected - found)).sum(-1).double().mean())

  return Model('SmolLM2-135M', leaves, [table], 0, loss)


def rows_of(model: Model) -> Iterator[dict[str, object]]:
  axis = lambda path, leaf: -1 if path in model.tables else model.axis
  statistics = {
    name: opq_jax.allocation.leaf_statistics(leaf, axis(name, leaf))
    for name, leaf in model.leaves.items()
  }
  energy = {
    name: float(np.sum(np.square(leaf), dtype=np.float64)) for name, leaf in model.leaves.items()
  }

  def coded(bits: float, factor: float) -> tuple[Leaves, Any]:
    omegas = {
      name: (factor if name in model.tables else 1.0) / np.sqrt(energy[name])
      for name in model.leaves
    }
    options: dict[str, Any] = {'bits_per_weight': bits, 'objective': omegas}
    allocation = opq_jax.allocate(statistics, compressible=lambda path, leaf: True, **options)
    state = opq_jax.init_state(dict(model.leaves), allocation)
    values = opq_jax.apply_compression(dict(model.leaves), state)
    return {name: np.asarray(value) for name, value in values.items()}, allocation

  for bits in BITS:
    values, allocation = coded(bits, 1.0)
    term = {
      name: float(allocation.tree[name].error) * np.sqrt(energy[name]) for name in model.leaves
    }
    is_table = lambda name: name in model.tables
    of_tables = model.loss({name: value for name, value in values.items() if is_table(name)})
    of_kernels = model.loss({name: value for name, value in values.items() if not is_table(name)})
    terms = [sum(x for name, x in term.items() if is_table(name) == kind) for kind in (True, False)]
    row = {'network': model.name, 'bits': f'{bits:g}'}
    report = lambda allocation, loss: {
      'bits of the table': round(float(allocation.tree[model.tables[0]].payload), 2),
      'together': float(f'{loss:.4g}'),
    }
    yield (
      row
      | {
        'table alone': float(f'{of_tables:.4g}'),
        'kernels alone': float(f'{of_kernels:.4g}'),
        'price': round((of_tables / terms[0]) / (of_kernels / terms[1]), 2),
        'factor': '1',
      }
      | report(allocation, model.loss(values))
    )
    for factor in FACTORS:
      values, allocation = coded(bits, factor)
      yield row | {'factor': f'{factor:g}'} | report(allocation, model.loss(values))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('encoder', type=pathlib.Path, help='of a sentence-transformers model')
  parser.add_argument('--language_model', type=pathlib.Path, help='of a Hugging Face model')
  parser.add_argument('--text', type=pathlib.Path)
  arguments = parser.parse_args()
  makers: list[Callable[[], Model]] = [lambda: encoder(arguments.encoder)]
  command = 'python -m experiments.benchmarks.accuracy.look_ups ENCODER_FOLDER'
  if arguments.language_model:
    makers.append(lambda: language_model(arguments.language_model, arguments.text))
    command += ' --language_model FOLDER --text FILE'
  rows = []
  for make in makers:
    for row in rows_of(make()):
      rows.append(row)
      print(json.dumps(row), flush=True)
  harness.report(
    'look_ups',
    'what an error in a table of embeddings costs',
    command,
    rows,
  )


if __name__ == '__main__':
  main()
