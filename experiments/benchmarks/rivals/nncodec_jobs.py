"""Files of NNCodec, which runs in an interpreter of its own (`nncodec_worker.py`)."""

import functools
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.benchmarks.kernels import kernels_of, vectors_of
from experiments.benchmarks.rivals.jobs import (
  CHOSEN_ON,
  COARSER,
  INFERENCE,
  KERNELS,
  SETTINGS,
  SHIPPED,
  TUNED,
  Coded,
  Job,
  Seconds,
  timed,
)
from opq_jax.core import trees
from opq_jax.importers import networks

DEFAULT_QPS = {
  'resnet20': (-26, -22, -18, -15, -13),
  'resnet32': (-26, -22, -18, -15, -13),
  'mobilenet_v1': (-34, -28, -24, -21, -18),
  'mobilenet_v2': (-34, -28, -24, -21, -18),
}
TUNED_QPS = {
  'resnet20': (-24, -20, -18, -16),
  'resnet32': (-24, -20, -18, -16),
  'mobilenet_v1': (-28, -25, -23, -21, -19),
  'mobilenet_v2': (-28, -25, -23, -21, -19),
}
# of vectors less than of kernels, which makes their steps 16 times finer; NNCodec ships -75
VECTORS_BELOW = 16
# of means and variances, where coarser steps would spoil them: MobileNet-V2 has variances of 1e-6
STATISTICS_QP = {'mobilenet_v2': -75}
# settings beside each other at one QP, with the correction from noise, where ours were chosen too
TRIED: tuple[dict[str, Any], ...] = (
  *({'nonweight_qp': qp} for qp in (-75, -50, -45, -40, -35, -30, -25)),
  {'nonweight_qp': -40, 'opt_qp': True},
  *({'nonweight_qp': -40, 'lambda_scale': scale} for scale in (0.5, 1.0, 2.0)),
)
LAMBDA = 1.0  # of rate-distortion optimised quantization, in NNCodec's unit; it ships with 0
STATISTICS = 'statistics_qp'  # a setting of this module, which NNCodec takes tensor by tensor
Settings = tuple[tuple[str, Any], ...]
ERROR_QPS = -12, -13, -14, -15, -16, -17, -18, -20, -22, -24, -26


def rows_first(kernel: np.ndarray) -> np.ndarray:
  """Returns a kernel with its output axis first, as NNCodec expects (PyTorch's layout)."""
  axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


def rows_last(kernel: np.ndarray) -> np.ndarray:
  """Inverts `rows_first`."""
  axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


