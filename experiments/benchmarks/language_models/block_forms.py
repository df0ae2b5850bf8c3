"""Calibrated codes of a language model with other targets and weights than those that are adopted.

    python -m experiments.benchmarks.language_models.block_forms smollm2|iglm FOLDER \
      [--text TEXT] [--bits B ...] [--only FORM ...]

All forms have the same allocation, tokens and error feedback, and choose the codes of the blocks'
kernels alone.  A leaf of inputs x (x' in the compressed network) has the target

    W + share (H^-1 (C W + residual R) - W)          H = E[t x'^T x'],  C = E[t x'^T x]

    share       of the way to the weights that fit x' best, `opq_jax.encoders.LayerByLayer`
    residual    R = E[t x'^T (r - r')], with r what the layer's outputs are added to: the layer
                makes good what earlier layers have done to the hidden states, as in WaterSIC
                (Lifar et al., arXiv 2603.04956)
    weights     t of each token: 1 - weights + weights g / E[g], with g the squared gradient of the
                log-likelihood of a sampled answer in the hidden state that the block gives there
    energy      every output of a kernel is multiplied by sqrt(E[(x W)^2] / E[(x' Q)^2])
"""

import argparse
import dataclasses
import functools
import pathlib
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.language_models import networks, ours
from experiments.benchmarks.language_models.measure import Judge
from experiments.benchmarks.language_models.networks import Network
from opq_jax import encoders, language
from opq_jax.importers import language_models
from opq_jax.language import block_codes
from opq_jax.language.network import StoredNetwork
from opq_jax.language.parts import Block, Head, Start, applied
from opq_jax.network.paired_moments import PairedSums
from opq_jax.weights.work_folder import Work

BITS = 2.0, 3.0
_BATCH = 8  # sequences
_KEY = 5  # of the sampled answers
_ADDED_TO = {'out': None, 'down': 'hidden_norm'}
"""Layers whose outputs are added to hidden states: those before the block, or what a norm reads."""


class Form(NamedTuple):
  """What differs; see the description of the module."""

  share: float = encoders.SHARE
  residual: float = block_codes.RESIDUAL
  weights: float = 0.0
  energy: bool = False


