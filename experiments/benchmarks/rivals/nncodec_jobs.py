"""The files that `against_nncodec` compares: by this library, by NNCodec, and by usual recipes.

A job makes a network's file and reads it back.  NNCodec runs in an interpreter of its own.
"""

import functools
import io
import json
import lzma
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import opq_jax
from experiments.benchmarks.kernels import kernels_of, vectors_of
from opq_jax import encoders
from opq_jax.core import trees
from opq_jax.file import writer
from opq_jax.importers import networks

BITS = {
  'resnet20': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'resnet32': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'mobilenet_v1': (4.0, 3.0, 2.5, 2.0, 1.5),
  'mobilenet_v2': (4.0, 3.0, 2.5, 2.0, 1.5),
}
LAYERS_BITS = {  # fewer: minutes each
  'resnet20': (3.5, 2.5, 2.0, 1.5, 1.1, 0.9, 0.75),
  'resnet32': (3.5, 2.0, 1.5, 1.1, 0.75),
  'mobilenet_v1': (3.0, 2.0, 1.5),
  'mobilenet_v2': (4.0, 3.0, 2.5, 2.0, 1.5),
}
FEW_BITS = 2.5, 1.5  # for what is only another look at the same files
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
ERROR_BITS = 0.75, 1.0, 2.0, 3.0
ERROR_QPS = -12, -13, -14, -15, -16, -17, -18, -20, -22, -24, -26
RECIPES = (50, 8), (50, 4), (0, 4)  # percent pruned, bits of a weight
OURS, TRELLIS = 'opq_jax', 'opq_jax, trellis'
FEEDBACK, LAYERS = f'{TRELLIS}, feedback', f'{TRELLIS}, layer by layer'
IMAGES, HALVES = ', images', ', bfloat16'
SHIPPED, TUNED = 'NNCodec', 'NNCodec, tuned'
INFERENCE = ', for inference only'
RECIPE, QWIX = 'magnitude, rounding, LZMA', 'qwix, LZMA'
KERNELS = ', kernels alone'


class Seconds(NamedTuple):
  """By the clock, and of the processor."""

  clock: float
  processor: float

  def plus(self, other: 'Seconds') -> 'Seconds':
    return Seconds(self.clock + other.clock, self.processor + other.processor)

  @classmethod
  def since(cls, begin: 'Seconds') -> 'Seconds':
    return cls(time.perf_counter() - begin.clock, time.process_time() - begin.processor)


class Coded(NamedTuple):
  """A network in a file and out of it again.

  Attributes:
    variables: as decoded.
    file_bytes, vector_bytes: of the file; of what in it is no kernel.
    encode, decode: from the weights to the file, and back.
  """

  variables: Any
  file_bytes: int
  vector_bytes: int
  encode: Seconds
  decode: Seconds


class Job(NamedTuple):
  """One row to make: what it is called, and how."""

  method: str
  setting: str
  correction: str
  make: Callable[[], Coded]


def rows_first(kernel: np.ndarray) -> np.ndarray:
  """A kernel as PyTorch has it, which is how NNCodec expects rows: outputs first."""
  axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


def rows_last(kernel: np.ndarray) -> np.ndarray:
  """The inverse of `rows_first`."""
  axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


class NNCodec:
  """NNCodec in its own interpreter."""

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
    """What was decoded, and the worker's answer."""
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
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def timed(function: Callable[[], Any]) -> tuple[Any, Seconds]:
  begin = Seconds.since(Seconds(0, 0))
  result = jax.block_until_ready(function())
  return result, Seconds.since(begin)


def jobs_of_nncodec(network: networks.Network, nncodec: NNCodec) -> Iterator[Job]:
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
    # tensors are units of their own in a stream: the kernels' stay as they are
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


def jobs_of_ours(
  network: networks.Network, unlabelled: Sequence[jax.Array], folder: pathlib.Path
) -> Iterator[Job]:
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
      yield Job(method, name, 'noise', functools.partial(corrected, encoder, bits))
  for kind, suffix in (('synthetic', ''), ('images', IMAGES)):
    for bits in BITS[network.name]:
      name = f'bits={bits:g}'
      run = functools.partial(corrected, feedback, bits, kind)
      yield Job(FEEDBACK + suffix, name, kind, run)
      for leaves in ('', HALVES, INFERENCE) if bits in LAYERS_BITS[network.name] else ():
        run = functools.partial(corrected, layer_by_layer, bits, kind, leaves)
        yield Job(LAYERS + suffix + leaves, name, kind, run)


