"""Parameters that stay coded in memory, and are decoded where a function uses them.

A file is small, and its weights are floats again once they are loaded.  `coded` keeps them as
codes, one byte a weight, or half a byte in a leaf whose codes are -7 to 7.  `decoded` gives the
floats back inside of a `jit`:

    tree = opq_jax.coded(*opq_jax.load('network.opq'))
    answer = jax.jit(lambda tree, x: model.apply(opq_jax.decoded(tree), x))(tree, x)

The decoded weights exist while they are used.  Layers that are stacked in one leaf, with slices in
its state, are decoded one at a time inside of `jax.lax.scan` over the coded tree.  On a CPU XLA
writes decoded weights to memory before a product reads them: this saves memory, and costs time.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, Int32, Shaped, UInt8

from opq_jax.compression.cells import values_of_codes
from opq_jax.compression.codes import encode
from opq_jax.compression.records import CompressionState, LeafState
from opq_jax.core import exported_nodes, trees
from opq_jax.core.limits import ESCAPE
from opq_jax.core.trees import PyTree

_LARGEST_PACKED = 7  # of codes that fit four bits


@exported_nodes.register
@flax.struct.dataclass
class CodedLeaf:
  """A compressed leaf by its codes: a pytree, which shards, scans and maps as its codes do.

  With slices, all arrays have the axes of slices in front, so `jax.lax.scan` and `jax.vmap` over
  the leaf see one slice after the other, a `CodedLeaf` by itself.

  Attributes:
    codes: one int8 a weight; or, packed, one uint8 for two weights that follow each other along the
      last axis, the first in the low bits, each four bits of two's complement.
    grid: the state of the leaf without its kinds: an empty array is in their place.
    places: of escaped weights, in C order of a slice; a slice with fewer than others has places
      beyond its last weight.
    escaped: the values at these places.
    width: length of the last axis of the weights, where codes are packed; None where they are not.
  """

  codes: Int8[Array, '...'] | UInt8[Array, '...']
  grid: LeafState
  places: Int32[Array, '*slices m']
  escaped: Shaped[Array, '*slices m']
  width: int | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weights."""
    shape = tuple(self.codes.shape)
    return shape if self.width is None else (*shape[:-1], self.width)

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the weights."""
    return np.dtype(self.grid.dtype)

  @property
  def nbytes(self) -> int:
    """Bytes of all its arrays."""
    return sum(array.nbytes for array in jax.tree.leaves(self))

  @jax.jit  # one program, in place of one for each operation
  def decode(self) -> Float[Array, '...']:
    """Returns the weights, bit for bit those of `apply_compression`; may be traced."""
    codes = self.codes if self.width is None else _unpacked(self.codes, self.width)
    values = values_of_codes(codes, self.grid)
    if not self.places.shape[-1]:
      return values
    slices = self.places.ndim - 1
    flat = values.reshape(*values.shape[:slices], -1)
    put = lambda row, places, escaped: row.at[places].set(escaped, mode='drop')
    for _ in range(slices):
      put = jax.vmap(put)
    return put(flat, self.places, self.escaped).reshape(values.shape)


def coded(params: PyTree, state: CompressionState) -> PyTree:
  """Returns the tree with a `CodedLeaf` in the place of every compressed leaf.

  Args:
    params: the tree, with latent weights or compressed ones.
    state: its kinds and codebooks.

  Returns:
    A tree of a byte a weight, or of half a byte in leaves whose codes are -7 to 7, with four bytes
    and the value of an escaped weight.  Other leaves are those of `params` themselves.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (64, 32)), 'bias': jnp.zeros(32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> tree = coded(params, state)
  >>> tree['kernel'].shape, params['kernel'].nbytes, tree['kernel'].codes.nbytes
  ((64, 32), 8192, 1024)
  >>> compressed = opq_jax.apply_compression(params, state)
  >>> bool((jax.jit(decoded)(tree)['kernel'] == compressed['kernel']).all())
  True
  """
  codes = trees.named_leaves(encode(params, state))
  leaves = trees.named_leaves(params)
  grids = trees.records(params, state.tree, LeafState)
  own = [
    leaf if grid is None else _coded_leaf(codes[name], leaf, grid)
    for (name, leaf), grid in zip(leaves.items(), grids, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(params), own)


def decoded(tree: PyTree) -> PyTree:
  """Returns a tree of `coded` with arrays in the place of its coded leaves; may be traced."""
  is_coded = lambda node: isinstance(node, CodedLeaf)
  return jax.tree.map(
    lambda leaf: leaf.decode() if is_coded(leaf) else leaf, tree, is_leaf=is_coded
  )


def _coded_leaf(codes: Int8[Array, '...'], weights: Any, state: LeafState) -> CodedLeaf:
  codes, is_escaped, largest = _without_escapes(codes)
  places, escaped = _escaped(np.asarray(is_escaped), np.asarray(weights), state.slices)
  grid = dataclasses.replace(state, kinds=jnp.zeros((*state.slice_shape, 0), jnp.uint8))
  width = None
  if codes.ndim > state.slices and int(largest) <= _LARGEST_PACKED:
    codes, width = _packed(codes), codes.shape[-1]
  return CodedLeaf(codes, grid, jnp.asarray(places), jnp.asarray(escaped), width)


@jax.jit
def _without_escapes(
  codes: Int8[Array, '...'],
) -> tuple[Int8[Array, '...'], Bool[Array, '...'], Int8[Array, '']]:
  """Returns the codes with 0 for escapes, where these are, and the largest other magnitude."""
  is_escaped = codes == ESCAPE
  codes = jnp.where(is_escaped, jnp.int8(0), codes)
  return codes, is_escaped, jnp.max(jnp.abs(codes), initial=0)


def _escaped(
  is_escaped: Shaped[np.ndarray, '...'], weights: Shaped[np.ndarray, '...'], slices: int
) -> tuple[Shaped[np.ndarray, '*slices m'], Shaped[np.ndarray, '*slices m']]:
  """Returns places and values of the escaped weights of every slice."""
  shape = is_escaped.shape[:slices]
  rows, values = (array.reshape(*shape, -1) for array in (is_escaped, weights))
  most = int(rows.sum(axis=-1).max(initial=0))
  places = np.full((*shape, most), rows.shape[-1], np.int32)
  escaped = np.zeros((*shape, most), weights.dtype)
  for index in np.ndindex(shape):
    own = np.flatnonzero(rows[index])
    places[index][: own.size], escaped[index][: own.size] = own, values[index][own]
  return places, escaped


@jax.jit
def _packed(codes: Int8[Array, '...']) -> UInt8[Array, '...']:
  """Returns codes of four bits, two to a byte; the last of an odd number is followed by 0."""
  pad = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
  pairs = jnp.pad(codes, pad).astype(jnp.uint8) & jnp.uint8(15)
  return pairs[..., 0::2] | (pairs[..., 1::2] << jnp.uint8(4))


def _unpacked(pairs: UInt8[Array, '...'], width: int) -> Int8[Array, '...']:
  both = jnp.stack([pairs << jnp.uint8(4), pairs], axis=-1).astype(jnp.int8)
  # an arithmetic shift brings the sign along
  codes = both >> jnp.int8(4)
  return codes.reshape(*pairs.shape[:-1], -1)[..., :width]
