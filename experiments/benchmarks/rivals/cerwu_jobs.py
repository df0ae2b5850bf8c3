"""Files of CERWU, which runs in an interpreter of its own (`cerwu_worker.py`)."""

import functools
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import opq_jax
from experiments.benchmarks.kernels import kernels_of, vectors_of
from experiments.benchmarks.rivals.jobs import HALVES, Coded, Job, Seconds, timed
from experiments.benchmarks.rivals.nncodec_jobs import rows_first, rows_last
from opq_jax.core import trees
from opq_jax.importers import networks

CERWU = 'CERWU'
Settings = tuple[tuple[str, Any], ...]
# logarithms of lambda by the number of steps: those on the hull, and around them
_RESNET = {
  6: (-2.5, -2),
  8: (-4, -2.5, -2.25, -2, -1.75),
  10: (-4, -3, -2.5, -2.25, -2, -1.75),
  12: (-4, -3, -2.5, -2.25, -2),
  16: (-3, -2.75, -2.5, -2, -1.75, -1.5, -1.25, -1),
  20: (-3, -2.5),
  24: (-3, -2.5, -2.25, -2, -1.75, -1.5, -1.25, -1),
  32: (-3, -2.5, -2.25, -2, -1.75, -1.5),
  48: (-3,),
}
GRID: dict[str, dict[int, tuple[float, ...]]] = {
  'resnet20': _RESNET,
  'resnet32': _RESNET,
  'mobilenet_v1': {
    64: (-6, -4.5, -3, -2.5),
    32: (-6, -5, -4, -3.25, -2.5, -2),
    48: (-6, -5, -2.5),
    24: (-6, -5, -2),
    96: (-6,),
    16: (-2, -1.5),
  },
  # with the least lambda of MobileNet-V1 the rate term still spoils the answers
  'mobilenet_v2': {
    12: (-7,),
    16: (-8, -7),
    24: (-8, -7, -6, -5, -2),
    32: (-10, -8, -7, -6, -5, -4),
    48: (-8, -7, -6, -5),
    64: (-8, -7, -6, -4.5),
    96: (-6,),
  },
}
# settings besides, to see what they change, at these steps and logarithms of lambda
BESIDES: tuple[tuple[str, Any], ...] = ('order', 'col'), ('damping', 0.003)
BESIDES_AT: dict[str, tuple[tuple[int, float], ...]] = {
  'resnet20': ((12, -2.5), (24, -3)),
}


def positions_of(network: networks.Network, images: jax.Array) -> dict[str, int]:
  """Returns in how many places an image's outputs of each layer lie, by the path of its kernel."""

  def outputs(variables: Any, inputs: jax.Array) -> Any:
    options = {'capture_intermediates': True, 'mutable': ['intermediates']}
    return network.model.apply(variables, inputs, **options)[1]['intermediates']

  shapes = jax.eval_shape(outputs, network.variables, images)
  by_module = {
    name.removesuffix('/__call__/0'): int(np.prod(shape.shape[1:-1]))
    for name, shape in trees.named_leaves(shapes).items()
  }
  kernels = kernels_of(network.variables)
  return {n: by_module[n.removeprefix('params/').removesuffix('/kernel')] for n in kernels}


