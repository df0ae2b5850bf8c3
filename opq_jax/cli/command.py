"""The `opq` command: parse, call, print."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

import opq_jax
from opq_jax import importers, models
from opq_jax.allocation.allocator import (
  DEFAULT_COMPRESSION_RATE,
  OBJECTIVES,
  check_file_rate,
  is_compressible,
)
from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.file import artifact
from opq_jax.file import rate as file_rate
from opq_jax.file.artifact import OpqFile
from opq_jax.importers import networks
from opq_jax.report import sizes, tables, verification
from opq_jax.weights import files as weight_files
from opq_jax.weights import stored_leaves, streaming

_FROM_NOISE = 'corrected from noise'  # what the metadata say of such a BatchNorm
_FROM_SYNTHETIC = 'corrected from synthetic images'
_FEEDBACK = 'by error feedback, moments from synthetic images'  # of the codes
_TRELLIS = 'along a trellis'
_BOTH = f'{_TRELLIS}, {_FEEDBACK}'
_INFERENCE_ONLY = 'BatchNorm in two vectors, vectors rounded to bfloat16'
_MOST_PROBLEMS = 20  # that `verify` puts into words

_ABOUT = """\
Small files of neural networks: one-shot pruning and quantization, from the weights alone.

examples:
  opq compress resnet50.safetensors resnet50.opq              10 times fewer bits per weight
  opq compress model.pth model.opq --bits-per-weight 2        2 bits per weight
  opq compress --model resnet50 resnet50.pth resnet50.opq     a network that opq knows
  opq inspect model.opq                                       what is in it, and its four sizes
  opq verify model.opq --against model.safetensors            every claim of it, recomputed
  opq decompress model.opq model.safetensors                  back to plain arrays
  opq demo                                                    a tour in a minute
"""

_COMPRESS = """\
Reads weights, prunes and quantizes every floating leaf of two or more dimensions, and writes an
.opq file. Other leaves (biases, BatchNorm) go into the file bit for bit.

IN may be .safetensors, .npz, .msgpack (Flax), .pt or .pth (needs torch), .h5 or .keras (needs
h5py), .opq, or the folder of an Orbax checkpoint. Leaves in float64 are compressed as float32.

With --model, the weights of one of the networks below are imported from whatever framework they
are of, and the file says which network it holds: it can be evaluated, and decompressed by the
names of its framework. Its BatchNorm is then corrected too, from noise, without any data: pruning
and quantization shift what BatchNorm sees, and at few bits per weight an uncorrected network is
not usable before it is finetuned. Paths of leaves are those of Flax (params/conv_1/kernel).

networks:
"""
_COMPRESS += textwrap.fill(
  ' '.join(models.names()), 96, initial_indent='  ', subsequent_indent='  '
)

_COMPRESS_EXAMPLES = """\
examples:
  opq compress model.safetensors model.opq
      32 / 10 = 3.2 bits per weight, pruning and quantization chosen together
  opq compress model.safetensors model.opq --bits-per-weight 2
      2 bits per weight; --rate 16 is the same, for 32 / 16 = 2
  opq compress model.safetensors model.opq --file-rate 8
      a file 8 times smaller than model.safetensors, everything counted
  opq compress model.safetensors model.opq --sparsity 0.74 --bits 3
      the paper's two targets: 74 % pruned, survivors at 3 bits on average
  opq compress model.pth model.opq --exclude '*embed*' 'fc.*'
      leaves embedding tables and the last layer as they are
  opq compress checkpoints/ model.opq --include 'params/*'
      the latest step of an Orbax CheckpointManager; compresses nothing but params
  opq compress --model resnet50 resnet50.pth resnet50.opq
      whose weights they are is seen by their names; a file that knows what it holds
  opq compress --model resnet20 --feedback --rate 16 resnet20.safetensors resnet20.opq
      codes that err less where it counts, in a file of the same size
  opq compress --model resnet20 --trellis --feedback --rate 16 resnet20.safetensors resnet20.opq
      both together
  opq compress --model resnet20 --inference-only resnet20.safetensors resnet20.opq
      a tenth smaller where the network is small
  opq compress --model resnet50 --source timm resnet50_a1.pth resnet50.opq
      timm's have torchvision's names and other preprocessing