FORMS = {
  'as adopted': Form(),
  'share 0': Form(share=0.0),
  'share 1': Form(share=1.0),
  'residual 0': Form(residual=0.0),
  'residual 1': Form(residual=1.0),
  'weights of tokens .5': Form(weights=0.5),
  'weights of tokens 1': Form(weights=1.0),
  'energy': Form(energy=True),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def inputs_of_layers(
  block: Block, names: tuple[str, ...], params: Any, x: Array, context: Any
) -> dict[str, Array]:
  """Returns what some modules of a block read."""
  found: dict[str, Array] = {}

  def keep(following: Any, arguments: Any, options: Any, where: Any) -> Any:
    if where.module.name in names:
      found[where.module.name] = arguments[0]
    return following(*arguments, **options)

  with nn.intercept_methods(keep):
    block(params, x, context)
  return found


@jax.jit
def _weighted_product(
  weights: Array, one: Array, other: Array
) -> Float32[Array, 'features others']:
  flat = lambda array: array.reshape(-1, array.shape[-1])
  rows = flat(one) * weights.reshape(-1, 1)
  return jnp.matmul(rows.T, flat(other), precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class FormEncoder(block_codes.BlockEncoder):
  """A `BlockEncoder` of one form.

  Attributes beside its own:
    form: the form.
    token_weights: of all tokens, for each layer.
  """

  form: Form = FORMS['as adopted']
  token_weights: Float32[np.ndarray, 'layers sequences length'] | None = None

  def _sums(self, part: Any, stage: Any, compressed: Any, streams: Any) -> PairedSums:
    if part.layer is None or not self.form.weights:
      return super()._sums(part, stage, compressed, streams)
    assert self.token_weights is not None
    weights = 1 + self.form.weights * (self.token_weights[part.layer] - 1)
    name = stage.leaves[0].removesuffix('/kernel')
    added_to = _ADDED_TO.get(name)
    names = (name, *([added_to] if added_to else []))
    totals: Any = 0
    batches = (self._batches(array) for array in (*streams, weights))
    for first, second, t in zip(*batches, strict=True):
      of_float = inputs_of_layers(part.function, names, part.params, first, *part.shared)
      of_other = inputs_of_layers(part.function, names, compressed, second, *part.shared)
      x, other = of_float[name], of_other[name]
      r = (of_float[added_to], of_other[added_to]) if added_to else (first, second)
      parts = [_weighted_product(t, other, y) for y in (other, x, r[0] - r[1])]
      totals = parts if isinstance(totals, int) else jax.tree.map(jnp.add, totals, parts)
    moments, cross_moments, residual = (total / weights.sum() for total in totals)
    is_added = name in _ADDED_TO
    one = jnp.float32(1)
    return PairedSums(moments[None], cross_moments[None], one, residual if is_added else None)


def token_weights(network: StoredNetwork, tokens: np.ndarray) -> np.ndarray:
  """Returns g / E[g] of all tokens and layers (see the description of the module)."""
  block, head, start = (kind(network.model) for kind in (Block, Head, Start))
  outer = network.outer()
  context = network.context(tokens.shape[1])

  @jax.jit
  def of_answer(outer: Any, x: Array, key: Array) -> Array:
    def likelihood(x: Array) -> Array:
      logits = jax.nn.log_softmax(head(outer, x))
      answer = jax.random.categorical(key, lax.stop_gradient(logits))
      return jnp.sum(jnp.take_along_axis(logits, answer[..., None], axis=-1))

    return jax.grad(likelihood)(x)

  @jax.jit
  def before(params: Any, x: Array, gradient: Array) -> Array:
    return jax.vjp(lambda x: block(params, x, context), x)[1](gradient)[0]

  found = []
  for number, begin in enumerate(range(0, len(tokens), _BATCH)):
    states = [start(outer, tokens[begin : begin + _BATCH])[0]]
    for layer in range(network.depth):
      states.append(applied(block, network.layer(layer), states[-1], context))
    gradient = of_answer(outer, states[-1], jax.random.fold_in(jax.random.key(_KEY), number))
    rows = []
    for layer in reversed(range(network.depth)):
      rows.append(np.asarray(jnp.sum(jnp.square(gradient), axis=-1)))
      gradient = before(network.layer(layer), states[layer], gradient)
    found.append(np.stack(rows[::-1]))
  squares = np.concatenate(found, axis=1)
  return squares / squares.mean(axis=(1, 2), keepdims=True)


def _allocated(network: Network, stored: StoredNetwork, bits: float) -> dict[str, Any]:
  """Returns bits and output scales of all kernels, as `opq compress --calibration` has them."""
  tensors = language_models.to_tensors(network.model, network.params)
  is_kernel = {
    stored.names[name]: networks.is_kernel(path)
    for path, place in stored.places.items()
    for name in place.names
  }
  calibration = ours.calibration_of(network, 'text')
  objective = language.costs(stored, calibration, tensors, damping=encoders.DAMPING)
  allocation = opq_jax.allocate(
    tensors,
    bits_per_weight=bits,
    objective=objective,
    compressible=lambda name, _: is_kernel.get(name, False),
    channel_axis=ours.output_axis(stored),
  )
  records = {name: allocation.tree[name] for name in tensors if allocation.tree[name] is not None}
  return {
    'bits': {name: float(record.entropy) for name, record in records.items()},
    'output_scales': {
      name: np.asarray(record.output_scales)
      for name, record in records.items()
      if record.output_scales is not None
    },
  }


def compare(
  network: Network, bits_asked: list[float], only: list[str]
) -> Iterator[dict[str, object]]:
  """Runs the forms."""
  judge = Judge(network)
  tensors = language_models.to_tensors(network.model, network.params)
  stored = language.stored_network(network.model, tensors)
  gradients = token_weights(stored, network.calibration)
  for bits in bits_asked:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', UserWarning)  # of the Laplace density
      allocated = _allocated(network, stored, bits)
    for name in only or FORMS:
      form, start = FORMS[name], time.perf_counter()
      blocks = FormEncoder(
        stored,
        network.calibration,
        encoder=encoders.Feedback({}),
        share=form.share,
        residual=form.residual,
        form=form,
        token_weights=gradients,
        **allocated,
      )
      with (
        tempfile.TemporaryDirectory() as folder,
        Work(pathlib.Path(folder) / 'network') as run,
        warnings.catch_warnings(),
      ):
        warnings.simplefilter('ignore', UserWarning)
        work = run.open({})
        blocks.run(work)
        read = blocks.coded(work)
        coded = {tensor: read(tensor) for tensor in allocated['bits']}
        allowed, taken = work.load_streams()['spent']
      values = {tensor: np.asarray(part.values()) for tensor, part in coded.items() if part}
      if form.energy:
        values = _scaled_to_energy(network, stored, values)
      yield {
        'network': network.name,
        'bits asked': bits,
        'form': name,
        'bits': round(float(bits * taken / allowed), 4),
        **judge.scores(_params(network, tensors | values)).row(),
        'seconds': round(time.perf_counter() - start),
      }


def _params(network: Network, tensors: Mapping[str, Any]) -> Any:
  return language_models.from_tensors(network.model, tensors).variables


def _scaled_to_energy(
  network: Network, stored: StoredNetwork, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns kernels whose outputs have the energy of those of the float network."""
  tensors = language_models.to_tensors(network.model, network.params)
  other = language.stored_network(network.model, tensors | dict(values))
  block, start, tokens = Block(stored.model), Start(stored.model), network.calibration
  context = stored.context(tokens.shape[1])
  scaled = dict(values)
  states = [start(net.outer(), tokens)[0] for net in (stored, other)]
  for layer in range(stored.depth):
    params = [net.layer(layer) for net in (stored, other)]
    kernels = {p: k for p, k in networks.leaves(params[0]).items() if p.endswith('/kernel')}
    names = tuple(path.removesuffix('/kernel') for path in kernels)
    energies: Any = 0
    for begin in range(0, len(tokens), _BATCH):
      read = [
        inputs_of_layers(block, names, tree, x[begin : begin + _BATCH], context)
        for tree, x in zip(params, states, strict=True)
      ]
      own = {
        name: [
          jnp.sum(jnp.square(inputs[name] @ networks.leaves(tree)[f'{name}/kernel']), axis=(0, 1))
          for inputs, tree in zip(read, params, strict=True)
        ]
        for name in names
      }
      energies = own if isinstance(energies, int) else jax.tree.map(jnp.add, energies, own)
    for name, (wanted, found) in energies.items():
      site = stored.site(f'{name}/kernel', layer)
      factor = np.sqrt(np.asarray(wanted) / np.maximum(np.asarray(found), 1e-30))
      kernel = scaled[site.name]
      scaled[site.name] = kernel * (factor[:, None] if site.is_transposed else factor)
    states = [applied(block, tree, x, context) for tree, x in zip(params, states, strict=True)]
  return scaled


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  networks.add_arguments(parser)
  parser.add_argument('--bits', nargs='+', type=float, default=list(BITS))
  parser.add_argument('--only', nargs='+', choices=list(FORMS), default=[])
  arguments = parser.parse_args()
  network = networks.open_network(arguments.network, arguments.folder, arguments.text)
  rows = []
  try:
    for row in compare(network, arguments.bits, arguments.only):
      print(row, flush=True)
      rows.append(row)
  finally:  # also what an interrupted run has measured
    harness.report(
      'block_forms',
      'targets and weights of calibrated codes',
      'python -m experiments.benchmarks.language_models.block_forms NETWORK FOLDER --text TEXT',
      harness.with_earlier('block_forms', rows, ('network', 'bits asked', 'form')),
    )


if __name__ == '__main__':
  main()
