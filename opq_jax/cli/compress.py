"""`opq compress`: weights of any kind to an .opq file."""

import argparse
import textwrap
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq compress`, and the names of the known networks."""
  from opq_jax import models
  from opq_jax.allocation import DEFAULT_COMPRESSION_RATE, OBJECTIVES
  from opq_jax.cli.encoding import DIVERGENCE, MAX_IMAGES, MAX_TOKENS

  names = ' '.join(models.names())
  parser.description = f'{parser.description}\nnetworks:\n' + textwrap.fill(
    names, 79, initial_indent='  ', subsequent_indent='  '
  )
  parser.add_argument(
    'input', metavar='IN', help='weights: a file, a model folder, or that of a checkpoint'
  )
  parser.add_argument('output', metavar='OUT', help='the .opq file; replaced if it exists')
  parser.add_argument(
    '--fast',
    action='store_true',
    help='encode faster, into a larger file: no context modelling of neighbouring codes',
  )
  parser.add_argument(
    '--trellis',
    action='store_true',
    help='choose codes along a trellis: less error in a file of the same size (not for a network '
    'that is finetuned; goes on where a killed run was; not with --sparsity and --bits)',
  )
  parser.add_argument(
    '--json', action='store_true', help='print sizes and leaves as JSON, for programs'
  )
  add = parser.add_argument_group('network').add_argument
  add('--model', metavar='NAME', help='import the weights of this network; see above')
  add(
    '--source',
    metavar='NAME',
    help='framework of the weights (default: detected from tensor names)',
  )
  add(
    '--num-classes',
    type=int,
    metavar='N',
    help='number of logits (default: all of IN); all but one leaves out the first, which is '
    "TensorFlow's background class",
  )
  add(
    '--no-correction',
    action='store_true',
    help='do not correct BatchNorm, for a network that is finetuned afterwards',
  )
  add(
    '--feedback',
    action='store_true',
    help="minimise each layer's output error instead of each weight's (slower; not with "
    '--sparsity and --bits; no data required)',
  )
  add(
    '--layer-by-layer',
    action='store_true',
    help='choose the codes of one layer after the other, each for the outputs of the compressed '
    'layers before it; alone or with --feedback, --trellis or both, which then choose the codes of '
    'each layer (slower; not with --sparsity and --bits; no data required)',
  )
  add(
    '--images',
    metavar='FOLDER',
    help='unlabelled images for --feedback, --layer-by-layer and the BatchNorm correction, in the '
    'place of synthetic ones (needs pillow)',
  )
  add(
    '--max-images',
    type=int,
    metavar='N',
    help=f'number of images to use of FOLDER, at most (default: {MAX_IMAGES})',
  )
  add(
    '--inference-only',
    action='store_true',
    help='a smaller file that cannot be finetuned: two BatchNorm vectors instead of four, vectors '
    'rounded to bfloat16',
  )
  add = parser.add_argument_group('language models').add_argument
  add(
    '--calibration',
    metavar='TEXT',
    help='choose codes block after block, for what this text gives the layers: a text in UTF-8, or '
    "tokens in a .json file; 'self': text that the model writes itself; 'random': random tokens "
    '(with --trellis along a trellis; slower; goes on where a killed run was)',
  )
  add(
    '--calibration-tokens',
    type=int,
    metavar='N',
    help=f'how many tokens to read, at most; whole windows, one or more (default: {MAX_TOKENS})',
  )
  add = parser.add_argument_group('targets').add_argument
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
    help='bits per weight of the compressed leaves, tables and exactly stored outliers counted',
  )
  add(
    '--file-rate',
    type=float,
    metavar='R',
    help='size of IN over size of OUT, everything counted',
  )
  add(
    '--palette-bits',
    type=int,
    metavar='B',
    help='at most 2^B - 1 values a leaf or slice, B from 2 to 8, times a scale of each output '
    'where that pays, and none stored exactly, for runtimes that keep an index of B bits a weight '
    'in memory; alone with the least error, or within --rate, --bits-per-weight or --file-rate',
  )
  add('--sparsity', type=float, metavar='P', help='share of the weights to prune; with --bits')
  add(
    '--bits',
    type=float,
    metavar='B',
    help='mean bits of a weight that is not pruned; with --sparsity',
  )
  add(
    '--objective',
    choices=(*OBJECTIVES, DIVERGENCE),
    metavar='NAME',
    help=f'error that the allocation minimises over all layers: {", ".join(OBJECTIVES)}, or '
    f'{DIVERGENCE}, of the answers of a language model (default: {DIVERGENCE} for the folder of a '
    f'language model, else {OBJECTIVES[0]})',
  )
  add = parser.add_argument_group('leaves').add_argument
  globs: dict[str, Any] = {'nargs': '+', 'action': 'extend', 'default': [], 'metavar': 'GLOB'}
  add(
    '--include',
    **globs,
    help='compress only leaves whose path matches one of these, globs or re:EXPRESSION of the '
    'whole path; each must match some leaf.  One that matches only leaves that their names leave '
    'alone compresses these',
  )
  add(
    '--keep-optimizer',
    action='store_true',
    help="store an optimizer's state bit for bit (default: one number for each of its leaves)",
  )
  add(
    '--slices',
    nargs='+',
    action='extend',
    default=[],
    metavar='GLOB=N',
    help='the first N axes of leaves whose path matches GLOB count layers or experts, each a '
    'matrix of its own with its own threshold and grid',
  )
  add('--exclude', **globs, help='store leaves whose path matches one of these as they are')
  add(
    '--channel-axis',
    choices=('auto', 'first', 'last'),
    default='auto',
    help='axis of the output channels: detected from names (PyTorch: first), or the same for all '
    'leaves (default: %(default)s)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Compresses IN into OUT and prints what became of every leaf."""
  import opq_jax
  from opq_jax.allocation import DEFAULT_COMPRESSION_RATE, OBJECTIVES, check_file_rate
  from opq_jax.cli.encoding import DIVERGENCE, Encoding
  from opq_jax.cli.folders import may_hold_network
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.cli.safetensors_metadata import carried_metadata
  from opq_jax.core.files import check_readable
  from opq_jax.importers.named_networks import identity_of
  from opq_jax.weights import graph_uses, is_streamable

  source = Path(arguments.input)
  check_readable(source)
  for each in filter(None, (source, arguments.calibration, arguments.images)):
    check_output(Path(each), output_path(arguments.output))
  is_known = arguments.model is not None or identity_of(source) is not None
  _check_options(arguments, is_known)
  targets = {
    'sparsity': arguments.sparsity,
    'bits': arguments.bits,
    'compression_rate': arguments.rate,
    'bits_per_weight': arguments.bits_per_weight,
    'file_rate': arguments.file_rate,
  }
  targets = {name: value for name, value in targets.items() if value is not None}
  if arguments.file_rate is not None:
    check_file_rate(*(targets.pop('file_rate'), *targets.values()))
    targets = {'file_rate': arguments.file_rate}
  if arguments.palette_bits is not None:
    targets['palette_bits'] = arguments.palette_bits
  needs_network = arguments.calibration is not None or arguments.objective == DIVERGENCE
  network = None
  if needs_network or (not is_known and arguments.objective is None and may_hold_network(source)):
    from opq_jax.cli import calibration

    network = calibration.network_in(source, is_needed=needs_network)
  plan = Encoding(
    targets=targets or {'compression_rate': DEFAULT_COMPRESSION_RATE},
    objective=arguments.objective or (OBJECTIVES[0] if network is None else DIVERGENCE),
    # kernels of known networks are Flax's
    channel_axis='last' if is_known else arguments.channel_axis,
    slices=_slices(arguments.slices),
  )
  about = {'weights': source.name, 'opq_jax': opq_jax.__version__}
  about |= carried_metadata(source)
  graph = None if is_known else graph_uses(source)
  if not is_known and is_streamable(source):
    from opq_jax.cli import leaf_by_leaf

    leaf_by_leaf.compress(arguments, network, plan, about, graph)
  else:
    from opq_jax.cli import in_memory

    in_memory.compress(arguments, is_known, plan, about, graph)


def _slices(texts: list[str]) -> dict[str, int]:
  """Returns the globs and numbers of --slices."""
  from opq_jax.cli.encoding import parsed_slices

  try:
    return dict(map(parsed_slices, texts))
  except ValueError as error:
    raise ValueError(f'--{error}') from error


def _check_options(arguments: argparse.Namespace, is_known: bool) -> None:
  """Refuses options that do not go together.

  Args:
    arguments: of `opq compress`.
    is_known: whether IN is of a network of `opq_jax.models`, by --model or by its own metadata.

  Raises:
    ValueError: an option needs another one, or excludes it.
  """
  needs_model = {
    '--source': arguments.source is not None,
    '--num-classes': arguments.num_classes is not None,
    '--no-correction': arguments.no_correction,
    '--feedback': arguments.feedback,
    '--layer-by-layer': arguments.layer_by_layer,
    '--images': arguments.images is not None,
    '--inference-only': arguments.inference_only,
  }
  if not is_known:
    for option, is_given in needs_model.items():
      if is_given:
        raise ValueError(f'{option} needs --model')
  if arguments.max_images is not None and arguments.images is None:
    raise ValueError('--max-images needs --images')
  if arguments.calibration is not None:
    if is_known:
      raise ValueError('--calibration: found it together with --model, expected --images')
    if arguments.slices:
      raise ValueError(
        '--calibration: found it together with --slices, expected one of them: a tensor of a '
        'language model is one matrix'
      )
    if arguments.file_rate is not None:
      raise ValueError(
        '--calibration: found it together with --file-rate, expected --rate or --bits-per-weight'
      )
  elif arguments.calibration_tokens is not None:
    raise ValueError('--calibration-tokens needs --calibration')
  if arguments.calibration_tokens is not None and arguments.calibration_tokens < 1:
    raise ValueError(
      f'--calibration-tokens: found {arguments.calibration_tokens}, expected 1 or more'
    )
  encoders = {
    '--feedback': arguments.feedback,
    '--trellis': arguments.trellis,
    '--layer-by-layer': arguments.layer_by_layer,
    '--calibration': arguments.calibration is not None,
  }
  for option, is_given in encoders.items():
    if is_given and (arguments.bits, arguments.sparsity) != (None, None):
      raise ValueError(f'{option}: found it together with --sparsity or --bits, expected --rate')
    if is_given and arguments.palette_bits is not None and option != '--feedback':
      raise ValueError(
        f'{option}: found it together with --palette-bits, expected neither or --feedback: it '
        'chooses grids of its own'
      )
  if arguments.trellis and arguments.fast:
    raise ValueError('--trellis: found it together with --fast, expected one of them')
  reads_images = arguments.feedback or arguments.layer_by_layer or not arguments.no_correction
  if arguments.images is not None and not reads_images:
    raise ValueError(
      '--images: found it together with --no-correction, expected --feedback or --layer-by-layer '
      'too: nothing else reads images'
    )
  if is_known and arguments.channel_axis == 'first':
    raise ValueError(
      '--channel-axis: found first with a known network, expected last: a network is compressed '
      'as Flax has it'
    )
