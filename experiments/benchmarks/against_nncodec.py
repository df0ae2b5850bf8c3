"""Smaller than MPEG's NNCodec, from weights alone: both codecs on the same networks and images.

    python3 -m venv NNCODEC && NNCODEC/bin/pip install nncodec==2.1.3
    python -m experiments.benchmarks.against_nncodec TFDS_FOLDER WEIGHTS.safetensors ... \
      --nncodec_python NNCODEC/bin/python

NNCodec (ISO/IEC 15938-17) wants numpy below 2 and so an environment of its own, where
`nncodec_worker.py` runs.  Each file of weights is named as a network (`mobilenet_v1.safetensors`),
with the images of `configs/one_shot_NETWORK.py`.  Rows that experiments/results/against_nncodec
already holds are not made again.

Every row is of real files, written and read back: what is judged is what was decoded.  `noise` is
`opq_jax.correct_batch_norm`, for either side; NNCodec's corrected vectors take the place of the
others in its own stream, quantized at QP -75 as all its vectors.  Seconds are those from the
weights to the file, correction and moments included, the first of a kind with XLA's compilation;
those of the processor hold on a busy machine too.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
import io
import json
import lzma
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.uncompressed_leaves import get_config
from opq_jax import accuracy, artifact, data, networks, plots, trees

RESULTS = harness.RESULTS.parent / 'against_nncodec'
BITS = {
  'resnet20': (3.5, 2.5, 2.0, 1.5, 1.1),
  'resnet32': (3.5, 2.5, 2.0, 1.5, 1.1),
  'mobilenet_v1': (4.0, 3.0, 2.5, 2.0, 1.5),
  'mobilenet_v2': (4.0, 3.0, 2.5, 2.0, 1.5),
}
FEEDBACK_BITS = BITS | dict.fromkeys(('mobilenet_v1', 'mobilenet_v2'), (3.0, 2.0, 1.5))
FEW_BITS = 2.5, 1.5  # for what is only another look at the same files
UNLABELLED = 128
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
ERROR_QPS = -12, -14, -18, -22, -26
RECIPES = (50, 8), (50, 4), (0, 4)  # percent pruned, bits of a weight
OURS, FEEDBACK, IMAGES = 'opq_jax', 'opq_jax, feedback', 'opq_jax, feedback, images'
INFERENCE = 'opq_jax, feedback, for inference only'
SHIPPED, TUNED = 'NNCodec', 'NNCodec, tuned'
RECIPE, QWIX = 'magnitude, rounding, LZMA', 'qwix, LZMA'
KERNELS = ', kernels alone'
_TINY = 1e-9  # what arithmetic takes off the ends of a curve
COLUMNS = (
  *('network', 'method', 'setting', 'correction', 'file_bytes', 'times_smaller'),
  *('top1', 'top1_low', 'top1_high', 'top5', 'agreement', 'divergence', 'top1_unseen'),
  *('squared_error', 'bits_per_weight', 'vector_bytes', 'encode_seconds', 'decode_seconds'),
  *('encode_processor', 'decode_processor'),
)


class Point(NamedTuple):
  """A file: how large, and how good."""

  size: float
  score: float


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


def monotone(points: Sequence[Point]) -> list[Point]:
  """Points of rising size, neighbours that fall pooled until the score rises too.

  Least squares among rising curves: the noise of a sample of images neither helps nor hurts.

  >>> curve = monotone([Point(100, 0.8), Point(50, 0.5), Point(200, 0.7)])
  >>> [(round(point.size, 2), round(point.score, 2)) for point in curve]
  [(50.0, 0.5), (141.42, 0.75)]
  """
  pools: list[list[Point]] = []
  mean = lambda pool: sum(point.score for point in pool) / len(pool)
  for point in sorted(points):
    pools.append([point])
    while len(pools) > 1 and mean(pools[-2]) >= mean(pools[-1]):
      last = pools.pop()
      pools[-1] += last
  return [Point(geometric_mean([point.size for point in pool]), mean(pool)) for pool in pools]


def size_at(points: Sequence[Point], score: float) -> float | None:
  """The size at which a curve has a score, its logarithm between points; None beyond them.

  >>> size_at([Point(100, 0.5), Point(400, 0.7)], 0.6)
  200.0
  >>> size_at([Point(100, 0.5), Point(400, 0.7)], 0.8) is None
  True
  """
  curve = monotone(points)
  if not curve or not curve[0].score - _TINY <= score <= curve[-1].score + _TINY:
    return None
  sizes = [np.log(point.size) for point in curve]
  return round(float(np.exp(np.interp(score, [point.score for point in curve], sizes))), 6)


def score_at(points: Sequence[Point], size: float) -> float | None:
  """The score that a curve has at a size; None beyond its points.

  >>> round(score_at([Point(100, 0.5), Point(400, 0.7)], 200), 6)
  0.6
  """
  curve = monotone(points)
  sizes = [np.log(point.size) for point in curve]
  if not curve or not sizes[0] - _TINY <= np.log(size) <= sizes[-1] + _TINY:
    return None
  return float(np.interp(np.log(size), sizes, [point.score for point in curve]))


def ratios(ours: Sequence[Point], theirs: Sequence[Point], sizes: Sequence[float]) -> list[float]:
  """Our size over theirs at the score that they have at each of these sizes, where both reach."""
  found = []
  for size in sizes:
    score = score_at(theirs, size)
    mine = None if score is None else size_at(ours, score)
    if mine is not None:
      found.append(mine / size)
  return found


def geometric_mean(values: Sequence[float]) -> float:
  return float(np.exp(np.mean(np.log(values))))


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
  """Mean Kullback-Leibler divergence in nats from the float network's answers.

  >>> divergence(np.zeros((2, 3)), np.zeros((2, 3)))
  0.0
  """
  log_p, log_q = (np.asarray(jax.nn.log_softmax(x, axis=-1)) for x in (reference, logits))
  return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def rows_first(kernel: np.ndarray) -> np.ndarray:
  """A kernel as PyTorch has it, which is how NNCodec expects rows: outputs first."""
  axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


def rows_last(kernel: np.ndarray) -> np.ndarray:
  """The inverse of `rows_first`."""
  axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
  return np.ascontiguousarray(kernel.transpose(axes)) if kernel.ndim in (2, 4) else kernel


def kernels_of(tree: Any) -> dict[str, np.ndarray]:
  return {n: np.asarray(leaf) for n, leaf in trees.named_leaves(tree).items() if np.ndim(leaf) > 1}


def like(variables: Any, leaves: Mapping[str, Any]) -> Any:
  """The tree of `variables` with these leaves."""
  names = trees.named_leaves(variables)
  return jax.tree.unflatten(jax.tree.structure(variables), [leaves[name] for name in names])


def squared_error(variables: Any, decoded: Any) -> float:
  """Of all kernels together, over their energy."""
  before, after = kernels_of(variables), kernels_of(decoded)
  total = lambda leaves: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)
  return total(before[name] - after[name] for name in before) / total(before.values())


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


def vectors_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
  return {name: leaf for name, leaf in leaves.items() if np.ndim(leaf) < 2}


def jobs_of_nncodec(network: networks.Network, nncodec: NNCodec) -> Iterator[Job]:
  variables = network.variables
  leaves = {n: np.asarray(leaf) for n, leaf in trees.named_leaves(variables).items()}

  @functools.lru_cache(maxsize=1)
  def plain(settings: tuple[tuple[str, Any], ...]) -> Coded:
    decoded, answer = nncodec(leaves, dict(settings))
    _, rest = nncodec(vectors_of(leaves), dict(settings))
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(like(variables, decoded), answer['bytes'], rest['bytes'], *seconds)

  def corrected(settings: tuple[tuple[str, Any], ...]) -> Coded:
    found = plain(settings)
    tree, seconds = timed(lambda: networks.correct_batch_norm(network, found.variables))
    # tensors are units of their own in a stream: the kernels' stay as they are
    vectors, answer = nncodec(vectors_of(trees.named_leaves(tree)), dict(settings))
    return Coded(
      like(variables, {**trees.named_leaves(found.variables), **vectors}),
      found.file_bytes - found.vector_bytes + answer['bytes'],
      answer['bytes'],
      found.encode.plus(seconds).plus(Seconds(*answer['encode'])),
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
      yield Job(method, name, 'noise', functools.partial(corrected, settings))


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

  def second_moments() -> Any:
    measured = [opq_jax.second_moments(network.model.apply, variables, x) for x in unlabelled]
    return jax.tree.map(lambda *same: sum(same) / len(same), *measured)

  @functools.lru_cache(maxsize=1)
  def moments(kind: str) -> Any:
    return timed(lambda: networks.noise_moments(network) if kind == 'noise' else second_moments())

  @functools.lru_cache(maxsize=1)
  def feedback(bits: float, kind: str) -> Any:
    matrices, before = moments(kind)
    (_, tree, state), seconds = timed(
      lambda: opq_jax.allocate_with_feedback(variables, matrices, compression_rate=32 / bits)
    )
    return tree, state, before.plus(seconds)

  def corrected(encoder: Callable[..., Any], *args: Any, inference: bool = False) -> Coded:
    tree, state, seconds = encoder(*args)

    def run() -> Any:
      if 'images' in args:
        apply_fn = network.model.apply
        return opq_jax.correct_on_images(apply_fn, variables, tree, unlabelled)
      found = networks.correct_batch_norm(network, tree)
      if not inference:
        return found
      folded = opq_jax.fold_batch_norm(found, epsilon=network.model.epsilon)
      return opq_jax.round_uncompressed(folded)

    result, more = timed(run)
    return coded(result, state, seconds.plus(more))

  for bits in BITS[network.name]:
    name = f'bits={bits:g}'
    if bits in FEW_BITS:
      yield Job(OURS, name, 'none', lambda bits=bits: coded(*plain(bits)))  # type: ignore[misc]
    yield Job(OURS, name, 'noise', functools.partial(corrected, plain, bits))
  for bits in FEEDBACK_BITS[network.name]:
    name = f'bits={bits:g}'
    run = functools.partial(corrected, feedback, bits, 'noise')
    yield Job(FEEDBACK, name, 'noise', run)
    if bits in FEW_BITS:
      yield Job(INFERENCE, name, 'noise', functools.partial(run, inference=True))
  for bits in FEEDBACK_BITS[network.name]:
    run = functools.partial(corrected, feedback, bits, 'images')
    yield Job(IMAGES, f'bits={bits:g}', 'images', run)


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
      tree = like(variables, {**trees.named_leaves(variables), **values})
      if correction == 'noise':
        tree = networks.correct_batch_norm(network, tree)
      vectors = {n: np.asarray(x) for n, x in vectors_of(trees.named_leaves(tree)).items()}
      stored = {f'{n}.{i}': piece for n, pair in pieces.items() for i, piece in enumerate(pair)}
      path.write_bytes(archive(stored | vectors))
      return list(pieces), len(archive(vectors))

    def decode() -> Any:
      with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
        found = dict(file)
      return like(variables, found | {n: found[f'{n}.0'] * found[f'{n}.1'] for n in names})

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

  def ours(bits: float) -> Coded:
    options = {'compression_rate': 32 / bits, 'objective': 'squared_error'}

    def run() -> bytes:
      state = opq_jax.init_state(kernels, opq_jax.allocate(kernels, **options))
      return artifact.serialize(kernels, state)

    stored, seconds = timed(run)
    (decoded, _), loading = timed(lambda: opq_jax.load(stored))
    return Coded(decoded, len(stored), 0, seconds, loading)

  def theirs(qp: int) -> Coded:
    decoded, answer = nncodec(kernels, {'qp': qp, 'lambda_scale': LAMBDA})
    seconds = Seconds(*answer['encode']), Seconds(*answer['decode'])
    return Coded(decoded, answer['bytes'], 0, *seconds)

  for bits in ERROR_BITS:
    yield Job(OURS + KERNELS, f'bits={bits:g}', 'none', functools.partial(ours, bits))
  for qp in ERROR_QPS:
    name = f'qp={qp} lambda_scale={LAMBDA:g}'
    yield Job(TUNED + KERNELS, name, 'none', functools.partial(theirs, qp))


@dataclasses.dataclass
class Table:
  """results.csv: a row is kept once it is made."""

  path: pathlib.Path

  def rows(self) -> list[dict[str, str]]:
    if not self.path.exists():
      return []
    with open(self.path, newline='') as file:
      return list(csv.DictReader(file))

  def made(self) -> set[tuple[str, ...]]:
    names = 'network', 'method', 'setting', 'correction'
    return {tuple(row[name] for name in names) for row in self.rows()}

  def add(self, row: Mapping[str, Any]) -> None:
    is_new = not self.path.exists()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, 'a', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      if is_new:
        writer.writeheader()
      writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def compare(name: str, path: pathlib.Path, data_dir: str, python: str, table: Table) -> None:
  config = get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  model, variables, source = network[1:]
  console = Console()

  def batches_of(split: str) -> list[dict[str, np.ndarray]]:
    options = {'batch_size': config.batch_size, 'preprocessing': source.preprocessing}
    return list(data.batches(config.dataset, split, data_dir=data_dir, **options))

  with (
    tempfile.TemporaryDirectory() as place,
    Progress(
      *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress,
  ):
    folder = pathlib.Path(place)
    batches = batches_of(config.split)
    labels = np.concatenate([batch['label'] for batch in batches])
    # the images of `train` come first where they are among those that are judged
    seen = 0 if config.split == 'test' else sum(len(b['label']) for b in batches_of('train'))
    images = np.concatenate([b['image'] for b in batches_of(config.unlabelled_split)])[:UNLABELLED]
    half = len(images) // 2
    unlabelled = [jax.device_put(images[:half]), jax.device_put(images[half : 2 * half])]
    # quicker on a CPU; see README.md, "Inference against PyTorch"
    options = {'xla_cpu_experimental_ynn_fusion_type': ''} if jax.default_backend() == 'cpu' else {}
    forward = jax.jit(model.apply, compiler_options=options)
    logits_of = lambda tree: np.concatenate(
      [np.asarray(forward(tree, batch['image'])) for batch in batches]
    )
    reference = logits_of(variables)
    float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    weights = sum(kernel.size for kernel in kernels_of(variables).values())

    def judged(tree: Any) -> dict[str, float]:
      logits = logits_of(tree)
      right = accuracy.hits(logits, labels)
      return accuracy.scores(logits, labels, reference) | {
        'divergence': divergence(logits, reference),
        'top1_unseen': float(right[seen:].mean()),
      }

    if (name, 'float32', '', 'none') not in table.made():
      sizes = {'file_bytes': float_bytes, 'times_smaller': 1.0}
      key = {'network': name, 'method': 'float32', 'setting': '', 'correction': 'none'}
      table.add(key | sizes | judged(variables))

    nncodec = NNCodec(python, folder)
    jobs = [
      *jobs_of_ours(network, unlabelled, folder),
      *jobs_of_nncodec(network, nncodec),
      *jobs_of_errors(network, nncodec, folder),
      *jobs_of_recipes(network, folder),
    ]
    done = table.made()
    jobs = [job for job in jobs if (name, *job[:3]) not in done]
    # who has little time has the answers to most questions first
    jobs.sort(key=lambda job: (FEEDBACK in job.method, KERNELS in job.method))
    task = progress.add_task(name, total=len(jobs))
    for job in jobs:
      progress.update(task, description=f'{name}: {job.method}, {job.setting}, {job.correction}')
      found = job.make()
      row: dict[str, Any] = {
        'network': name,
        'method': job.method,
        'setting': job.setting,
        'correction': job.correction,
        'file_bytes': found.file_bytes,
        'bits_per_weight': 8 * (found.file_bytes - found.vector_bytes) / weights,
        'vector_bytes': found.vector_bytes,
        'encode_seconds': found.encode.clock,
        'decode_seconds': found.decode.clock,
        'encode_processor': found.encode.processor,
        'decode_processor': found.decode.processor,
        'squared_error': squared_error(
          kernels_of(variables) if job.method.endswith(KERNELS) else variables, found.variables
        ),
      }
      if not job.method.endswith(KERNELS):
        row |= {'times_smaller': float_bytes / found.file_bytes} | judged(found.variables)
      table.add(row)
      progress.advance(task)
    nncodec.close()


def points(
  rows: Sequence[Mapping[str, str]], method: str, correction: str, by: str = 'top1'
) -> list[Point]:
  """The curve of a method; `divergence` counts as the better the lower, on a logarithmic scale."""
  score = lambda row: -np.log(float(row[by])) if by == 'divergence' else float(row[by])
  chosen = [row for row in rows if (row['method'], row['correction']) == (method, correction)]
  return [Point(float(row['file_bytes']), float(score(row))) for row in chosen]


def answer(
  network: str,
  question: str,
  ours: str,
  theirs: str,
  values: Mapping[str, float | None],
  goal: float,
) -> dict[str, object]:
  """A line of the summary; whether `ratio` meets the goal, if there is one."""
  number = values['ratio']
  is_met = '' if number is None else 'yes' if number <= goal else 'no'
  numbers = {name: '' if value is None else round(value, 3) for name, value in values.items()}
  line: dict[str, object] = {'network': network, 'question': question, 'ours': ours}
  return line | {'NNCodec': theirs} | numbers | {'goal': goal, 'met': is_met}


def summary(rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """The answers for every network: bytes and seconds of ours over NNCodec's."""
  lines: list[dict[str, object]] = []
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    sizes = [float(whole['file_bytes']) / rate for rate in (8, 10, 12, 14, 16)]

    loss = float(whole['top1']) - 0.1
    for method in (OURS, FEEDBACK):
      ours, theirs = points(found, method, 'noise'), points(found, SHIPPED, 'none')
      if ours and theirs:
        pair = size_at(ours, loss), size_at(theirs, loss)
        ratio = pair[0] / pair[1] if pair[0] and pair[1] else None
        names = name, 'a: loss of 10 points', f'{method}, noise', 'as it ships'
        lines.append(answer(*names, {'ratio': ratio}, 0.55))
    for question, goal, cases in (
      ('b: both corrected from noise', 0.95, ((OURS, 'noise'), (FEEDBACK, 'noise'))),
      ('c: unlabelled images', 0.8, ((IMAGES, 'images'),)),
    ):
      for method, correction in cases:
        for rival in (SHIPPED, TUNED):
          values: dict[str, float | None] = {}
          for key, by in (
            ('ratio', 'top1'),
            ('at equal divergence', 'divergence'),
            ('of images that c has not seen', 'top1_unseen'),
          ):
            ours, theirs = points(found, method, correction, by), points(found, rival, 'noise', by)
            several = ratios(ours, theirs, sizes)
            values[key] = geometric_mean(several) if several else None
          if ours and theirs:
            names = name, question, f'{method}, {correction}', f'{rival}, noise'
            lines.append(answer(*names, values, goal))
    lines += errors(name, found)
    lines += seconds(name, found)
  return lines


