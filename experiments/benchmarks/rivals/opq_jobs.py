"""Files of this library: plain codes, trellis, error feedback, layer by layer, with corrections."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import opq_jax
from experiments.benchmarks.kernels import kernels_of
from experiments.benchmarks.rivals.jobs import (
  FEEDBACK,
  HALVES,
  IMAGES,
  INFERENCE,
  KERNELS,
  LAYERS,
  OURS,
  SCALAR,
  TRELLIS,
  Coded,
  Job,
  Seconds,
  timed,
)
from opq_jax import encoders
from opq_jax.file import writer
from opq_jax.importers import networks

BITS = {
  'resnet20': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'resnet32': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'mobilenet_v1': (4.0, 3.0, 2.5, 2.0, 1.5),
  'mobilenet_v2': (4.0, 3.0, 2.5, 2.0, 1.5),
}
# fewer bits than BITS: a job takes minutes
LAYERS_BITS = {
  'resnet20': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'resnet32': (3.5, 2.0, 1.5, 1.1, 0.75),
  'mobilenet_v1': (3.0, 2.0, 1.5),
  'mobilenet_v2': (4.0, 3.0, 2.5, 2.0, 1.5),
}
ROUNDED_BITS = 1.1  # at least, of files with vectors of 16 bits; fewer make less than is compared
FEW_BITS = 2.5, 1.5  # of files that are judged without correction too
ERROR_BITS = 0.75, 1.0, 2.0, 3.0


def jobs_of_ours(
  network: networks.Network, unlabelled: Sequence[jax.Array], folder: pathlib.Path
) -> Iterator[Job]:
  """Yields jobs of whole networks, by every encoder, corrected or not."""
  variables, metadata = network.variables, networks.metadata(network)
  path = folder / 'network.opq'
  kernels = kernels_of(variables)

  def coded(tree: Any, state: opq_jax.CompressionState, seconds: Seconds) -> Coded:
    _, saving = timed(lambda: opq_jax.save(path, tree, state, metadata))
    (decoded, _), loading = timed(lambda: opq_jax.load(path))
    with opq_jax.OpqFile(path) as file:
      vector_bytes = sum(size for name, size in file.sizes().items() if name not in kernels)
    return Coded(decoded, path.stat().st_size, vector_bytes, seconds.plus(saving), loading)

  @functools.lru_cache(maxsize=1)
  def plain(bits: float) -> Any:
    def run() -> Any:
      state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=32 / bits))
      return opq_jax.apply_compression(variables, state), state

    (tree, state), seconds = timed(run)
    return tree, state, seconds

  @functools.lru_cache(maxsize=1)
  def images_of(kind: str) -> Any:
    if kind == 'synthetic':
      return timed(lambda: networks.synthetic_batches(network))
    return unlabelled, Seconds(0, 0)

  @functools.lru_cache(maxsize=1)
  def measured(kind: str) -> Any:
    images, before = images_of(kind)
    matrices, seconds = timed(
      lambda: opq_jax.network.mean_moments(network.model.apply, variables, images)
    )
    return matrices, before.plus(seconds)

  @functools.lru_cache(maxsize=1)
  def trellis(bits: float) -> Any:
    (tree, state, _), seconds = timed(
      lambda: opq_jax.compress(variables, compression_rate=32 / bits, encoder=encoders.Trellis())
    )
    return tree, state, seconds

  @functools.lru_cache(maxsize=1)
  def allocated(bits: float, kind: str) -> Any:
    matrices, before = measured(kind)
    found, seconds = timed(
      lambda: opq_jax.compress(
        variables, compression_rate=32 / bits, encoder=encoders.Trellis(matrices)
      )
    )
    return found, before.plus(seconds)

  @functools.lru_cache(maxsize=1)
  def scalar(bits: float, kind: str) -> Any:
    matrices, before = measured(kind)
    (tree, state, _), seconds = timed(
      lambda: opq_jax.compress(
        variables, compression_rate=32 / bits, encoder=encoders.Feedback(matrices)
      )
    )
    return tree, state, before.plus(seconds)

  def feedback(bits: float, kind: str) -> Any:
    (tree, state, _), seconds = allocated(bits, kind)
    return tree, state, seconds

  @functools.lru_cache(maxsize=1)
  def layer_by_layer(bits: float, kind: str) -> Any:
    network_of_first, before = allocated(bits, kind)
    images = np.concatenate(images_of(kind)[0])

    def run() -> Any:
      # on the grids that were found before: `opq_jax.compress` would search for them again
      grids = opq_jax.init_state(variables, network_of_first.allocation)
      encoder = encoders.LayerByLayer(network.model.apply, images, first=encoders.Trellis())
      return encoder.choose_codes(variables, grids)

    (tree, state), seconds = timed(run)
    return tree, state, before.plus(seconds)

  def corrected(
    encoder: Callable[..., Any], bits: float, kind: str = 'noise', leaves: str = ''
  ) -> Coded:
    tree, state, seconds = encoder(bits) if kind == 'noise' else encoder(bits, kind)
    images = None if kind == 'noise' else images_of(kind)[0]

    def run() -> Any:
      found = networks.correct_batch_norm(network, tree, images=images)
      if leaves == INFERENCE:
        return networks.for_inference(network, found)
      return opq_jax.correction.round_uncompressed(found) if leaves == HALVES else found

    result, more = timed(run)
    return coded(result, state, seconds.plus(more))

  for bits in BITS[network.name]:
    name = f'bits={bits:g}'
    for method, encoder in ((OURS, plain), (TRELLIS, trellis)):
      if bits in FEW_BITS:
        yield Job(method, name, 'none', lambda e=encoder, b=bits: coded(*e(b)))  # type: ignore[misc]
      for leaves in ('', HALVES) if bits >= ROUNDED_BITS else ('',):
        run = functools.partial(corrected, encoder, bits, leaves=leaves)
        yield Job(method + leaves, name, 'noise', run)
  for kind, suffix in (('synthetic', ''), ('images', IMAGES)):
    for bits in BITS[network.name]:
      name = f'bits={bits:g}'
      for leaves in ('', HALVES) if bits >= ROUNDED_BITS else ('',):
        run = functools.partial(corrected, feedback, bits, kind, leaves)
        yield Job(FEEDBACK + suffix + leaves, name, kind, run)
        if leaves and kind == 'images':
          run = functools.partial(corrected, scalar, bits, kind, leaves)
          yield Job(SCALAR + suffix + leaves, name, kind, run)
      for leaves in ('', HALVES, INFERENCE) if bits in LAYERS_BITS[network.name] else ():
        run = functools.partial(corrected, layer_by_layer, bits, kind, leaves)
        yield Job(LAYERS + suffix + leaves, name, kind, run)


def jobs_of_our_errors(network: networks.Network) -> Iterator[Job]:
  """Yields jobs of kernels alone, for the least squared error of all of them together."""
  kernels = kernels_of(network.variables)

  def ours(bits: float, trellis: bool) -> Coded:
    options: dict[str, Any] = {'compression_rate': 32 / bits, 'objective': 'squared_error'}

    def run() -> bytes:
      if trellis:
        coded = opq_jax.compress(kernels, **options, encoder=encoders.Trellis())
        return writer.serialize(coded.params, coded.state)
      state = opq_jax.init_state(kernels, opq_jax.allocate(kernels, **options))
      return writer.serialize(kernels, state)

    stored, seconds = timed(run)
    (decoded, _), loading = timed(lambda: opq_jax.load(stored))
    return Coded(decoded, len(stored), 0, seconds, loading)

  for bits in ERROR_BITS:
    for method in (OURS, TRELLIS):
      run = functools.partial(ours, bits, method == TRELLIS)
      yield Job(method + KERNELS, f'bits={bits:g}', 'none', run)
