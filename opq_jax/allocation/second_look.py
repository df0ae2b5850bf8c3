"""Exact thresholds and survivors: two more passes over the weights, at `SparsityAndBits`.

Thresholds of the closed form prune the right share of Laplace weights.  Here only the share is
taken from it: the threshold is the magnitude at that rank among the leaf's own weights.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.counts import fine_histogram, per_channel_count
from opq_jax.allocation.joined_statistics import JoinedStatistics, Layout
from opq_jax.allocation.parts import MeasuredLeaf, Part, Weights, by_leaf, spread
from opq_jax.allocation.ranks import bins_at_rank, magnitudes_at_rank
from opq_jax.allocation.sparsity import predict_survivors, pruned_ranks
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.allocation.targets import SparsityAndBits
from opq_jax.allocation.units import channels_of
from opq_jax.core import trees


class Counted(NamedTuple):
  """Result of the second look.

  Attributes:
    threshold: prunes exactly the number of weights that each leaf is given, up to ties.
    survivors: counted survivors of every channel, as a share of all weights.
  """

  threshold: Float32[Array, 'leaves']
  survivors: Float[Array, 'channels']


class _Ranks(NamedTuple):
  """Places of the last pruned weights.

  Attributes:
    rank: number of weights that every leaf prunes.
    coarse: bin of the last pruned weight.
    left: its rank in that bin.
  """

  rank: Int32[Array, 'leaves']
  coarse: Int32[Array, 'leaves']
  left: Int32[Array, 'leaves']


def look_again(
  leaves: Sequence[MeasuredLeaf],
  parts: Sequence[Part],
  tree: JoinedStatistics,
  layout: Layout,
  targets: SparsityAndBits,
) -> Counted:
  """Returns exact thresholds and counted survivors.

  Args:
    leaves: all leaves, with histograms and weights to read.
    parts: the slices and leaves that are solved for.
    tree: their statistics, joined.
    layout: of the joined arrays.
    targets: the problem.
  """
  # read leaf by leaf, twice, and never kept: the weights may be larger than memory
  ranks = trees.on_host(_ranks(tree, targets.sparsity, layout.block))

  def of_weights(count: Callable[[Weights, LeafStatistics, Any], Any], each: Array) -> list[Any]:
    """Returns the counts of all parts, given one number of each."""
    found = []
    for number, places in by_leaf(parts).items():
      own, leaf = parts[places], leaves[number]
      assert leaf.read is not None
      numbers = spread(each[places], leaf.statistics.slice_shape, own)
      counts = count(leaf.read(), leaf.statistics, numbers)
      found += [counts[part.place] if part.place else counts for part in own]
    return found

  fine = of_weights(lambda w, s, number: fine_histogram(w, s.largest, number), ranks.coarse)
  fine = layout.leaves(trees.on_host(fine), jnp.int32)
  threshold = trees.on_host(_thresholds(fine, tree.ends, ranks))
  counts = of_weights(lambda w, s, t: per_channel_count(w, t, s.channel_axis), threshold)
  total = sum(part.statistics.size for part in parts)
  return Counted(threshold, layout.channels(trees.on_host(counts), tree.scale.dtype) / total)


@functools.partial(jax.jit, static_argnames='block')
def _ranks(tree: JoinedStatistics, sparsity: Array, block: int) -> _Ranks:
  channels, _ = channels_of(tree, block)
  assert tree.histogram is not None
  _, survivors = predict_survivors(channels, sparsity.astype(tree.scale.dtype))
  rank = pruned_ranks(channels, survivors, tree.sizes)
  return _Ranks(rank, *bins_at_rank(tree.histogram, rank))


@jax.jit
def _thresholds(
  fine: Int32[Array, 'leaves bins'], ends: Float[Array, 'leaves'], ranks: _Ranks
) -> Float32[Array, 'leaves']:
  ends = ends.astype(jnp.float32)
  return magnitudes_at_rank(fine, ends, ranks.coarse, ranks.left, ranks.rank)
