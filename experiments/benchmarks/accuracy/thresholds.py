"""One threshold a layer against one for every input or output; neither takes bytes in a file.

    python -m experiments.benchmarks.accuracy.thresholds TFDS_FOLDER WEIGHTS.safetensors ...

With error feedback, an error of the weight at input i costs 1 / U_ii^2 (U: the factor in
`opq_jax.encoders.feedback`).  With a multiplier lambda, the best code k of a weight w minimises

    gain (w - v_k)^2 + lambda bits_k

The grid's own cells are optimal for gain 1: its threshold, and the positions of its values in their
cells, determine lambda bits_k.  Other gains move the edges of the cells, above all the threshold:

    one         gain 1, as `opq_jax.encoders.Feedback`
    by input    gain 1 / U_ii^2: weights of less important inputs are pruned sooner
    by output   gain 1 / mean square of the channel: weights of small channels are kept
    root        the square root of either

each divided by its geometric mean.  Compared at the same entropy of the codes, with moments of
synthetic images and BatchNorm corrected, on the first 5,000 test images.  Each file is named as a
network of CIFAR-10 (`resnet20_cifar10.safetensors`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from opq_jax import compression
from opq_jax.coding import payload as entropy_coding
from opq_jax.compression import LeafState
from opq_jax.core import trees
from opq_jax.encoders import DAMPING
from opq_jax.file import writer
from opq_jax.importers import networks

BITS = 2.0, 1.5, 1.0
IMAGES = 5000
STEPS = 4  # of the search for the asked entropy


def relative(worth: np.ndarray) -> np.ndarray:
  """Divides by the geometric mean; 1 in place of 0, which a channel of zeros has.

  >>> relative(np.array([1.0, 4.0, 0.0])).tolist()
  [0.5, 2.0, 1.0]
  """
  is_alive = worth > 0
  middle = np.exp(np.log(worth[is_alive]).mean()) if is_alive.any() else 1
  return np.where(is_alive, worth / middle, 1)


# (weights [K, channels], 1 / U_ii^2) -> gains that broadcast to the weights
RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  'one': lambda weights, worth: np.ones((len(weights), 1)),
  'by input': lambda weights, worth: relative(worth)[:, None],
  'by input, root': lambda weights, worth: relative(worth)[:, None] ** 0.5,
  'by output': lambda weights, worth: relative(np.square(weights).mean(0))[None] ** -1,
  'by output, root': lambda weights, worth: relative(np.square(weights).mean(0))[None] ** -0.5,
}


def cheapest(w: np.ndarray, gain: np.ndarray, leaf: LeafState) -> np.ndarray:
  """Returns the code of least cost.

  >>> kernel = np.random.default_rng(0).laplace(size=(64, 64)).astype(np.float32)
  >>> state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  >>> codes = cheapest(kernel, np.ones(1), state.tree)
  >>> bool(np.mean(codes == np.asarray(opq_jax.encode(kernel, state))) > 0.999)
  True
  """
  threshold, first, step = float(leaf.threshold), float(leaf.codebook[1]), float(leaf.step)
  last = max(int(leaf.levels) - 1, 0)
  size = np.abs(w)
  # lambda times the bits of one more level, and of the first level, from the edges for gain 1
  a_level = 2 * step * max(threshold + step / 2 - first, 0)
  a_survivor = max(threshold**2 - (threshold - first) ** 2, 0)
  cell = np.clip(np.ceil((size - first - a_level / (2 * step * gain)) / step - 0.5), 0, last)
  cost = np.square(size - first - step * cell) + (a_survivor + a_level * cell) / gain
  survives = (cost < np.square(size)) & (int(leaf.levels) > 0)
  return np.where(survives, np.sign(w) * (1 + cell), 0).astype(np.int8)


def codes_of(kernel: np.ndarray, moments: np.ndarray, leaf: LeafState, rule: str) -> np.ndarray:
  """Returns codes by error feedback in float64, as `opq_jax.encoders.feedback`, with a rule."""
  weights = kernel.reshape(len(moments), -1).astype(np.float64)
  energy = np.diagonal(moments)
  order = np.argsort(-energy, kind='stable')
  matrix = moments.astype(np.float64) / energy.mean() + DAMPING * np.eye(len(moments))
  factor = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
  weights = weights[order]
  worth = 1 / np.square(np.diagonal(factor))
  gains = np.broadcast_to(RULES[rule](weights, worth), weights.shape)
  codes = np.zeros(weights.shape, np.int8)
  book = np.asarray(leaf.codebook, np.float64)
  bound = max(float(leaf.step), float(leaf.threshold))
  for i, push in enumerate(factor):
    codes[order[i]] = cheapest(weights[i], gains[i], leaf)
    error = np.clip(weights[i] - book[codes[order[i]]], -bound, bound) / push[i]
    weights[i + 1 :] -= push[i + 1 :, None] * error
  return codes.reshape(kernel.shape)


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  variables = network.variables
  batches = one_shot_images.batches_of(config, network, data_dir, config.split)
  judge = one_shot_images.Judge(network, batches[: IMAGES // config.batch_size])
  leaves = {k: np.asarray(leaf) for k, leaf in trees.named_leaves(variables).items()}
  images = networks.synthetic_batches(network)
  apply_fn = network.model.apply
  matrices = trees.beside(variables, opq_jax.network.mean_moments(apply_fn, variables, images))
  matrices = [None if found is None else np.asarray(found.matrix[0]) for found in matrices]

  def encoded(rule: str, bits: float) -> tuple[list, list, float]:
    """Returns values and states of all leaves, and the entropy of the codes in bits per weight."""
    allocation = opq_jax.allocate(variables, compression_rate=32 / bits)
    records = trees.records(variables, opq_jax.init_state(variables, allocation).tree, LeafState)
    values, states, total, size = [], [], 0.0, 0
    for leaf, record, matrix in zip(leaves.values(), records, matrices, strict=True):
      if record is None:
        values.append(leaf)
        states.append(None)
        continue
      codes = codes_of(leaf, matrix, record, rule)
      values.append(np.asarray(compression.decode(codes, opq_jax.CompressionState(record))))
      states.append(dataclasses.replace(record, kinds=(codes != 0).astype(np.uint8)))
      total, size = total + codes.size * entropy_coding.entropy(codes), size + codes.size
    return values, states, total / size

  structure = jax.tree.structure(variables)
  for bits in BITS:
    for rule in RULES:
      asked = bits
      for _ in range(STEPS):
        values, states, found = encoded(rule, asked)
        if abs(found / bits - 1) < 2e-3:
          break
        asked *= bits / found
      tree = jax.tree.unflatten(structure, values)
      corrected = networks.correct_batch_norm(network, tree, images=images)
      state = opq_jax.CompressionState(jax.tree.unflatten(structure, states))
      yield {
        'network': name,
        'threshold': rule,
        'entropy, bits per weight': round(found, 3),
        'file, bytes': f'{len(writer.serialize(corrected, state)):,}',
      } | one_shot_images.cells(judge.scores(corrected))


if __name__ == '__main__':
  one_shot_images.main(
    'accuracy.thresholds', 'thresholds of layers, inputs and outputs', compare, __doc__
  )