class NNCodec:
  """A process of NNCodec, which answers one request a line."""

  def __init__(self, python: str, folder: pathlib.Path):
    worker = pathlib.Path(__file__).with_name('nncodec_worker.py')
    self._folder = folder
    self._process = subprocess.Popen(
      [python, str(worker)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )

  def __call__(
    self, leaves: Mapping[str, Any], settings: dict[str, Any]
  ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Codes and decodes leaves; returns them and the worker's answer (bytes, seconds).

    A stream holds the names of its tensors as they are.  Here they are numbers, the shortest names
    that there can be; a user keeps the order of the tensors.
    """
    short = {name: str(i) for i, name in enumerate(leaves)}
    if STATISTICS in settings:
      exact = [name for name in leaves if name.endswith(('/mean', '/var'))]
      fine = {short[name]: settings[STATISTICS] for name in exact}
      settings = {k: v for k, v in settings.items() if k != STATISTICS} | {'qp_per_tensor': fine}
    question = {name: str(self._folder / name) for name in ('params', 'stream', 'decoded')}
    question |= {'params': f'{question["params"]}.npz', 'decoded': f'{question["decoded"]}.npz'}
    arrays = {short[name]: rows_first(np.asarray(leaf)) for name, leaf in leaves.items()}
    np.savez(question['params'], **arrays)  # type: ignore[arg-type]
    assert self._process.stdin is not None and self._process.stdout is not None
    print(json.dumps(question | {'settings': settings}), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise ValueError(f'NNCodec: found no answer for {settings}, expected one')
    with np.load(question['decoded']) as file:
      decoded = {name: rows_last(file[short[name]]) for name in leaves}
    return decoded, json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def of_vectors(settings: Settings) -> dict[str, Any]:
  """Returns the settings of a stream of vectors alone: `opt_qp` needs kernels, and is of them."""
  return {key: value for key, value in settings if key != 'opt_qp'}


def jobs_of_nncodec(network: networks.Network, nncodec: NNCodec) -> Iterator[Job]:
  """Yields jobs of whole networks, as shipped and tuned, corrected or not."""
  variables = network.variables
  leaves = {n: np.asarray(leaf) for n, leaf in trees.named_leaves(variables).items()}

  @functools.lru_cache(maxsize=1)
  def plain(settings: Settings) -> Coded:
    decoded, answer = nncodec(leaves, dict(settings))
    _, rest = nncodec(vectors_of(leaves), of_vectors(settings))
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(trees.replaced(variables, decoded), answer['bytes'], rest['bytes'], *seconds)

  @functools.lru_cache(maxsize=1)
  def synthetic() -> Any:
    return timed(lambda: networks.synthetic_batches(network))

  def corrected(settings: Settings, correction: str, inference: bool = False) -> Coded:
    found = plain(settings)
    images, before = synthetic() if correction == 'synthetic' else (None, Seconds(0, 0))

    def run() -> Any:
      tree = networks.correct_batch_norm(network, found.variables, images=images)
      return networks.for_inference(network, tree) if inference else tree

    tree, seconds = timed(run)
    # each tensor is a unit of the stream, so only the vectors' units change
    vectors, answer = nncodec(vectors_of(trees.named_leaves(tree)), of_vectors(settings))
    return Coded(
      trees.replaced(found.variables, vectors),
      found.file_bytes - found.vector_bytes + answer['bytes'],
      answer['bytes'],
      found.encode.plus(before).plus(seconds).plus(Seconds(*answer['encode'])),
      found.decode,
    )

  def job(method: str, correction: str, settings: Mapping[str, Any]) -> Job:
    pairs = tuple(settings.items())
    if correction == 'none':
      run = functools.partial(plain, pairs)
    else:
      run = functools.partial(corrected, pairs, correction, method.endswith(INFERENCE))
    return Job(method, ' '.join(f'{k}={v:g}' for k, v in pairs), correction, run)

  qps = DEFAULT_QPS[network.name]
  for more in TRIED if network.name in CHOSEN_ON else ():
    yield job(SETTINGS, 'noise', {'qp': qps[2], **more})
  for qp in qps:
    yield job(SHIPPED, 'none', {'qp': qp})
  for method, these, more in (
    (COARSER, qps, {}),
    (TUNED, TUNED_QPS[network.name], {'lambda_scale': LAMBDA}),
  ):
    for qp in these:
      settings = {'qp': qp, 'nonweight_qp': qp - VECTORS_BELOW, **more}
      if network.name in STATISTICS_QP:
        settings[STATISTICS] = STATISTICS_QP[network.name]
      yield job(method, 'noise', settings)
      yield job(method, 'synthetic', settings)
      yield job(method + INFERENCE, 'synthetic', settings)


def jobs_of_nncodec_errors(network: networks.Network, nncodec: NNCodec) -> Iterator[Job]:
  """Yields jobs of kernels alone, with quantization tuned for the least squared error."""
  kernels = kernels_of(network.variables)

  def theirs(qp: int) -> Coded:
    decoded, answer = nncodec(kernels, {'qp': qp, 'lambda_scale': LAMBDA})
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(decoded, answer['bytes'], 0, *seconds)

  for qp in ERROR_QPS:
    name = f'qp={qp} lambda_scale={LAMBDA:g}'
    yield Job(TUNED + KERNELS, name, 'none', functools.partial(theirs, qp))