"""

_INSPECT_EXAMPLES = """\
examples:
  opq inspect model.opq
  opq inspect model.opq --json | jq .totals.file_rate
"""

_VERIFY_EXAMPLES = """\
examples:
  opq verify model.opq --against model.safetensors
  opq verify model.opq --against model.safetensors --json | jq '.problems[]'
  opq verify resnet50.opq --against resnet50.pth
      of a file made with --model: imports the weights again, and corrects BatchNorm again;
      with --feedback or --trellis, chooses the codes again, on a platform that rounds like the
      first
"""

_DECOMPRESS_EXAMPLES = """\
examples:
  opq decompress model.opq model.safetensors
      plain arrays by name; a nested tree's names are joined by '/'
  opq decompress resnet50.opq resnet50.safetensors
      of a file made with --model: by the names that its weights came with, for torch and others
  opq decompress --to flax resnet50.opq resnet50.safetensors
      by Flax's names: params/stem/kernel, batch_stats/stem_bn/mean, ...
"""

_DEMO_EXAMPLES = """\
examples:
  opq demo
  opq demo --seed 1 --rate 16 --output digits.opq
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: its arguments; by default those of the process.

  Returns:
    The exit code: 0; 2 where the arguments, an input or an output are at fault, which one line on
    stderr names, and nothing was written; 1 where a file does not hold what it claims, or nobody
    reads stdout to its end.
  """
  try:
    arguments = _parser().parse_args(argv)
  except SystemExit as exit_:
    return int(exit_.code or 0)
  try:
    code = arguments.run(arguments)
    sys.stdout.flush()
  except BrokenPipeError:
    # `opq inspect net.opq | head`: nobody reads on, and Python would say so once more at its exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError) as error:
    _complain(_message(error))
    return 2
  return code or 0


def _parser() -> argparse.ArgumentParser:
  def command(
    name: str, run: Callable[[argparse.Namespace], int | None], short: str, about: str, epilog: str
  ) -> Any:
    new = commands.add_parser(name, help=short, description=about, epilog=epilog, **raw)
    new.set_defaults(run=run)
    return new

  raw: dict[str, Any] = {'formatter_class': argparse.RawDescriptionHelpFormatter}
  parser = argparse.ArgumentParser(prog='opq', description=_ABOUT, **raw)
  parser.add_argument('--version', action='version', version=f'opq_jax {opq_jax.__version__}')
  commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

  compress = command(
    'compress', _compress, 'weights to an .opq file', _COMPRESS, _COMPRESS_EXAMPLES
  )
  compress.add_argument('input', metavar='IN', help='weights: a file, or a folder of Orbax')
  compress.add_argument('output', metavar='OUT', help='the .opq file; replaced if it exists')
  compress.add_argument(
    '--fast',
    action='store_true',
    help='code weights without looking at their neighbours: sooner done, and a larger file',
  )
  compress.add_argument(
    '--trellis',
    action='store_true',
    help='choose codes along a trellis: less error in a file of the same size, for a network that '
    'is not trained on; holds the weights in memory, and is not for --sparsity and --bits',
  )
  add = compress.add_argument_group('network').add_argument
  add('--model', metavar='NAME', help='import the weights of this network; see above')
  add('--source', metavar='NAME', help='whose they are (default: seen by their names)')
  add(
    '--num-classes',
    type=int,
    metavar='N',
    help="logits (default: all); one fewer than IN has drops the first, which is TensorFlow's "
    'for the background',
  )
  add(
    '--no-correction',
    action='store_true',
    help='leave BatchNorm as it is, for a network that is finetuned afterwards',
  )
  add(
    '--feedback',
    action='store_true',
    help='choose codes by the error of what layers give, not by that of each weight; without data '
    'too, but it takes longer, and is not for --sparsity and --bits',
  )
  add(
    '--inference-only',
    action='store_true',
    help='a file for use and not for training: BatchNorm in two vectors instead of four, vectors '
    'rounded to bfloat16',
  )
  add = compress.add_argument_group('targets').add_argument
  add(
    '--rate',
    type=float,
    metavar='R',
    help=f'32 over the bits per weight of the compressed leaves (default '
    f'{DEFAULT_COMPRESSION_RATE:g})',
  )
  add(
    '--bits-per-weight',
    type=float,
    metavar='B',
    help='bits per weight of the compressed leaves, tables and escaped weights counted',
  )
  add(
    '--file-rate',
    type=float,
    metavar='R',
    help='how many times smaller than IN, as it came, OUT is to be, everything counted',
  )
  add('--sparsity', type=float, metavar='P', help='share of the weights to prune; with --bits')
  add('--bits', type=float, metavar='B', help='mean bits of a survivor; with --sparsity')
  add(
    '--objective',
    choices=OBJECTIVES,
    default=OBJECTIVES[0],
    help='what is kept as small as can be, over all layers (default %(default)s)',
  )
  add = compress.add_argument_group('leaves').add_argument
  globs: dict[str, Any] = {'nargs': '+', 'action': 'extend', 'default': [], 'metavar': 'GLOB'}
  add(
    '--include',
    **globs,
    help='compress only leaves whose path matches one of these; each must match some leaf',
  )
  add('--exclude', **globs, help='leave these as they are')
  add(
    '--channel-axis',
    choices=('auto', 'first', 'last'),
    default='auto',
    help='where the output channels are: by name (PyTorch: first), or the same for all '
    '(default %(default)s)',
  )

  about = 'Shows the leaves and the four sizes of an .opq file; reads and checks every byte of it.'
  inspect = command('inspect', _inspect, 'what is in an .opq file', about, _INSPECT_EXAMPLES)
  inspect.add_argument('file', metavar='FILE', help='an .opq file')
  inspect.add_argument(
    '--json', action='store_true', help='for programs: totals and leaves as JSON'
  )

  short = 'an .opq file against the weights that it was made of'
  about = (
    'Recomputes every claim of an .opq file from the original weights: names, shapes, dtypes,\n'
    'the code of every weight, errors, sizes, and that all other leaves are there bit for bit.\n'
    'The exit code is 1 where something does not hold.'
  )
  verify = command('verify', _verify, short, about, _VERIFY_EXAMPLES)
  verify.add_argument('file', metavar='FILE', help='an .opq file')
  verify.add_argument(
    '--against', metavar='WEIGHTS', required=True, help='weights: a file, or a folder of Orbax'
  )
  verify.add_argument(
    '--json', action='store_true', help='for programs: what holds, problems and leaves as JSON'
  )

  short = 'an .opq file to plain arrays'
  about = (
    'Writes the decoded weights as safetensors; those of a file made with --model by the names\n'
    'that they came with.'
  )
  decompress = command('decompress', _decompress, short, about, _DECOMPRESS_EXAMPLES)
  decompress.add_argument('file', metavar='FILE', help='an .opq file')
  decompress.add_argument('output', metavar='OUT', help='the .safetensors file; replaced if there')
  decompress.add_argument(
    '--to',
    choices=('source', 'flax'),
    help="by whose names a known network's weights are written (default: its source's)",
  )

  about = 'Trains, compresses and evaluates a small network.'
  demo = command('demo', _demo, 'a small network, start to end', about, _DEMO_EXAMPLES)
  for name, kind, text in (
    ('--seed', int, 'of the random numbers'),
    ('--rate', float, '32 bits over the bits per weight'),
    ('--output', Path, 'where the .opq file goes'),
  ):
    demo.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text)
  return parser


def _compress(arguments: argparse.Namespace) -> None:
  source, output = Path(arguments.input), Path(arguments.output)
  _check_output(source, output)
  _check_network(arguments)
  is_known = arguments.model is not None or networks.identity_of(source) is not None
  # the kernels of our own networks are Flax's
  mode: weight_files.ChannelMode = 'last' if is_known else arguments.channel_axis
  axis = partial(weight_files.channel_axis, mode=mode)
  targets = {
    'sparsity': arguments.sparsity,
    'bits': arguments.bits,
    'compression_rate': arguments.rate,
    'bits_per_weight': arguments.bits_per_weight,
    'file_rate': arguments.file_rate,
  }
  targets = {name: value for name, value in targets.items() if value is not None}
  targets = targets or {'compression_rate': DEFAULT_COMPRESSION_RATE}
  metadata = {
    'weights': source.name,
    'targets': _targets_text(targets),
    'objective': arguments.objective,
    'channel_axis': mode,
    'opq_jax': opq_jax.__version__,
  }
  if arguments.file_rate is not None:
    check_file_rate(*(targets.pop('file_rate'), *targets.values()))
    targets = {'file_rate': arguments.file_rate}
  console = _console(sys.stdout)
  if not is_known and not arguments.trellis and stored_leaves.is_streamable(source):
    _compress_leaf_by_leaf(arguments, source, output, targets, axis, metadata)
    return
  with _stages(console) as stage:
    with stage('read'):
      network = None
      if is_known:
        network = networks.load(
          source,
          name=arguments.model,
          source=arguments.source,
          num_classes=arguments.num_classes,
        )
        metadata |= networks.metadata(network)
      params = weight_files.read_weights(source) if network is None else network.variables
      chosen = _chosen(params, arguments.include, arguments.exclude)
      original = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
      params = _narrowed(params, chosen)
    compressor = _Compressor(arguments, network, params, chosen, axis, metadata, stage)
    if 'file_rate' in targets:
      made: dict[float, _Made] = {}

      def size_of(bits: float) -> int:
        made[bits] = compressor.made(bits_per_weight=bits)
        return len(made[bits].data)

      weights = sum(leaf.size for leaf in jax.tree.leaves(params))
      with _notes():
        bits = file_rate.bits_of_file(size_of, original, targets['file_rate'], weights)
      found = made[bits]
    else:
      found = compressor.made(**targets)
    with stage('encode'):
      report = sizes.payload_report(found.data, params, found.state, channel_axis=axis)
    with stage('write'):
      files.write_bytes(output, found.data)
  for note in found.notes:
    _note(note)
  console.print(tables.summary(params, found.allocation), sizes.four_sizes(report))
  if network is not None:
    console.print(Text(_network_line(found.metadata)))
  console.print(Text(f'{output}: {report.file:,} bytes, {report.file_rate:.2f} times smaller'))


class _Made(NamedTuple):
  """What compressing has made; `notes` are of the allocation."""

  data: bytes
  allocation: opq_jax.Allocation
  state: opq_jax.CompressionState
  metadata: dict[str, str]
  notes: list[str]


@dataclasses.dataclass
class _Compressor:
  """A tree in memory, to be compressed for one target or for several, one after the other."""

  arguments: argparse.Namespace
  network: networks.Network | None
  params: PyTree
  chosen: set[str]
  axis: Callable[[str, Any], int]
  metadata: dict[str, str]
  stage: Callable[[str], contextlib.AbstractContextManager]

  def made(self, **targets: float) -> _Made:
    """The file of these targets."""
    metadata, network, arguments = dict(self.metadata), self.network, self.arguments
    if arguments.file_rate is not None:
      metadata['targets'] = _targets_text({'file_rate': arguments.file_rate, **targets})
    moments = self._moments
    if arguments.trellis:
      metadata['codes'] = _TRELLIS
    if moments is not None:
      metadata['codes'] = _BOTH if arguments.trellis else _FEEDBACK
    with self.stage('allocate'), _notes() as notes:
      options: dict[str, Any] = {
        'objective': arguments.objective,
        'compressible': lambda path, _: path in self.chosen,
        'channel_axis': self.axis,
        **targets,
      }
      if arguments.trellis:
        allocation, compressed, state = opq_jax.allocate_with_trellis(
          self.params, moments, **options
        )
      elif moments is None:
        allocation = opq_jax.allocate(self.params, **options)
        state = opq_jax.init_state(self.params, allocation)
        compressed = opq_jax.apply_compression(self.params, state)
      else:
        allocation, compressed, state = opq_jax.allocate_with_feedback(
          self.params, moments, **options
        )
    stored = compressed if 'codes' in metadata else self.params
    if network is not None and networks.has_batch_norm(self.params):
      metadata['batch_norm'] = 'not corrected'
      if not arguments.no_correction:
        metadata['batch_norm'] = _FROM_NOISE if moments is None else _FROM_SYNTHETIC
        with self.stage('correct BatchNorm'):
          stored = networks.correct_batch_norm(network, compressed, images=self._images)
    if network is not None and arguments.inference_only:
      metadata['inference_only'] = _INFERENCE_ONLY
      stored = networks.for_inference(network, stored)
    with self.stage('encode'):
      data = artifact.serialize(stored, state, metadata, contexts=not arguments.fast)
    return _Made(data, allocation, state, metadata, notes)

  @functools.cached_property
  def _images(self) -> Any:
    """Synthetic, where error feedback is asked for."""
    if self.network is None or not self.arguments.feedback:
      return None
    with self.stage('synthetic images'):
      return jax.block_until_ready(networks.synthetic_batches(self.network))

  @functools.cached_property
  def _moments(self) -> PyTree | None:
    if self._images is None or self.network is None:
      return None
    with self.stage('moments'):
      return jax.block_until_ready(
        opq_jax.mean_moments(self.network.model.apply, self.params, self._images)
      )


@contextlib.contextmanager
def _notes() -> Iterator[list[str]]:
  """Collects what is warned of, but the fit of a density, which the table marks."""
  found: list[str] = []
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always', UserWarning)
    yield found
  texts = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]
  found += dict.fromkeys(text for text in texts if not text.startswith('the Laplace density'))


def _targets_text(targets: dict[str, float]) -> str:
  return ' '.join(f'{name}={_number(value)}' for name, value in targets.items())


def _compress_leaf_by_leaf(
  arguments: argparse.Namespace,
  source: Path,
  output: Path,
  targets: dict[str, float],
  axis: Callable[[str, Any], int],
  metadata: dict[str, str],
) -> None:
  """The same file of a tree that need not fit into memory."""
  console = _console(sys.stdout)
  tree = stored_leaves.open_weights(source)
  chosen = _chosen(tree, arguments.include, arguments.exclude)
  leaves = [
    leaf.narrowed() if name in chosen else leaf for name, leaf in trees.named_leaves(tree).items()
  ]
  tree = jax.tree.unflatten(jax.tree.structure(tree), leaves)
  with _stages(console) as stage, _notes() as notes:
    done = streaming.compress(
      tree,
      output,
      compressible=lambda path, _: path in chosen,
      channel_axis=axis,
      metadata=metadata,
      contexts=not arguments.fast,
      objective=arguments.objective,
      stage=stage,
      **targets,
    )
  for note in notes:
    _note(note)
  report = done.report
  console.print(tables.summary(tree, done.allocation), sizes.four_sizes(report))
  console.print(Text(f'{output}: {report.file:,} bytes, {report.file_rate:.2f} times smaller'))


def _inspect(arguments: argparse.Namespace) -> None:
  with OpqFile(arguments.file) as file:
    metadata = file.metadata
  report = sizes.file_report(arguments.file, channel_axis=_axis(metadata))
  if arguments.json:
    print(json.dumps(_as_json(arguments.file, metadata, report), indent=2))
    return
  console = _console(sys.stdout)
  console.print(sizes.size_table(report), sizes.four_sizes(report))
  for key, value in metadata.items():
    console.print(Text(tables.visible(f'{key}: {value}'), style='dim'))
  console.print(Text(f'{arguments.file}: all {report.file:,} bytes read, all checksums hold'))


def _verify(arguments: argparse.Namespace) -> int:
  with OpqFile(arguments.file) as file:
    metadata = file.metadata
  identity = networks.identity(metadata)
  coded = corrected = images = moments = None
  if identity is None:
    params = weight_files.read_weights(arguments.against)
  else:
    network = networks.load(
      arguments.against,
      name=identity.name,
      source=identity.source,
      num_classes=identity.num_classes,
    )
    params = network.variables
    if metadata.get('codes') in (_FEEDBACK, _BOTH):
      images = networks.synthetic_batches(network)
      moments = opq_jax.mean_moments(network.model.apply, params, images)
    if metadata.get('codes') == _FEEDBACK:
      with OpqFile(arguments.file) as file:
        state = file.load(like=params)[1]
      coded, _ = opq_jax.encode_with_feedback(params, state, moments)
    if metadata.get('batch_norm') in (_FROM_NOISE, _FROM_SYNTHETIC):
      compressed = _compressed_in(arguments.file, params)
      corrected = networks.correct_batch_norm(network, compressed, images=images)
    if metadata.get('inference_only') == _INFERENCE_ONLY:
      corrected = networks.for_inference(network, params if corrected is None else corrected)
  if metadata.get('codes') in (_TRELLIS, _BOTH):
    coded = _along_trellis(arguments.file, metadata, params, moments)
  found = verification.verify(
    arguments.file, params, coded=coded, corrected=corrected, channel_axis=_axis(metadata)
  )
  if arguments.json:
    print(json.dumps(_verified_as_json(arguments, metadata, found), indent=2, allow_nan=False))
    return 0 if found.holds else 1
  console = _console(sys.stdout)
  console.print(found)
  if found.report is not None:
    console.print(sizes.four_sizes(found.report))
  if not found.holds:
    for problem in found.problems[:_MOST_PROBLEMS]:
      _complain(problem)
    more = len(found.problems) - _MOST_PROBLEMS
    _complain(
      f'{arguments.file} does not hold what it claims'
      + (f'; {more} more problems like these' if more > 0 else '')
    )
    return 1
  console.print(Text(f'{arguments.file}: every claim holds against {arguments.against}'))
  return 0


def _along_trellis(
  path: str, metadata: dict[str, str], params: PyTree, moments: PyTree | None
) -> PyTree:
  """What `opq compress --trellis` makes of the original weights for the file's own targets."""
  with OpqFile(path) as file:
    chosen = {name for name in file if file.leaf_state(name) is not None}
  found = dict(part.partition('=')[::2] for part in metadata.get('targets', '').split())
  names = 'bits_per_weight', 'compression_rate'
  try:
    target = next({name: float(found[name])} for name in names if name in found)
  except (StopIteration, ValueError) as error:
    raise ValueError(
      f'{path}: found targets {metadata.get("targets")!r}, expected the compression_rate or '
      'bits_per_weight of codes along a trellis'
    ) from error
  with _notes():
    _, coded, _ = opq_jax.allocate_with_trellis(
      _narrowed(params, chosen),
      moments,
      **target,
      objective=metadata.get('objective', OBJECTIVES[0]),
      compressible=lambda path, _: path in chosen,
      channel_axis=_axis(metadata),
    )
  return coded