def errors(name: str, rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Bits over NNCodec's tuned ones at the squared error of our 1, 2 and 3 bits."""
  curve = [
    Point(float(row['bits_per_weight']), -np.log(float(row['squared_error'])))
    for row in rows
    if row['method'] == TUNED + KERNELS
  ]
  lines: list[dict[str, object]] = []
  for row in rows:
    if row['method'] != OURS + KERNELS:
      continue
    bits, goal = float(row['bits_per_weight']), 1.0 if bits_asked(row) <= 1 else 1.03
    theirs = bits_at(curve, -np.log(float(row['squared_error'])))
    if theirs:
      ratio = round(bits / theirs, 3)
      question = f'd: equal squared error, {bits_asked(row):g} bits'
      line = {'network': name, 'question': question, 'ours': OURS, 'NNCodec': 'tuned'}
      met = 'yes' if ratio <= goal else 'no'
      lines.append({**line, 'ratio': ratio, 'goal': goal, 'met': met})
  return lines


def bits_asked(row: Mapping[str, str]) -> float:
  return float(row['setting'].removeprefix('bits='))


def bits_at(curve: Sequence[Point], score: float) -> float | None:
  """Bits at which the logarithm of the error, nearly a line in them, is this.

  >>> bits_at([Point(1.0, 2.0), Point(2.0, 4.0)], 3.0)
  1.5
  """
  bits, scores = zip(*sorted(curve), strict=True) if curve else ((), ())
  if not curve or not scores[0] <= score <= scores[-1]:
    return None
  return float(np.interp(score, scores, bits))


def seconds(name: str, rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
  """Median seconds of files, and the first of ours, with its compilation, by the clock.

  The ratio is of the processor's seconds, which other programs disturb less; ours may be those of
  several cores.
  """

  def of(method: str, column: str) -> list[float]:
    corrections = ('none',) if method == SHIPPED else ('none', 'noise')
    same = [row for row in rows if row['method'] == method and row['correction'] in corrections]
    # with the correction, which either side may have, only where there is no row without
    plain = [row for row in same if row['correction'] == 'none'] or same
    return [float(row[column]) for row in plain]

  lines: list[dict[str, object]] = []
  for what, method in (('encode', OURS), ('encode', FEEDBACK), ('decode', OURS)):
    columns = f'{what}_seconds', f'{what}_processor'
    if not of(method, columns[0]) or not of(SHIPPED, columns[0]):
      continue
    clock, theirs = of(method, columns[0]), of(SHIPPED, columns[0])
    first = next(float(row[columns[0]]) for row in rows if row['method'] == method)
    ratio = float(np.median(of(method, columns[1])) / np.median(of(SHIPPED, columns[1])))
    limit = 60 if method == FEEDBACK else None
    is_met = np.median(clock) <= limit if limit else ratio <= 1
    line: dict[str, object] = {'network': name, 'question': f'e: seconds to {what}'}
    line |= {'ours': method, 'NNCodec': 'as it ships', 'ratio': round(ratio, 3)}
    line |= {'goal': f'{limit} s' if limit else 1.0, 'met': 'yes' if is_met else 'no'}
    line |= {'ours, s': round(float(np.median(clock)), 2), 'ours, first, s': round(first, 2)}
    lines.append(line | {'NNCodec, s': round(float(np.median(theirs)), 2)})
  return lines


def draw(rows: Sequence[Mapping[str, str]]) -> None:
  for name in dict.fromkeys(row['network'] for row in rows):
    found = [row for row in rows if row['network'] == name]
    whole = next(row for row in found if row['method'] == 'float32')
    curves = []
    for label, method, correction in (
      (OURS, OURS, 'noise'),
      (FEEDBACK, FEEDBACK, 'noise'),
      (IMAGES, IMAGES, 'images'),
      (SHIPPED, SHIPPED, 'noise'),
      (TUNED, TUNED, 'noise'),
      (RECIPE, RECIPE, 'noise'),
      (OURS, OURS, 'none'),
      (SHIPPED, SHIPPED, 'none'),
    ):
      curve = points(found, method, correction)
      if curve:
        sizes, tops = zip(*curve, strict=True)
        variant = 'BatchNorm not corrected' if correction == 'none' else ''
        curves.append(plots.Curve(label, sizes, tops, variant=variant))
    if curves:
      title = f'{name} ({int(whole["file_bytes"]) / 1e6:.1f} MB as float32), one shot'
      path = RESULTS / f'{name}.png'
      plots.accuracy_over_size(path, curves, baseline=float(whole['top1']), title=title)


def report(rows: Sequence[Mapping[str, str]], command: str) -> None:
  draw(rows)
  record: dict[str, Any] = {'command': command, 'tables': 'results.csv', 'unlabelled': UNLABELLED}
  versions = {'opq_jax': opq_jax.__version__, 'jax': jax.__version__, 'nncodec': '2.1.3'}
  try:
    versions['qwix'] = importlib.metadata.version('qwix')
  except importlib.metadata.PackageNotFoundError:
    versions['qwix'] = 'not installed'
  (RESULTS / 'run.json').write_text(json.dumps(record | {'versions': versions}, indent=1) + '\n')
  harness.report('against_nncodec', 'ours over NNCodec', command, summary(rows))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('data_dir', help='TFDS folder of array_record files')
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--nncodec_python', default=sys.executable)
  arguments = parser.parse_args()
  table = Table(RESULTS / 'results.csv')
  for path in arguments.weights:
    name = path.stem.removesuffix('_cifar10')
    compare(name, path, arguments.data_dir, arguments.nncodec_python, table)
  words = ' '.join(path.name for path in arguments.weights)
  command = 'python -m experiments.benchmarks.against_nncodec TFDS_FOLDER '
  report(table.rows(), f'{command}{words} --nncodec_python NNCODEC/bin/python')


if __name__ == '__main__':
  main()
