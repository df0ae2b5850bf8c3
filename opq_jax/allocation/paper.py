"""Published rates of the paper, and the targets that give them here.

Hu, Peng, Zhu, Aly, Lin, "OPQ: Compressing Deep Neural Networks with One-shot
Pruning-Quantization", AAAI 2021.  Its rates are nominal (`opq_jax.report.sizes`): 32 bits over the
bits of the survivors per weight, 32 / ((1 - sparsity) bits), without the positions of the
survivors.  The sparsity and bits of its ImageNet networks are not public in a form that we could
read.  The targets below are ours, chosen so that the rates are the published ones.
"""

from typing import NamedTuple


class Target(NamedTuple):
  """Targets of one network of the paper.

  Attributes:
    sparsity: share of its weights that is pruned.
    bits: mean bits of a surviving weight, sign included.
    nominal_rate: as published.
  """

  sparsity: float
  bits: float
  nominal_rate: float


TARGETS = {
  'alexnet': Target(0.923, 3.0, 138.96),
  'vgg16': Target(0.9455, 3.0, 195.87),
  'mobilenet_v1': Target(0.656, 4.0, 23.26),
  'resnet50': Target(0.74, 3.24, 38.03),
}
"""By the names of `opq_jax.models`: `opq_jax.allocate(params, sparsity=…, bits=…)`."""
