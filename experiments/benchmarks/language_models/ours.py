"""opq_jax on a language model: files, written and read back."""

import functools
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import opq_jax
from experiments.benchmarks.language_models import networks
from experiments.benchmarks.language_models.coded import Coded
from experiments.benchmarks.language_models.networks import Network
from opq_jax import encoders, language, models
from opq_jax.importers import language_models
from opq_jax.language import Calibration, compression
from opq_jax.network import mean_moments
from opq_jax.weights import StoredLeaf

ENCODERS = 'plain', 'trellis'
_SAMPLED = {'smollm2': (8, 256), 'iglm': (24, 96)}  # windows and tokens
# begin of text; heavy and light chain of a human
_PROMPTS = {'smollm2': ((1,),), 'iglm': ((31, 26), (32, 26))}
_BATCH = 4  # windows whose moments are measured together


def coded_network(
  network: Network,
  bits: float,
  codes: str,
  *,
  moments: Any = None,
  whole: bool,
) -> tuple[Coded, str]:
  """Compresses a network, writes the file, and reads it back.

  Args:
    network: the network.
    bits: asked for, per weight of the compressed leaves.
    codes: one of `ENCODERS`.
    moments: second moments of the kernels' inputs, for error feedback; none by default.
    whole: whether the table of embeddings is compressed with the kernels, as by default, and the
      file holds all leaves; or kernels alone.

  Returns:
    The decoded leaves, and warnings.
  """
  options: dict[str, Any] = {'usage': _usage(network)}
  params: Any = network.params
  if not whole:
    params, options['usage'] = kernels_alone(params), kernels_alone(options['usage'])
    moments = moments if moments is None else kernels_alone(moments)
  if codes == 'trellis':
    options['encoder'] = encoders.Trellis(moments)
  elif moments is not None:
    options['encoder'] = encoders.Feedback(moments)
  with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
    warnings.simplefilter('always', UserWarning)
    path = pathlib.Path(folder) / 'network.opq'
    compressed = opq_jax.compress(params, bits_per_weight=bits, **options)
    opq_jax.save(path, compressed.params, compressed.state)
    with opq_jax.OpqFile(path) as file:
      stored = {name: 8.0 * count for name, count in file.sizes().items()}
    decoded, _ = opq_jax.load(path)
    size = 8 * path.stat().st_size
  leaves = {name: np.asarray(leaf) for name, leaf in networks.leaves(decoded).items()}
  # leaves far from the Laplace density are every language model's
  notes = [str(warning.message) for warning in caught if 'Laplace' not in str(warning.message)]
  other = size - sum(stored.values())
  return Coded(leaves, stored, other), '; '.join(dict.fromkeys(note[:200] for note in notes))


def network_by_costs(
  network: Network,
  bits: float,
  codes: str,
  calibration: Calibration,
  *,
  by_blocks: bool,
  whole: bool,
) -> tuple[Coded, str]:
  """Compresses a network as `opq compress` does its folder, into a file: by what errors cost.

  Args:
    network: the network.
    bits: asked for, per weight of the compressed leaves.
    codes: 'plain', 'trellis' or 'feedback'.
    calibration: tokens from which costs are computed.
    by_blocks: whether codes are chosen for these tokens too, block after block, as with
      `--calibration`.
    whole: as for `coded_network`.

  Returns:
    The decoded leaves, and a note.
  """
  tensors = language_models.to_tensors(network.model, network.params)
  stored = language.stored_network(network.model, tensors)
  is_chosen = {
    stored.names[name]: networks.is_kernel(path) or (whole and leaf.ndim > 1)
    for path, leaf in networks.leaves(network.params).items()
    for name in stored.places[path].names
  }
  options: dict[str, Any] = {
    'compressible': lambda name, _: is_chosen[name],
    'channel_axis': output_axis(stored),
    'bits_per_weight': bits,
  }
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # of the Laplace density
    path = pathlib.Path(folder) / 'network.opq'
    if codes == 'trellis' and not by_blocks:
      objective = language.costs(stored, calibration, tensors)
      compressed = opq_jax.compress(
        tensors, objective=objective, encoder=encoders.Trellis(), **options
      )
      opq_jax.save(path, compressed.params, compressed.state)
    else:
      tree = {
        name: StoredLeaf('', name, array.shape, array.dtype, tensors.__getitem__)
        for name, array in tensors.items()
      }
      own = {'plain': None, 'trellis': encoders.Trellis(), 'feedback': encoders.Feedback({})}
      language.compress_calibrated(stored, tree, path, calibration, encoder=own[codes], **options)
    size = 8.0 * path.stat().st_size
    with opq_jax.OpqFile(path) as file:
      counts = {name: 8.0 * count for name, count in file.sizes().items()}
      decoded = {name: np.asarray(file[name]) for name in file}
      scaled = sum(file.output_scales(name) is not None for name in file if is_chosen[name])
  values = networks.leaves(language_models.from_tensors(network.model, decoded).variables)
  leaves = {path: np.asarray(leaf) for path, leaf in values.items()}
  stored_bits = {
    path: sum(counts[stored.names[name]] for name in stored.places[path].names) for path in leaves
  }
  if not whole:
    leaves = {path: leaf for path, leaf in leaves.items() if networks.is_kernel(path)}
    stored_bits = {path: stored_bits[path] for path in leaves}
    size = sum(stored_bits.values())
  note = f'{calibration.tokens.size:,} tokens, {scaled} of {sum(is_chosen.values())} leaves scaled'
  return Coded(leaves, stored_bits, size - sum(stored_bits.values())), note


