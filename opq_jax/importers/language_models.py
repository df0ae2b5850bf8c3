"""Weights of the networks that read tokens, under the names of Hugging Face's transformers.

Dense kernels of PyTorch are [out, in], those of Flax [in, out].  Where a network of
`opq_jax.models` scans over its layers, a leaf holds the tensors of all layers, stacked along its
first axis.  Dtypes stay: what comes in as bfloat16 goes out bit for bit.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax import models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.importers import conversion
from opq_jax.importers.layouts import Shape

if TYPE_CHECKING:
  import flax.linen as nn

_LEAVES = {'kernel': 'weight', 'bias': 'bias', 'scale': 'weight', 'embedding': 'weight'}
_NUMBER = re.compile(r'\d+')


class Family(NamedTuple):
  """The names of one family of networks.

  Attributes:
    base: the module of the network without its head, with a dot; files of that part alone lack it.
    modules: from the path of a Flax layer, its number replaced by '#', to the module in PyTorch.
      A path without '#' whose module has one is a stack of all layers.
    ignored: what matches the whole names of tensors that are no weights of the network.
    tied: from the name of a tensor that a network without it shares, to the name that it has.
    is_conv1d: whether kernels of layers are [in, out], as in GPT-2's `Conv1D`.
  """

  base: str
  modules: Mapping[str, str]
  ignored: str
  tied: Mapping[str, str] = {}
  is_conv1d: bool = False


BERT = Family(
  'bert.',
  {
    'word': 'bert.embeddings.word_embeddings',
    'position': 'bert.embeddings.position_embeddings',
    'type': 'bert.embeddings.token_type_embeddings',
    'norm': 'bert.embeddings.LayerNorm',
    **{
      f'#_{name}': f'bert.encoder.layer.#.attention.self.{name}'
      for name in ('query', 'key', 'value')
    },
    '#_out': 'bert.encoder.layer.#.attention.output.dense',
    '#_norm': 'bert.encoder.layer.#.attention.output.LayerNorm',
    '#_up': 'bert.encoder.layer.#.intermediate.dense',
    '#_down': 'bert.encoder.layer.#.output.dense',
    '#_last_norm': 'bert.encoder.layer.#.output.LayerNorm',
  },
  r'(bert\.)?(embeddings\.position_ids|pooler\..*)|cls\..*',
)

LLAMA = Family(
  'model.',
  {
    'embed': 'model.embed_tokens',
    'norm': 'model.norm',
    'head': 'lm_head',
    'layers/attention_norm': 'model.layers.#.input_layernorm',
    'layers/hidden_norm': 'model.layers.#.post_attention_layernorm',
    'layers/out': 'model.layers.#.self_attn.o_proj',
    **{
      f'layers/{ours}': f'model.layers.#.self_attn.{theirs}'
      for name, short in (('query', 'q'), ('key', 'k'), ('value', 'v'))
      for ours, theirs in ((name, f'{short}_proj'), (f'{name}_norm', f'{short}_norm'))
    },
    **{f'layers/{name}': f'model.layers.#.mlp.{name}_proj' for name in ('gate', 'up', 'down')},
  },
  r'(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq',
  {'lm_head.weight': 'model.embed_tokens.weight'},
)

GPT2 = Family(
  'transformer.',
  {
    'embed': 'transformer.wte',
    'position': 'transformer.wpe',
    'norm': 'transformer.ln_f',
    'head': 'lm_head',
    'layers/attention_norm': 'transformer.h.#.ln_1',
    'layers/attention': 'transformer.h.#.attn.c_attn',
    'layers/out': 'transformer.h.#.attn.c_proj',
    'layers/hidden_norm': 'transformer.h.#.ln_2',
    'layers/up': 'transformer.h.#.mlp.c_fc',
    'layers/down': 'transformer.h.#.mlp.c_proj',
  },
  # masks
  r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',
  {'lm_head.weight': 'transformer.wte.weight'},
  is_conv1d=True,
)

_FAMILIES = {'SentenceEncoder': BERT, 'Llama': LLAMA, 'GPT2': GPT2}
"""The family of each class of `opq_jax.models`."""


class Weights(NamedTuple):
  """Imported weights.

  Attributes:
    variables: `{'params': …}`, in the dtypes of the tensors.
    ignored: names of the tensors that are no weights of the network, such as BERT's pooler.
  """

  variables: dict[str, Any]
  ignored: tuple[str, ...]


class Place(NamedTuple):
  """The tensors of a leaf.

  Attributes:
    shape: of the leaf.
    names: one, or those of all layers, which are stacked.
    is_stacked: whether the first axis of the leaf counts the tensors.
    is_transposed: whether a tensor is [out, in].
  """

  shape: Shape
  names: tuple[str, ...]
  is_stacked: bool
  is_transposed: bool

  @property
  def source_shape(self) -> Shape:
    """Shape of one tensor."""
    shape = self.shape[1:] if self.is_stacked else self.shape
    return shape[::-1] if self.is_transposed else shape


def places(model: 'nn.Module') -> dict[str, Place]:
  """Returns the tensors of every leaf of a network's variables, by the leaf's path."""
  family = _family(model)
  leaves = trees.named_leaves(models.variable_shapes(model))
  return {name: _place(family, name, leaf.shape) for name, leaf in leaves.items()}


def from_tensors(model: 'nn.Module', tensors: Mapping[str, Any]) -> Weights:
  """Returns the variables of a network that reads tokens, from the tensors of transformers.

  Args:
    model: the network.
    tensors: arrays by name, or `opq_jax.weights.StoredLeaf`s, of which one at a time is read.
      Names may lack the base model's prefix, such as 'bert.'.

  Raises:
    ValueError: tensors are missing, unexpected, of another shape, or layers of one leaf differ in
      dtype; the message lists all of them.
  """
  found = matched(model, tensors)
  arrays = [
    jnp.asarray(_leaf(path, place, lambda name: read(tensors[found.names[name]])))
    for path, place in places(model).items()
  ]
  return Weights(
    jax.tree.unflatten(jax.tree.structure(models.variable_shapes(model)), arrays), found.ignored
  )


def traced_variables(
  model: 'nn.Module', tensors: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the variables of `from_tensors` as a function of the tensors that JAX can trace.

  Args:
    model: the network.
    tensors: arrays by name.
    names: their names in `tensors` by their full names, of `matched`.
  """
  arrays = []
  for place in places(model).values():
    found = [jnp.asarray(tensors[names[name]]) for name in place.names]
    found = [array.T if place.is_transposed else array for array in found]
    arrays.append(jnp.stack(found) if place.is_stacked else found[0])
  return jax.tree.unflatten(jax.tree.structure(models.variable_shapes(model)), arrays)


