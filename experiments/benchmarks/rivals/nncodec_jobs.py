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
  INFERENCE,
  KERNELS,
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
LAMBDA = 1.0  # of rate-distortion optimised quantization, in NNCodec's unit; it ships with 0
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
    """Codes and decodes leaves; returns them and the worker's answer (bytes, seconds)."""
    question = {name: str(self._folder / name) for name in ('params', 'stream', 'decoded')}
    question |= {'params': f'{question["params"]}.npz', 'decoded': f'{question["decoded"]}.npz'}
    np.savez(question['params'], **{k: rows_first(np.asarray(v)) for k, v in leaves.items()})  # type: ignore[arg-type]
    assert self._process.stdin is not None and self._process.stdout is not None
    print(json.dumps(question | {'settings': settings}), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise ValueError(f'NNCodec: found no answer for {settings}, expected one')
    with np.load(question['decoded']) as file:
      decoded = {name: rows_last(file[name]) for name in leaves}
    return decoded, json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def jobs_of_nncodec(network: networks.Network, nncodec: NNCodec) -> Iterator[Job]:
  """Yields jobs of whole networks, as shipped and tuned, corrected or not."""
  variables = network.variables
  leaves = {n: np.asarray(leaf) for n, leaf in trees.named_leaves(variables).items()}

  @functools.lru_cache(maxsize=1)
  def plain(settings: tuple[tuple[str, Any], ...]) -> Coded:
    decoded, answer = nncodec(leaves, dict(settings))
    _, rest = nncodec(vectors_of(leaves), dict(settings))
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(trees.replaced(variables, decoded), answer['bytes'], rest['bytes'], *seconds)

  @functools.lru_cache(maxsize=1)
  def synthetic() -> Any:
    return timed(lambda: networks.synthetic_batches(network))

  def corrected(
    settings: tuple[tuple[str, Any], ...], correction: str, inference: bool = False
  ) -> Coded:
    found = plain(settings)
    images, before = synthetic() if correction == 'synthetic' else (None, Seconds(0, 0))

    def run() -> Any:
      tree = networks.correct_batch_norm(network, found.variables, images=images)
      return networks.for_inference(network, tree) if inference else tree

    tree, seconds = timed(run)
    # each tensor is a unit of the stream, so only the vectors' units change
    vectors, answer = nncodec(vectors_of(trees.named_leaves(tree)), dict(settings))
    return Coded(
      trees.replaced(found.variables, vectors),
      found.file_bytes - found.vector_bytes + answer['bytes'],
      answer['bytes'],
      found.encode.plus(before).plus(seconds).plus(Seconds(*answer['encode'])),
      found.decode,
    )

  for method, qps, more in (
    (SHIPPED, DEFAULT_QPS, ()),
    (TUNED, TUNED_QPS, (('lambda_scale', LAMBDA),)),
  ):
    for qp in qps[network.name]:
      settings = (('qp', qp), *more)
      name = ' '.join(f'{key}={value:g}' for key, value in settings)
      if method == SHIPPED or qp == qps[network.name][1]:
        yield Job(method, name, 'none', functools.partial(plain, settings))
      for correction in ('noise', 'synthetic'):
        run = functools.partial(corrected, settings, correction)
        yield Job(method, name, correction, run)
      if method == SHIPPED:
        run = functools.partial(run, inference=True)
        yield Job(method + INFERENCE, name, 'synthetic', run)


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
