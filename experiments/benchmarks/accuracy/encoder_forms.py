"""One BERT sentence encoder in the forms that people write it in.

Each form is a function of the canonical variables, those of `opq_jax.models.SentenceEncoder`,
whose layers are `nn.Dense` apart:

    dense          the canonical form itself
    heads          Linen's `MultiHeadDotProductAttention`: kernels [features, heads, dim]
    scan           layers of `nn.Dense` under `nn.scan(nn.remat(...))`: one leaf for all layers
    scan of heads  the layers of `heads` under `nn.scan(nn.remat(...))`
    NNX            `nnx.Linear` and `nnx.MultiHeadAttention`, a list of layers
    NNX scan       the same layers from `nnx.vmap`, under `nnx.scan`
    Equinox        `eqx.nn.Linear` and `eqx.nn.MultiheadAttention`: kernels [outputs, inputs]

Linear layers of all layers are looked up in every form by their canonical names (`Place`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import opq_jax
from opq_jax.allocation import LeafAllocation
from opq_jax.core import trees
from opq_jax.models import SentenceEncoder

Tree = dict[str, Any]
PROJECTIONS = 'query', 'key', 'value'
TABLES = 'word', 'position', 'type'
EPSILON = SentenceEncoder.epsilon


class Place(NamedTuple):
  """Where a form keeps a matrix: the path of its leaf, and of a stack the number of the slice."""

  path: str
  slice: int | None = None


class Form(NamedTuple):
  """A form of the encoder.

  Attributes:
    params: its parameters.
    fn: (params, tokens) -> embeddings.
    places: canonical name of a matrix ('0_query') -> where it is.
  """

  params: Any
  fn: Callable[[Any, jax.Array], jax.Array]
  places: Mapping[str, Place]


def layers_of(canonical: Tree) -> int:
  """Returns the number of layers."""
  return sum(name.endswith('_query') for name in canonical)


def form(name: str, canonical: Tree, heads: int) -> Form:
  """Returns a form of the encoder whose canonical parameters are given."""
  return FORMS[name](canonical, heads)


class Grid(NamedTuple):
  """What is chosen for one matrix: step, threshold, and bits of a weight in the file."""

  step: float
  threshold: float
  payload: float


def grids(form: Form, allocation: opq_jax.Allocation) -> dict[str, Grid]:
  """Returns the grids of all matrices of a form, by canonical name."""
  records = trees.records(form.params, allocation.tree, LeafAllocation)
  by_path = dict(zip(trees.named_leaves(form.params), records, strict=True))

  def grid(place: Place) -> Grid:
    record = by_path[place.path]
    fields = (getattr(record, field) for field in Grid._fields)
    return Grid(*(float(x if place.slice is None else x[place.slice]) for x in fields))

  return {name: grid(place) for name, place in form.places.items()}


def pooled(x: jax.Array, is_there: jax.Array) -> jax.Array:
  """Returns the normalised mean of the last hidden states over the tokens of each sentence."""
  mean = jnp.where(is_there[..., None], x, 0).sum(-2) / is_there.sum(-1, dtype=x.dtype)[..., None]
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# Linen


class Layer(nn.Module):
  """One layer of BERT, with the attention of Linen or its projections as `nn.Dense`."""

  heads: int
  hidden: int
  is_multi_head: bool

  @nn.compact
  def __call__(self, x: jax.Array, is_there: jax.Array) -> tuple[jax.Array, None]:
    features = x.shape[-1]
    dense, norm = nn.Dense, functools.partial(nn.LayerNorm, epsilon=EPSILON)
    mask = is_there[:, None, None]
    if self.is_multi_head:
      attended = nn.MultiHeadDotProductAttention(self.heads, name='attention')(x, mask=mask)
    else:
      query, key, value = (
        dense(features, name=name)(x).reshape(*x.shape[:2], self.heads, -1) for name in PROJECTIONS
      )
      attended = nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape)
      attended = dense(features, name='out')(attended)
    x = norm(name='norm')(x + attended)
    inner = nn.gelu(dense(self.hidden, name='up')(x), approximate=False)
    return norm(name='last_norm')(x + dense(features, name='down')(inner)), None


class LinenEncoder(nn.Module):
  """The encoder with layers of `Layer`: apart, or scanned."""

  layers: int
  heads: int
  shapes: Mapping[str, tuple[int, ...]]
  hidden: int
  is_multi_head: bool
  is_scanned: bool

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    is_there = tokens > 0
    ids = tokens, jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
    x = sum(
      nn.Embed(*self.shapes[name], name=name)(index)
      for name, index in zip(TABLES, ids, strict=True)
    )
    x = nn.LayerNorm(epsilon=EPSILON, name='norm')(x)
    layer = Layer
    if self.is_scanned:
      layer = nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.layers,
        in_axes=nn.broadcast,
      )
    names = ['layers'] if self.is_scanned else [f'layer{i}' for i in range(self.layers)]
    for name in names:
      x, _ = layer(self.heads, self.hidden, self.is_multi_head, name=name)(x, is_there)
    return pooled(x, is_there)


def linen(canonical: Tree, heads: int, *, is_multi_head: bool, is_scanned: bool) -> Form:
  layers = layers_of(canonical)
  attention = 'attention/' if is_multi_head else ''
  params = {name: canonical[name] for name in (*TABLES, 'norm')}
  places = {name: Place(f'params/{name}/embedding') for name in TABLES}
  own = [layer_of(canonical, i, heads if is_multi_head else None) for i in range(layers)]
  for i, layer in enumerate(own):
    if is_multi_head:
      layer['attention'] = {name: layer.pop(name) for name in (*PROJECTIONS, 'out')}
    else:
      params |= {} if is_scanned else {f'layer{i}': layer}
    for name in (*PROJECTIONS, 'out', 'up', 'down'):
      inner = f'{attention if name not in ("up", "down") else ""}{name}/kernel'
      where = (
        Place(f'params/layers/{inner}', i) if is_scanned else Place(f'params/layer{i}/{inner}')
      )
      places[f'{i}_{name}'] = where
  if is_scanned:
    params['layers'] = stacked(own)
  else:
    params |= {f'layer{i}': layer for i, layer in enumerate(own)}
  model = LinenEncoder(
    layers,
    heads,
    {name: canonical[name]['embedding'].shape for name in TABLES},
    canonical['0_up']['kernel'].shape[1],
    is_multi_head,
    is_scanned,
  )
  return Form({'params': params}, model.apply, places)


def dense(canonical: Tree, heads: int) -> Form:
  word, position = (canonical[name]['embedding'] for name in ('word', 'position'))
  model = SentenceEncoder(
    layers=layers_of(canonical),
    features=word.shape[1],
    hidden=canonical['0_up']['kernel'].shape[1],
    heads=heads,
    vocabulary=word.shape[0],
    positions=position.shape[0],
    types=canonical['type']['embedding'].shape[0],
  )
  places = {
    name: Place(f'params/{name}/{kind}')
    for name, leaves in canonical.items()
    for kind in ('kernel', 'embedding')
    if kind in leaves
  }
  return Form({'params': canonical}, model.apply, places)


# NNX


class NNXLayer(nnx.Module):
  """One layer of BERT."""

  def __init__(self, features: int, hidden: int, heads: int, rngs: nnx.Rngs):
    norm = functools.partial(nnx.LayerNorm, features, epsilon=EPSILON, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
    self.norm, self.last_norm = norm(), norm()
    self.up = nnx.Linear(features, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, features, rngs=rngs)

  def __call__(self, x: jax.Array, is_there: jax.Array) -> jax.Array:
    x = self.norm(x + self.attention(x, mask=is_there[:, None, None]))
    return self.last_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class NNXEncoder(nnx.Module):
  """The encoder with a list of layers, or with layers in one stack."""

  def __init__(self, canonical: Tree, heads: int, rngs: nnx.Rngs, *, is_stacked: bool):
    features = canonical['word']['embedding'].shape[1]
    hidden = canonical['0_up']['kernel'].shape[1]
    for name in TABLES:
      setattr(self, name, nnx.Embed(*canonical[name]['embedding'].shape, rngs=rngs))
    self.norm = nnx.LayerNorm(features, epsilon=EPSILON, rngs=rngs)
    make = functools.partial(NNXLayer, features, hidden, heads)
    if is_stacked:
      self.layers = nnx.split_rngs(splits=layers_of(canonical))(nnx.vmap(make))(rngs)
    else:
      self.layers = nnx.List([make(rngs) for _ in range(layers_of(canonical))])
    self.is_stacked = is_stacked

  def __call__(self, tokens: jax.Array) -> jax.Array:
    is_there = tokens > 0
    places, types = jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
    x = self.norm(self.word(tokens) + self.position(places) + self.type(types))
    if self.is_stacked:
      step = lambda x, layer: layer(x, is_there)
      x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
    else:
      for layer in self.layers:
        x = layer(x, is_there)
    return pooled(x, is_there)


def in_nnx(canonical: Tree, heads: int, *, is_stacked: bool) -> Form:
  make = lambda: NNXEncoder(canonical, heads, nnx.Rngs(0), is_stacked=is_stacked)
  graph, shapes = nnx.split(nnx.eval_shape(make))
  places = {name: Place(f'{name}/embedding') for name in TABLES}
  own = []
  for i in range(layers_of(canonical)):
    layer = layer_of(canonical, i, heads)
    layer['attention'] = {name: layer.pop(name) for name in (*PROJECTIONS, 'out')}
    own.append(layer)
    for name in (*PROJECTIONS, 'out', 'up', 'down'):
      inner = f'{"attention/" if name not in ("up", "down") else ""}{name}/kernel'
      places[f'{i}_{name}'] = (
        Place(f'layers/{inner}', i) if is_stacked else Place(f'layers/{i}/{inner}')
      )
  params = {name: canonical[name] for name in (*TABLES, 'norm')}
  params['layers'] = stacked(own) if is_stacked else dict(enumerate(own))
  if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, nnx.to_pure_dict(shapes)):
    raise ValueError('found other shapes of the canonical parameters, expected those of the module')

  def fn(params: Tree, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, nnx.State(params))(tokens)

  return Form(params, fn, places)


# Equinox


class EquinoxLayer(eqx.Module):
  """One layer of BERT, on the tokens of one sentence."""

  attention: eqx.nn.MultiheadAttention
  norm: eqx.nn.LayerNorm
  up: eqx.nn.Linear
  down: eqx.nn.Linear
  last_norm: eqx.nn.LayerNorm

  def __init__(self, features: int, hidden: int, heads: int, key: jax.Array):
    keys = jax.random.split(key, 3)
    biases = dict.fromkeys(
      ('use_query_bias', 'use_key_bias', 'use_value_bias', 'use_output_bias'), True
    )
    self.attention = eqx.nn.MultiheadAttention(heads, features, **biases, key=keys[0])
    self.norm, self.last_norm = (eqx.nn.LayerNorm(features, eps=EPSILON) for _ in range(2))
    self.up = eqx.nn.Linear(features, hidden, key=keys[1])
    self.down = eqx.nn.Linear(hidden, features, key=keys[2])

  def __call__(self, x: jax.Array, is_there: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(is_there[None], (len(x), len(x)))
    x = jax.vmap(self.norm)(x + self.attention(x, x, x, mask))
    inner = jax.nn.gelu(jax.vmap(self.up)(x), approximate=False)
    return jax.vmap(self.last_norm)(x + jax.vmap(self.down)(inner))


class EquinoxEncoder(eqx.Module):
  """The encoder, on the tokens of one sentence."""

  word: eqx.nn.Embedding
  position: eqx.nn.Embedding
  type: eqx.nn.Embedding
  norm: eqx.nn.LayerNorm
  layers: list[EquinoxLayer]

  def __init__(self, canonical: Tree, heads: int, key: jax.Array):
    features = canonical['word']['embedding'].shape[1]
    hidden = canonical['0_up']['kernel'].shape[1]
    make = lambda name: eqx.nn.Embedding(*canonical[name]['embedding'].shape, key=key)
    self.word, self.position, self.type = map(make, TABLES)
    self.norm = eqx.nn.LayerNorm(features, eps=EPSILON)
    self.layers = [EquinoxLayer(features, hidden, heads, key) for _ in range(layers_of(canonical))]

  def __call__(self, tokens: jax.Array) -> jax.Array:
    is_there, places = tokens > 0, jnp.arange(len(tokens))
    x = jax.vmap(self.word)(tokens) + jax.vmap(self.position)(places)
    x = jax.vmap(self.norm)(x + jax.vmap(self.type)(jnp.zeros_like(tokens)))
    for layer in self.layers:
      x = layer(x, is_there)
    return pooled(x, is_there)


def equinox(canonical: Tree, heads: int) -> Form:
  model = eqx.filter_eval_shape(EquinoxEncoder, canonical, heads, jax.random.key(0))
  names = {'query': 'query_proj', 'key': 'key_proj', 'value': 'value_proj', 'out': 'output_proj'}
  values: dict[str, Any] = {'norm': canonical['norm']}
  places = {}
  for name in TABLES:
    values[name] = canonical[name]
    places[name] = Place(f'{name}/weight')
  for i in range(layers_of(canonical)):
    for ours, leaves in layer_of(canonical, i, None).items():
      path = f'layers/{i}/' + (f'attention/{names[ours]}' if ours in names else ours)
      values[path] = leaves
      if 'kernel' in leaves:
        places[f'{i}_{ours}'] = Place(f'{path}/weight')

  def value(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    place, _, kind = jax.tree_util.keystr(path, simple=True, separator='/').rpartition('/')
    leaves = values[place]
    if kind == 'bias':
      found = leaves['bias']
    else:
      found = (
        leaves['kernel'].T
        if 'kernel' in leaves
        else next(leaves[own] for own in ('scale', 'embedding') if own in leaves)
      )
    if found.shape != leaf.shape:
      raise ValueError(f'{place}: found shape {found.shape}, expected {leaf.shape}')
    return jnp.asarray(found)

  arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
  params = jax.tree_util.tree_map_with_path(value, arrays)

  def fn(params: Any, tokens: jax.Array) -> jax.Array:
    return jax.vmap(eqx.combine(params, static))(tokens)

  return Form(params, fn, places)


# shared


def layer_of(canonical: Tree, i: int, heads: int | None) -> Tree:
  """Returns the parameters of a layer, its projections on heads where their number is given."""
  layer = {
    name: dict(canonical[f'{i}_{name}'])
    for name in (*PROJECTIONS, 'out', 'norm', 'up', 'down', 'last_norm')
  }
  if heads is not None:
    for name in PROJECTIONS:
      layer[name] = {
        kind: leaf.reshape(*leaf.shape[:-1], heads, -1) for kind, leaf in layer[name].items()
      }
    kernel = layer['out']['kernel']
    layer['out']['kernel'] = kernel.reshape(heads, -1, kernel.shape[-1])
  return layer


def stacked(layers: list[Tree]) -> Tree:
  """Returns the layers as one tree, a leading axis counting them."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


FORMS: dict[str, Callable[[Tree, int], Form]] = {
  'dense': dense,
  'heads': functools.partial(linen, is_multi_head=True, is_scanned=False),
  'scan': functools.partial(linen, is_multi_head=False, is_scanned=True),
  'scan of heads': functools.partial(linen, is_multi_head=True, is_scanned=True),
  'NNX': functools.partial(in_nnx, is_stacked=False),
  'NNX scan': functools.partial(in_nnx, is_stacked=True),
  'Equinox': equinox,
}
"""Name of a form -> (canonical parameters, heads) -> the form."""
