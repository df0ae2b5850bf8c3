"""A network that reads tokens, whose weights stay on disk and are read block by block."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opq_jax import models
from opq_jax.core.trees import PyTree
from opq_jax.importers import language_models
from opq_jax.language.parts import Network, Start

_LAYERS = 'params/layers/'
_NUMBERED = re.compile(r'params/\d+_')  # paths of layers that are no stack


@dataclasses.dataclass(frozen=True)
class StoredNetwork:
  """A language model, or an encoder of sentences, and the tensors of its leaves on disk.

  Attributes:
    model: the network; it computes in float32.
    tensors: arrays or `opq_jax.weights.StoredLeaf`s by their names in the file.
    names: those names by the full names of transformers.
    places: the tensors of every leaf of the variables, by its path.
    ignored: names of tensors that are no weights of the network, or are tied to another.
    tied: of those that are another one again, the name of that one.
  """

  model: Network
  tensors: Mapping[str, Any]
  names: Mapping[str, str]
  places: Mapping[str, language_models.Place]
  ignored: tuple[str, ...]
  tied: Mapping[str, str]

  @property
  def depth(self) -> int:
    """Number of layers."""
    if isinstance(self.model, models.SentenceEncoder):
      return self.model.layers
    return self.model.depth

  @property
  def has_head(self) -> bool:
    """Whether a leaf follows the layers that is no table which is looked up too."""
    return isinstance(self.model, models.Decoder) and not self.model.is_tied

  def layer(self, number: int) -> PyTree:
    """Reads the parameters of a layer, as `Block` takes them, in float32."""
    return self._tree(number)

  def outer(self) -> PyTree:
    """Reads the parameters outside of the layers, as `Start` and `Head` take them, in float32."""
    return self._tree(None)

  def context(self, length: int) -> Any:
    """Returns what every layer needs to know of the places 0, 1, ... of a sequence."""
    if isinstance(self.model, models.SentenceEncoder):
      return None
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
    place = self.places[self._prefix(layer) + path]
    name = self.names[place.names[layer if place.is_stacked and layer is not None else 0]]
    return Site(name, place.is_transposed)

  def _tree(self, layer: int | None) -> PyTree:
    tree: dict[str, Any] = {}
    for path in self.places:
      prefix = self._prefix(layer)
      is_of_layer = path.startswith(_LAYERS) or _NUMBERED.match(path) is not None
      if is_of_layer != (layer is not None) or not path.startswith(prefix):
        continue
      path = path.removeprefix(prefix)
      site = self.site(path, layer)
      tensor = language_models.read(self.tensors[site.name])
      *parents, name = path.split('/')
      node = tree
      for parent in parents:
        node = node.setdefault(parent, {})
      node[name] = jnp.asarray(tensor.T if site.is_transposed else tensor, jnp.float32)
    return tree

  def _prefix(self, layer: int | None) -> str:
    """Returns what the paths of the leaves of a layer begin with, or of those outside of layers."""
    if layer is None:
      return 'params/'
    return f'params/{layer}_' if isinstance(self.model, models.SentenceEncoder) else _LAYERS


class Site(NamedTuple):
  """The tensor of a leaf.

  Attributes:
    name: in the file.
    is_transposed: whether the tensor is [out, in], and the leaf [in, out].
  """

  name: str
  is_transposed: bool


def stored_network(model: Network, tensors: Mapping[str, Any]) -> StoredNetwork:
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
