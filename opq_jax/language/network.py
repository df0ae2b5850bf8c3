"""A language model whose weights stay on disk and are read block by block."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opq_jax import models
from opq_jax.core.trees import PyTree
from opq_jax.importers import language_models

_LAYERS = 'params/layers/'


@dataclasses.dataclass(frozen=True)
class Block:
  """One layer of a language model: block(params, hidden states, context) -> hidden states.

  Equal, and so one compiled program, for all layers of a model.
  """

  model: models.Decoder

  def __call__(
    self, params: PyTree, x: Float[Array, 'sequences length features'], context: Any
  ) -> Float[Array, 'sequences length features']:
    """Returns the hidden states that the next layer reads."""
    kind, attributes = self.model.block()
    return kind(**attributes).apply({'params': params}, x, None, context)[0]


@dataclasses.dataclass(frozen=True)
class Head:
  """What follows the last layer: head(params, hidden states) -> logits."""

  model: models.Decoder

  def __call__(
    self, params: PyTree, x: Float[Array, 'sequences length features']
  ) -> Float[Array, 'sequences length vocabulary']:
    """Returns the logits of the token after each token."""
    logits: Any = self.model.apply(
      {'params': params}, x, method=lambda module, x: module.logits(module.norm(x))
    )
    return logits


@dataclasses.dataclass(frozen=True)
class Start:
  """What precedes the first layer: start(params, tokens) -> hidden states and context."""

  model: models.Decoder

  def __call__(
    self, params: PyTree, tokens: Int[Array, 'sequences length']
  ) -> tuple[Float[Array, 'sequences length features'], Any]:
    """Returns what the first layer reads, and what every layer needs to know of the places."""

    def start(module: Any, tokens: Array) -> tuple[Array, Any]:
      return module.placed(module.embed(tokens), jnp.arange(tokens.shape[1]))

    x, context = self.model.apply({'params': params}, tokens, method=start)
    return x, (jnp.int32(0), context)


@dataclasses.dataclass(frozen=True)
class StoredNetwork:
  """A language model and the tensors of its leaves on disk.

  Attributes:
    model: the network; it computes in float32.
    tensors: arrays or `opq_jax.weights.StoredLeaf`s by their names in the file.
    names: those names by the full names of transformers.
    places: the tensors of every leaf of the variables, by its path.
    ignored: names of tensors that are no weights of the network, or are tied to another.
    tied: of those that are another one again, the name of that one.
  """

  model: models.Decoder
  tensors: Mapping[str, Any]
  names: Mapping[str, str]
  places: Mapping[str, language_models.Place]
  ignored: tuple[str, ...]
  tied: Mapping[str, str]

  @property
  def depth(self) -> int:
    """Number of layers."""
    return self.model.depth

  def layer(self, number: int) -> PyTree:
    """Reads the parameters of a layer, as `Block` takes them, in float32."""
    return self._tree(number)

  def outer(self) -> PyTree:
    """Reads the parameters outside of the layers, as `Start` and `Head` take them, in float32."""
    return self._tree(None)

  def context(self, length: int) -> Any:
    """Returns what every layer needs to know of the places 0, 1, ... of a sequence."""
    shapes = models.variable_shapes(self.model)['params']

    def context() -> Any:
      # compiled, zeros that the context does not depend on are never made
      zeros = {
        name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tree)
        for name, tree in shapes.items()
        if name != 'layers'
      }
      return Start(self.model)(zeros, jnp.zeros((1, length), jnp.int32))[1]

    return jax.jit(context)()

  def site(self, path: str, layer: int | None) -> 'Site':
    """Returns which tensor a leaf of `layer(number)` is, or of `outer()`, with None for a layer."""
    place = self.places[_prefix(layer) + path]
    name = self.names[place.names[layer if place.is_stacked and layer is not None else 0]]
    return Site(name, place.is_transposed)

  def _tree(self, layer: int | None) -> PyTree:
    tree: dict[str, Any] = {}
    for path in self.places:
      if path.startswith(_LAYERS) != (layer is not None):
        continue
      path = path.removeprefix(_prefix(layer))
      site = self.site(path, layer)
      tensor = language_models.read(self.tensors[site.name])
      *parents, name = path.split('/')
      node = tree
      for parent in parents:
        node = node.setdefault(parent, {})
      node[name] = jnp.asarray(tensor.T if site.is_transposed else tensor, jnp.float32)
    return tree


class Site(NamedTuple):
  """The tensor of a leaf.

  Attributes:
    name: in the file.
    is_transposed: whether the tensor is [out, in], and the leaf [in, out].
  """

  name: str
  is_transposed: bool


def stored_network(model: models.Decoder, tensors: Mapping[str, Any]) -> StoredNetwork:
  """Returns a language model with its weights on disk.

  Args:
    model: the network.
    tensors: arrays or `opq_jax.weights.StoredLeaf`s by the names of transformers.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape.
  """
  found = language_models.matched(model, tensors)
  model = model.clone(dtype=jnp.float32)
  places = language_models.places(model)
  return StoredNetwork(model, tensors, found.names, places, found.ignored, found.tied)


def _prefix(layer: int | None) -> str:
  return 'params/' if layer is None else _LAYERS


applied = jax.jit(lambda function, *arguments: function(*arguments), static_argnums=0)
"""function(*arguments), compiled: once for all functions that are equal."""