class Matched(NamedTuple):
  """The tensors of a file as those of a network.

  Attributes:
    names: their names in the file, by their full names.
    ignored: names in the file of those that are no weights of the network, or are tied to another.
    tied: of tensors that are another one again, the name of that one, both in the file.
  """

  names: dict[str, str]
  ignored: tuple[str, ...]
  tied: dict[str, str]


def matched(model: 'nn.Module', tensors: Mapping[str, Any]) -> Matched:
  """Returns which tensors of a file are which of a network.

  Args:
    model: the network.
    tensors: as for `from_tensors`.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; the message lists all of them.
  """
  family = _family(model)
  expected = {name: place.source_shape for place in places(model).values() for name in place.names}
  based = {_based(family, expected, name): name for name in tensors}
  ignored = [name for full, name in based.items() if re.fullmatch(family.ignored, full)]
  tied = {}
  for alias, original in family.tied.items():
    if alias in based and alias not in expected and original in based:
      if not np.array_equal(read(tensors[based[alias]]), read(tensors[based[original]])):
        raise ValueError(
          f'{alias}: found other values than those of {original}, expected the same: '
          'tie_word_embeddings of the configuration says that they are tied'
        )
      ignored.append(based[alias])
      tied[based[alias]] = based[original]
  found = {full: np.shape(tensors[name]) for full, name in based.items() if name not in ignored}
  lines = conversion.differences(found, expected)
  if lines:
    raise ValueError('\n'.join([f'the tensors are not those of {_description(model)}:', *lines]))
  names = {full: name for full, name in based.items() if full in found}
  return Matched(names, tuple(ignored), tied)