def _number(value: float) -> str:
  """So that it comes back, and without zeros."""
  short = f'{value:g}'
  return short if float(short) == value else repr(value)


def _compressed_in(path: str, params: PyTree) -> PyTree:
  """The original weights with those that a file has compressed in their places."""
  with OpqFile(path) as file:

    def chosen(name: str, leaf: Any) -> Any:
      if name not in file or file.leaf_state(name) is None or file[name].shape != leaf.shape:
        return leaf
      return file[name]

    leaves = [chosen(name, leaf) for name, leaf in trees.named_leaves(params).items()]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _decompress(arguments: argparse.Namespace) -> None:
  source, output = Path(arguments.file), Path(arguments.output)
  _check_output(source, output)
  with OpqFile(source) as file:
    identity = networks.identity(file.metadata)
    params, _ = file.load()
  names = 'the names in the file'
  if identity is None or arguments.to == 'flax':
    if arguments.to == 'source':
      raise ValueError(
        f'--to: found no name of a network in {source}, expected a file made with --model'
      )
  else:
    params = importers.to_tensors(identity.name, params, identity.source)
    names = f'the names of {identity.source}'
  weight_files.write_safetensors(output, params)
  size = os.stat(output).st_size
  _console(sys.stdout).print(Text(f'{output}: {size:,} bytes, by {names}'))