def output_axis(stored: language.StoredNetwork) -> Callable[[str, Any], int]:
  """Returns the axis of the outputs of every tensor of a network, by its name in the file."""
  is_transposed = {
    stored.names[name]: place.is_transposed
    for place in stored.places.values()
    for name in place.names
  }
  return lambda name, _: 0 if is_transposed.get(name, False) else -1


def kernels_alone(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tree like the params with the kernels of the blocks alone."""
  return networks.replaced({}, networks.kernels(tree))


def moments_of(network: Network) -> Any:
  """Returns the second moments of the kernels' inputs over the tokens of calibration."""
  batches = networks.batches(network.calibration, _BATCH)
  found = networks.leaves(mean_moments(_hidden(network.model), network.params, batches))
  kept = {path: value if networks.is_kernel(path) else None for path, value in found.items()}
  return networks.replaced({}, kept)


def cost_tokens(network: Network, data: str) -> Calibration:
  """Returns tokens from which costs are computed without data: 'random tokens', or 'own text'."""
  if data == 'random tokens':
    window = min(compression.COST_WINDOW, network.model.positions)
    return language.at_random(network.model.vocabulary, compression.COST_TOKENS, window)
  count, length = _SAMPLED[network.name]
  prompts = jnp.array(_PROMPTS[network.name], jnp.int32)
  written = _written(network, jnp.tile(prompts, (count // len(prompts), 1)), length)
  return Calibration('self', written)


def calibration_of(network: Network, data: str) -> Calibration:
  """Returns the tokens of calibration: of 'text', or as many of the network's 'own text'."""
  if data == 'text':
    return Calibration('text', network.calibration)
  count, length = network.calibration.shape
  prompts = jnp.array(_PROMPTS[network.name], jnp.int32)
  return Calibration(
    'self', _written(network, jnp.tile(prompts, (count // len(prompts), 1)), length)
  )


def _written(
  network: Network, prompt: Int[jax.Array, 'windows begin'], length: int
) -> Int[np.ndarray, 'windows length']:
  """Returns what the float network writes after prompts, seeded."""
  following = models.generate(
    network.model, network.params, prompt, length - prompt.shape[1], jax.random.key(0)
  )
  return np.concatenate([prompt, np.stack(list(following), axis=1)], axis=1)


def _usage(network: Network) -> Any:
  tokens = jax.ShapeDtypeStruct(network.measured.shape, np.int32)
  return opq_jax.usage(_logits(network.model), network.params, tokens)


@functools.cache
def _logits(model: models.Decoder) -> Any:
  return lambda params, tokens: model.apply(params, tokens)


@functools.cache
def _hidden(model: models.Decoder) -> Any:
  return lambda params, tokens: model.apply(params, tokens, method='hidden_states')
