"""GPTQ: rounding column by column, with the error of each pushed on to the columns that follow.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, arXiv 2210.17323.  With H = E[x^T x] + damping, rounding input
q of a row of weights w to Q(w_q), and changing the inputs F that are left by

    delta_F = -(w_q - Q(w_q)) / [H_F^-1]_qq (H_F^-1)_q,F                       (equation 2)

leaves the least error of the row's output.  All rows go through the inputs in one order, so rows of
the factor H^-1 = U^T U with U upper triangular give every [H_F^-1]_q,F: it is U_qq U_q,F.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import linalg

from experiments.benchmarks.language_models import grids, networks
from experiments.benchmarks.language_models.coded import Coded, Matrix
from experiments.benchmarks.language_models.networks import Network
from opq_jax.network import mean_moments

DAMPING = 0.01  # of the mean of H's diagonal
BATCH = 8  # windows of calibration that run together

# leaves of one input, in the order in which a block uses them
STAGES = {
  'smollm2': (('query', 'key', 'value'), ('out',), ('gate', 'up'), ('down',)),
  'iglm': (('attention',), ('out',), ('up',), ('down',)),
}


class Setting(NamedTuple):
  """Options of GPTQ.

  Attributes:
    bits: of a code.
    group: inputs that share a scale and a zero; the last group of a row may be short.
    act_order: whether the inputs of most energy go first; groups are made in that order, and the
      group of every input is stored.
    clip_search: as in `grids.fitted`.
  """

  bits: int
  group: int = 128
  act_order: bool = True
  clip_search: bool = False


def quantized(
  weights: Matrix, moments: Float[np.ndarray, 'inputs inputs'], setting: Setting
) -> tuple[np.ndarray, float]:
  """Returns a matrix after GPTQ, and its bits.

  Args:
    weights: [outputs, inputs].
    moments: H = E[x^T x] of its inputs.
    setting: options.
  """
  inputs = weights.shape[1]
  energy = np.diag(moments)
  order = np.argsort(-energy, kind='stable') if setting.act_order else np.arange(inputs)
  # the weights of inputs that are always 0 have no effect
  left = np.where(energy <= 0, 0, weights)[:, order].astype(np.float64)
  upper = factored(moments, order)
  decoded = np.empty_like(left)
  for begin in range(0, inputs, setting.group):
    end = min(begin + setting.group, inputs)
    grid = grids.fitted(left[:, begin:end].astype(np.float32), setting.bits, setting.clip_search)
    errors = np.empty((len(left), end - begin))
    for column in range(begin, end):
      decoded[:, column] = grid.rounded(left[:, column : column + 1])[:, 0]
      error = (left[:, column] - decoded[:, column]) / upper[column, column]
      left[:, column:end] -= np.outer(error, upper[column, column:end])
      errors[:, column - begin] = error
    left[:, end:] -= errors @ upper[begin:end, end:]
  values = np.empty(weights.shape, np.float32)
  values[:, order] = decoded
  groups = -(-inputs // setting.group)
  order_bits = inputs * np.ceil(np.log2(groups)) if setting.act_order and groups > 1 else 0
  return values, float(grids.stored_bits(weights.shape, setting.bits, setting.group) + order_bits)


def factored(
  moments: Float[np.ndarray, 'inputs inputs'], order: Int[np.ndarray, ' inputs']
) -> Float[np.ndarray, 'inputs inputs']:
  """Returns U of H^-1 = U^T U for damped moments with their inputs in some order."""
  energy = np.diag(moments).astype(np.float64)
  damped = moments.astype(np.float64)
  dead = energy <= 0
  damped[dead, dead] = 1.0
  damped[np.diag_indices(len(damped))] += DAMPING * energy.mean()
  inverse = linalg.inv(damped[np.ix_(order, order)])
  return np.linalg.cholesky((inverse + inverse.T) / 2).T


def coded_network(
  network: Network,
  codec: Callable[[Matrix, np.ndarray], tuple[np.ndarray, float]],
  progress: Callable[[int, int], None] | None = None,
) -> Coded:
  """Returns a network's kernels coded block after block.

  Args:
    network: the network.
    codec: (matrix, moments of its inputs) -> decoded matrix and bits.  The moments are those of the
      network that is coded up to it, over all tokens of calibration.
    progress: called after every block with how many are done, and how many there are.
  """
  depth = network.model.depth
  stack = network.params['params']['layers']
  states, run = blocks(network)
  stages = STAGES[network.name]
  # one function a stage, so that it is compiled once
  measured = [lambda own, params, x: run(params | own, x) for _ in stages]
  values: dict[str, list[np.ndarray]] = {}
  bits: dict[str, float] = {}
  for layer in range(depth):
    params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
    for names, fn in zip(stages, measured, strict=True):
      own = {name: params[name] for name in names}
      moments = mean_moments(fn, own, [(params, x) for x in states])
      for name in names:
        matrix = np.asarray(moments[name]['kernel'].matrix)[0]
        found, count = codec(np.asarray(own[name]['kernel']).T, matrix)
        params |= {name: params[name] | {'kernel': found.T}}
        path = f'params/layers/{name}/kernel'
        values.setdefault(path, []).append(found.T)
        bits[path] = bits.get(path, 0.0) + count
    states = [run(params, x) for x in states]
    if progress is not None:
      progress(layer + 1, depth)
  return Coded({path: np.stack(leaf) for path, leaf in values.items()}, bits)


def blocks(network: Network) -> tuple[list[Any], Callable[[Any, Any], Any]]:
  """Returns the first hidden states of all batches of calibration, and a function of a block.

  The function returns the next hidden states from the params of a block and hidden states.
  """
  kind, attributes = network.model.block()
  block = kind(**attributes)

  def start(module: Any, tokens: Any) -> Any:
    return module.placed(module.embed(tokens), jnp.arange(tokens.shape[1]))

  batches = networks.batches(network.calibration, BATCH)
  found: Any = [network.model.apply(network.params, batch, method=start) for batch in batches]
  context = found[0][1]

  @jax.jit
  def run(params: Any, states: Any) -> Any:
    return block.apply({'params': params}, states, None, (jnp.int32(0), context))[0]

  return [states for states, _ in found], run