def _demo(arguments: argparse.Namespace) -> None:
  from opq_jax.cli import demo

  given = {name: value for name, value in vars(arguments).items() if name != 'run'}
  demo.run(**given)


def _check_network(arguments: argparse.Namespace) -> None:
  """The options of `--model` belong to it."""
  given = {
    '--source': arguments.source is not None,
    '--num-classes': arguments.num_classes is not None,
    '--no-correction': arguments.no_correction,
    '--feedback': arguments.feedback,
    '--inference-only': arguments.inference_only,
  }
  if arguments.model is None:
    for option, is_given in given.items():
      if is_given:
        raise ValueError(f'{option}: found it without --model, expected both')
  for option, is_given in (('--feedback', arguments.feedback), ('--trellis', arguments.trellis)):
    if is_given and (arguments.bits, arguments.sparsity) != (None, None):
      raise ValueError(f'{option}: found it together with --sparsity or --bits, expected --rate')
  if arguments.trellis and arguments.fast:
    raise ValueError('--trellis: found it together with --fast, expected one of them')
  if arguments.model is not None and arguments.channel_axis == 'first':
    raise ValueError(
      '--channel-axis: found first with --model, expected last: a network is compressed as Flax '
      'has it'
    )


def _axis(metadata: dict[str, str]) -> Callable[[str, Any], int]:
  """The output channels of a file's leaves."""
  mode = metadata.get('channel_axis')
  return partial(
    weight_files.channel_axis,
    mode='first' if mode == 'first' else 'last' if mode == 'last' else 'auto',
  )