def torch_order(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Returns H with its inputs ordered as in a PyTorch kernel, whose window comes last.

  Args:
    matrix: (groups, K, K), in the order of the kernel.
    shape: of the kernel, (inputs, outputs) or (height, width, inputs of a group, outputs).

  >>> torch_order(np.diag([1, 2, 3, 4])[None], (2, 1, 2, 5))[0].diagonal().tolist()
  [1, 3, 2, 4]
  """
  if len(shape) == 2:
    return matrix
  height, width, inputs, _ = shape
  order = np.arange(height * width * inputs).reshape(height, width, inputs)
  order = order.transpose(2, 0, 1).ravel()
  return matrix[:, order][:, :, order]


def layers_of(network: networks.Network, images: Sequence[jax.Array]) -> dict[str, np.ndarray]:
  """Returns the weights and Hessians that `cerwu_worker` asks for, kernels numbered.

  CERWU's H is 2 x^T x, summed over the places of an image and averaged over images, so that lambda
  weighs the errors of all layers alike.
  """
  moments = opq_jax.network.mean_moments(network.model.apply, network.variables, images)
  by_path = trees.named_leaves(moments)
  positions = positions_of(network, images[0])
  layers = {}
  for number, (name, kernel) in enumerate(kernels_of(network.variables).items()):
    rows = rows_first(kernel)
    layers[f'{number}/weights'] = rows.reshape(len(rows), -1)
    matrix = torch_order(np.asarray(by_path[f'{name}/matrix']), kernel.shape)
    layers[f'{number}/hessian'] = 2 * positions[name] * matrix
  return layers


class Cerwu:
  """A process of CERWU, which answers one request a line."""

  def __init__(
    self,
    python: str,
    modules: str,
    folder: pathlib.Path,
    network: networks.Network,
    images: Sequence[jax.Array],
  ):
    self._kernels = kernels_of(network.variables)
    self._layers, self._decoded = folder / 'layers.npz', folder / 'decoded.npz'
    np.savez(self._layers, **layers_of(network, images))  # type: ignore[arg-type]
    worker = pathlib.Path(__file__).with_name('cerwu_worker.py')
    self._process = subprocess.Popen(
      [python, str(worker), modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def __call__(self, settings: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the kernels after decoding, and the worker's answer (bytes, seconds).

    Raises:
      ValueError: the process has ended.
    """
    paths = {'layers': str(self._layers), 'decoded': str(self._decoded)}
    assert self._process.stdin is not None and self._process.stdout is not None
    print(json.dumps(paths | {'settings': settings}), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise ValueError(f'CERWU: found no answer for {settings}, expected one')
    found = {}
    with np.load(self._decoded) as file:
      for number, (name, kernel) in enumerate(self._kernels.items()):
        rows = file[str(number)].reshape(rows_first(kernel).shape)
        found[name] = rows_last(rows.astype(np.float32))
    return found, json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def jobs_of_cerwu(
  network: networks.Network, images: Sequence[jax.Array], cerwu: Cerwu, folder: pathlib.Path
) -> Iterator[Job]:
  """Yields jobs of whole networks, corrected on images, with vectors of 16 bits.

  Vectors are coded as in our files.  Names, shapes and lengths of streams are counted as nothing.
  """
  variables = network.variables
  path = folder / 'vectors.opq'

  @functools.lru_cache(maxsize=1)
  def plain() -> Any:
    state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=8))
    return opq_jax.apply_compression(variables, state), state

  def vector_bytes(tree: Any) -> int:
    compressed, state = plain()
    kernels = kernels_of(variables)
    opq_jax.save(path, trees.replaced(compressed, vectors_of(trees.named_leaves(tree))), state)
    with opq_jax.OpqFile(path) as file:
      return sum(size for name, size in file.sizes().items() if name not in kernels)

  def corrected(settings: Settings) -> Coded:
    kernels, answer = cerwu(dict(settings))

    def run() -> Any:
      tree = trees.replaced(variables, kernels)
      tree = networks.correct_batch_norm(network, tree, images=images)
      return opq_jax.correction.round_uncompressed(tree)

    tree, more = timed(run)
    rest = vector_bytes(tree)
    encode, decode = (Seconds(*answer[what]) for what in ('encode', 'decode'))
    return Coded(tree, answer['bytes'] + rest, rest, encode.plus(more), decode)

  for settings in settings_of(network.name):
    name = ' '.join(f'{k}={v}' for k, v in settings)
    yield Job(CERWU + HALVES, name, 'images', functools.partial(corrected, settings))


def settings_of(network: str) -> Iterator[Settings]:
  """Yields the settings of a network's sweep."""
  for nbins, logarithms in GRID[network].items():
    for log10_lm in logarithms:
      yield ('nbins', nbins), ('log10_lm', log10_lm)
  for nbins, log10_lm in BESIDES_AT.get(network, ()):
    for more in BESIDES:
      yield ('nbins', nbins), ('log10_lm', log10_lm), more
