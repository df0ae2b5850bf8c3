"""Transformers whose matrices are compressed some at a time, and what that costs their answers."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from experiments.benchmarks.accuracy import sentence_encoder
from opq_jax import importers, models

SENTENCES, TOKENS, WINDOW = 96, 512, 128
SEQUENCES, SHORTEST = 48, 96  # of a folder's own sequences, and tokens of each

Leaves = Mapping[str, np.ndarray]


class Network(NamedTuple):
  """A network with a table of embeddings.

  Attributes:
    name: of the network.
    leaves: its matrices, by path.
    table: path of the one that is looked up.
    axis: of the kernels' output channels.
    loss: (some leaves compressed) -> loss, 0 for none.
  """

  name: str
  leaves: Leaves
  table: str
  axis: int
  loss: Callable[[Leaves], float]


def load(folder: pathlib.Path, text: pathlib.Path | None) -> Network:
  """Returns a sentence encoder or a language model, from a folder of the network's name.

  Args:
    folder: of a model of Hugging Face: BERT, or any language model.
    text: that a language model reads, where its folder has no `sequences.json`, lists of tokens.

  Raises:
    ValueError: a language model has no tokens to read.
  """
  config = json.loads((folder / 'config.json').read_text())
  if config['model_type'] == 'bert':
    return _encoder(folder, config)
  return _language_model(folder, config, _tokens(folder, text))


def _encoder(folder: pathlib.Path, config: Mapping[str, Any]) -> Network:
  """Returns a sentence encoder; without BERT's small tables, which stay as they are."""
  model = models.SentenceEncoder(layers=config['num_hidden_layers'])
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
    f'{name}/{kind}': np.asarray(own[kind])
    for name, own in params.items()
    for kind in ('kernel', 'embedding')
    if kind in own and name not in ('position', 'type')
  }
  return Network(folder.name, leaves, 'word/embedding', -1, loss)


def _tokens(folder: pathlib.Path, text: pathlib.Path | None) -> np.ndarray:
  """Returns [windows, length] of a folder's sequences, or of a text."""
  own = folder / 'sequences.json'
  if own.exists():
    found = [row[:SHORTEST] for row in json.loads(own.read_text()) if len(row) >= SHORTEST]
    return np.array(found[:: -(-len(found) // SEQUENCES)])
  if text is None:
    raise ValueError(f'{folder}: found no sequences.json, expected it or --text')
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokens = tokenizer.encode(text.read_text(), add_special_tokens=False).ids[:TOKENS]
  return np.array(tokens).reshape(-1, WINDOW)


def _language_model(folder: pathlib.Path, config: Mapping[str, Any], tokens: np.ndarray) -> Network:
  """Returns a language model whose last layer keeps the float table; positions stay as they are."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
  embeddings = model.get_input_embeddings()
  embeddings.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
  parameters = dict(model.named_parameters())
  table = next(name for name, value in parameters.items() if value is embeddings.weight)
  leaves = {
    name: value.detach().numpy().copy()
    for name, value in parameters.items()
    if value.ndim == 2 and not name.endswith(('lm_head.weight', 'wpe.weight'))
  }
  windows = torch.from_numpy(tokens)

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

  # GPT-2's matrices are laid out as in JAX, all others as in torch
  axis = -1 if config['model_type'] == 'gpt2' else 0
  return Network(folder.name, leaves, table, axis, loss)
