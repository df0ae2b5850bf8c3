"""Exact thresholds and survivors: two more passes over the weights, at `SparsityAndBits`.

Thresholds of the closed form prune the right share of Laplace weights.  Here only the share is
taken from it: the threshold is the magnitude at that rank among the leaf's own weights.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.counts import fine_histogram, per_channel_count
from opq_jax.allocation.joined_statistics import JoinedStatistics, Layout
from opq_jax.allocation.ranks import bins_at_rank, magnitudes_at_rank
from opq_jax.allocation.sparsity import predict_survivors, pruned_ranks
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.allocation.targets import SparsityAndBits
from opq_jax.allocation.units import channels_of
from opq_jax.core import trees

Weights = Array | np.ndarray


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
  stats: Sequence[LeafStatistics],
  tree: JoinedStatistics,
  layout: Layout,
  readers: Sequence[Callable[[], Weights]],
  targets: SparsityAndBits,
) -> Counted:
  """Returns exact thresholds and counted survivors.

  Args:
    stats: of the leaves, with histograms.
    tree: the same, joined.
    layout: of the joined arrays.
    readers: return the weights of each leaf; called twice.
    targets: the problem.
  """
  # read leaf by leaf, twice, and never kept: the weights may be larger than memory
  ranks = trees.on_host(_ranks(tree, targets.sparsity, layout.block))
  fine = [
    fine_histogram(read(), s.largest, number)
    for read, s, number in zip(readers, stats, ranks.coarse[: len(stats)], strict=True)
  ]
  fine = layout.leaves(trees.on_host(fine), jnp.int32)
  threshold = trees.on_host(_thresholds(fine, tree.ends, ranks))
  counts = [
    per_channel_count(read(), t, s.channel_axis)
    for read, s, t in zip(readers, stats, threshold[: len(stats)], strict=True)
  ]
  total = sum(s.size for s in stats)
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