def rounded(kernel: np.ndarray, percent: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """The usual recipe: the smallest pruned, the others whole multiples of their channel's step.

  >>> codes, scales = rounded(np.array([[7.0, 0.1], [-2.9, 14.0]], np.float32), 25, 4)
  >>> codes.tolist(), scales.tolist()
  ([[7, 0], [-3, 7]], [[1.0, 2.0]])
  """
  cut = np.partition(np.abs(kernel).ravel(), kernel.size * percent // 100)
  kept = np.where(np.abs(kernel) >= cut[kernel.size * percent // 100], kernel, 0)
  others = tuple(range(kernel.ndim - 1))
  most = 2 ** (bits - 1) - 1
  scales = np.max(np.abs(kept), axis=others, keepdims=True) / np.float32(most)
  scales = np.where(scales > 0, scales, np.float32(1))
  return np.round(kept / scales).astype(np.int8), scales


def jobs_of_recipes(network: networks.Network, folder: pathlib.Path) -> Iterator[Job]:
  variables = network.variables
  path = folder / 'network.xz'

  def archive(leaves: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **leaves)  # type: ignore[arg-type]
    return lzma.compress(file.getvalue(), preset=9)

  def coded(split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], correction: str) -> Coded:
    def encode() -> tuple[list[str], int]:
      pieces = {name: split(kernel) for name, kernel in kernels_of(variables).items()}
      values = {name: codes * scales for name, (codes, scales) in pieces.items()}
      tree = trees.replaced(variables, values)
      if correction == 'noise':
        tree = networks.correct_batch_norm(network, tree)
      vectors = {n: np.asarray(x) for n, x in vectors_of(trees.named_leaves(tree)).items()}
      stored = {f'{n}.{i}': piece for n, pair in pieces.items() for i, piece in enumerate(pair)}
      path.write_bytes(archive(stored | vectors))
      return list(pieces), len(archive(vectors))

    def decode() -> Any:
      with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
        found = dict(file)
      return trees.replaced(
        variables, found | {n: found[f'{n}.0'] * found[f'{n}.1'] for n in names}
      )

    (names, vector_bytes), encoding = timed(encode)
    decoded, decoding = timed(decode)
    return Coded(decoded, path.stat().st_size, vector_bytes, encoding, decoding)

  for percent, bits in RECIPES:
    for correction in ('noise',) if percent == 0 else ('none', 'noise'):
      split = functools.partial(rounded, percent=percent, bits=bits)
      run = functools.partial(coded, split, correction)
      yield Job(RECIPE, f'pruned={percent}% int{bits}', correction, run)
  try:
    from qwix import QArray as _  # noqa: F401
    from qwix import quantize
  except ImportError:
    return

  def by_qwix(kernel: np.ndarray, qtype: str) -> tuple[np.ndarray, np.ndarray]:
    found = quantize(jax.numpy.asarray(kernel), qtype, channelwise_axes=[kernel.ndim - 1])
    return np.asarray(found.qvalue.astype(np.int8)), np.asarray(found.scale)

  for qtype in ('int8', 'int4'):
    for correction in ('none', 'noise'):
      run = functools.partial(coded, functools.partial(by_qwix, qtype=qtype), correction)
      yield Job(QWIX, qtype, correction, run)


def jobs_of_errors(
  network: networks.Network, nncodec: NNCodec, folder: pathlib.Path
) -> Iterator[Job]:
  """The kernels alone, each side made for the least squared error of all of them together."""
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

  def theirs(qp: int) -> Coded:
    decoded, answer = nncodec(kernels, {'qp': qp, 'lambda_scale': LAMBDA})
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(decoded, answer['bytes'], 0, *seconds)

  for bits in ERROR_BITS:
    for method in (OURS, TRELLIS):
      run = functools.partial(ours, bits, method == TRELLIS)
      yield Job(method + KERNELS, f'bits={bits:g}', 'none', run)
  for qp in ERROR_QPS:
    name = f'qp={qp} lambda_scale={LAMBDA:g}'
    yield Job(TUNED + KERNELS, name, 'none', functools.partial(theirs, qp))
