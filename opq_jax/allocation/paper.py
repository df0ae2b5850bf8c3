"""What the paper reports, and the targets that give its rates here.

Hu, Peng, Zhu, Aly, Lin, "OPQ: Compressing Deep Neural Networks with One-shot
Pruning-Quantization", AAAI 2021.  Its rates are nominal (`opq_jax.report.sizes`): 32 bits over the
bits of the survivors per weight, positions not counted, 32 / ((1 - sparsity) bits).  It does not
say which sparsity and bits its ImageNet networks have in a form that we could read; these are
ours, such that the rates are its own.
"""

from typing import NamedTuple


class Target(NamedTuple):
  """One network of the paper.

  Attributes:
    sparsity: share of its weights that is pruned.
    bits: mean bits of a survivor.
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