def _network_line(metadata: dict[str, str]) -> str:
  """Which network a file holds, and what became of its BatchNorm."""
  batch_norm = metadata.get('batch_norm')
  return (
    f'{metadata["model"]}, {metadata["num_classes"]} classes, by the names of '
    f'{metadata["source"]}; ' + (f'BatchNorm {batch_norm}' if batch_norm else 'no BatchNorm')
  )


def _chosen(params: PyTree, include: list[str], exclude: list[str]) -> set[str]:
  """The paths of the leaves to compress."""
  paths = [path for path, leaf in trees.named_leaves(params).items() if is_compressible(path, leaf)]
  matches = lambda path, globs: any(fnmatchcase(path, glob) for glob in globs)
  for option, globs in (('--include', include), ('--exclude', exclude)):
    for glob in globs:
      if not any(fnmatchcase(path, glob) for path in paths):
        raise ValueError(
          f'{option}: found no leaf that {glob!r} matches, expected one of {paths[:5]}'
        )
  chosen = {path for path in paths if not include or matches(path, include)}
  return {path for path in chosen if not matches(path, exclude)}


def _narrowed(params: PyTree, chosen: set[str]) -> PyTree:
  """The tree with chosen leaves in float32 at most: JAX has no wider ones by default."""
  wide = lambda path, leaf: path in chosen and leaf.dtype == np.float64
  leaves = [
    leaf.astype(np.float32) if wide(path, leaf) else leaf
    for path, leaf in trees.named_leaves(params).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _check_output(source: Path, output: Path) -> None:
  """Finds out before the work what would spoil its end."""
  if not output.parent.is_dir():
    raise ValueError(f'{output}: found no folder {output.parent}, expected one')
  if output.is_dir():
    raise ValueError(f'{output}: found a folder, expected the name of a file')
  if output.exists() and source.exists() and output.samefile(source):
    raise ValueError(f'{output}: found the input itself, expected another file for the output')


@contextlib.contextmanager
def _stages(console: Console) -> Iterator[Callable[[str], contextlib.AbstractContextManager]]:
  """Progress on stderr while stages run; one line of their times once all have."""
  times: dict[str, float] = {}
  columns = SpinnerColumn(), TextColumn('{task.description}'), TimeElapsedColumn()
  where = _console(sys.stderr)
  # even a transient one leaves a blank line in a file
  with Progress(*columns, console=where, transient=True, disable=not where.is_terminal) as progress:

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
      task, begin = progress.add_task(name, total=1), time.perf_counter()
      yield
      progress.update(task, completed=1)
      times[name] = times.get(name, 0) + time.perf_counter() - begin

    yield stage
  lines = [f'{name} {seconds:.1f} s' for name, seconds in times.items()]
  console.print(Text(', '.join(lines), style='dim'))


def _totals(report: sizes.SizeReport) -> dict[str, Any]:
  names = ('weights', 'survivors', 'sparsity', 'escaped', 'original', 'as_float32', 'nominal')
  more = ('packed', 'entropy', 'file', 'headers', 'bits_per_weight')
  dead = ('dead_leaves', 'dead_channels', 'dead_rows')
  rates = {
    'nominal_rate': 'compressed leaves in float32',
    'packed_rate': 'compressed leaves in float32',
    'entropy_rate': 'compressed leaves in float32',
    'file_rate': 'all leaves as they came',
  }
  found = {name: getattr(report, name) for name in (*names, *more, *dead, *rates)}
  return {**found, 'rates_are_against': rates}


def _as_json(path: str, metadata: dict[str, str], report: sizes.SizeReport) -> dict[str, Any]:
  return {
    'path': path,
    'metadata': metadata,
    'totals': _totals(report),
    'compressed': [dataclasses.asdict(leaf) for leaf in report.compressed],
    'uncompressed': [dataclasses.asdict(leaf) for leaf in report.uncompressed],
  }


def _verified_as_json(
  arguments: argparse.Namespace, metadata: dict[str, str], found: verification.Verification
) -> dict[str, Any]:
  # JSON knows no infinity: the error of weights that are all 0 and should not be anything else
  finite = lambda leaf: {
    name: value if not isinstance(value, float) or math.isfinite(value) else None
    for name, value in dataclasses.asdict(leaf).items()
  }
  return {
    'path': arguments.file,
    'against': arguments.against,
    'metadata': metadata,
    'holds': found.holds,
    'problems': found.problems,
    'exact': found.exact,
    'corrected': found.corrected,
    'compressed': [finite(leaf) for leaf in found.compressed],
    'totals': found.report and _totals(found.report),
  }


def _complain(text: str, style: str = 'red') -> None:
  """One line on stderr."""
  line = tables.visible(' '.join(text.split()))
  _console(sys.stderr).print(Text(f'opq: {line}', style=style), soft_wrap=True)


def _note(text: str) -> None:
  _complain(f'note: {text}', style='yellow')


def _message(error: ValueError | OSError) -> str:
  if isinstance(error, OSError) and error.filename is not None:
    return f'{os.fspath(error.filename)}: {error.strerror}'
  return str(error)


def _console(stream: Any) -> Console:
  """A console that, where nobody watches, is as wide as the tables need."""
  return Console(file=stream, width=None if stream.isatty() else tables.WIDTH)


if __name__ == '__main__':
  sys.exit(main())