def to_tensors(
  model: 'nn.Module', variables: PyTree, *, with_base: bool = True
) -> dict[str, np.ndarray]:
  """Returns variables as the named tensors of transformers: the inverse of `from_tensors`.

  Args:
    model: the network.
    variables: its variables, or a flat dict of them by path; compressed or not.
    with_base: whether names begin with the base model's prefix, such as 'bert.'.

  Raises:
    ValueError: leaves are missing, unexpected or of another shape; the message lists all of them.
  """
  family, found = _family(model), trees.named_leaves(variables)
  check(model, found)
  tensors = {}
  for path, place in places(model).items():
    array = np.asarray(found[path])
    for name, tensor in zip(place.names, array if place.is_stacked else [array], strict=True):
      name = name if with_base else name.removeprefix(family.base)
      # copied: JAX's memory is read-only, and a transposed array is not contiguous
      tensors[name] = np.array(tensor.T if place.is_transposed else tensor, order='C')
  return tensors


def check(model: 'nn.Module', leaves: Mapping[str, Any]) -> None:
  """Raises a ValueError that lists every difference unless leaves by path are a network's."""
  lines = conversion.differences(
    {name: np.shape(leaf) for name, leaf in leaves.items()},
    {name: place.shape for name, place in places(model).items()},
  )
  if lines:
    raise ValueError('\n'.join([f'the variables are not those of {_description(model)}:', *lines]))


def read(tensor: Any) -> np.ndarray:
  """Returns an array, or that of a `StoredLeaf`."""
  return tensor.read() if hasattr(tensor, 'read') else np.asarray(tensor)


def _leaf(path: str, place: Place, tensor: Callable[[str], np.ndarray]) -> np.ndarray:
  """Returns a leaf of its tensors, of which one at a time is read."""
  leaf: np.ndarray | None = None
  for number, name in enumerate(place.names):
    array = tensor(name)
    array = array.T if place.is_transposed else array
    if leaf is None:
      leaf = np.empty(place.shape, array.dtype)
    elif leaf.dtype != array.dtype:
      raise ValueError(
        f'{name}: found {array.dtype}, expected {leaf.dtype} as in {place.names[0]}: all layers '
        f'are one leaf, {path}'
      )
    leaf[number if place.is_stacked else ...] = array
  assert leaf is not None
  return leaf


def _place(family: Family, path: str, shape: Shape) -> Place:
  layer, _, kind = path.removeprefix('params/').rpartition('/')
  number = _NUMBER.search(layer)
  module = family.modules[_NUMBER.sub('#', layer)]
  is_stacked = '#' in module and number is None
  layers = range(shape[0]) if is_stacked else [number.group()] if number else ['']
  names = tuple(f'{module.replace("#", str(layer))}.{_LEAVES[kind]}' for layer in layers)
  is_transposed = kind == 'kernel' and not (family.is_conv1d and '#' in module)
  return Place(tuple(shape), names, is_stacked, is_transposed)


def _family(model: 'nn.Module') -> Family:
  name = type(model).__name__
  if name not in _FAMILIES:
    raise ValueError(f'model: found {name}, expected one of {", ".join(_FAMILIES)}')
  return _FAMILIES[name]


def _based(family: Family, expected: Mapping[str, Shape], name: str) -> str:
  """Returns the full name of a tensor, which may lack the prefix of the base model."""
  return family.base + name if name not in expected and family.base + name in expected else name


def _description(model: 'nn.Module') -> str:
  return f'a {type(model).__name__} of transformers'
