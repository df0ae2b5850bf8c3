"""`opq decompress`: the decoded weights of a file as plain arrays, or as a model folder."""

import argparse
import functools
import os
import sys
from pathlib import Path

# of other suffixes, programs would choose a reader that fails; without one, no program does
_SUFFIXES = '', '.safetensors', '.npz'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq decompress`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    'output',
    metavar='OUT',
    help='the .safetensors or .npz file, replaced if it exists; or of a file made of a model '
    'folder, the new folder',
  )
  parser.add_argument(
    '--to',
    choices=('source', 'flax'),
    help='names under which the weights of a known network are written (default: source, the '
    'framework that they came from)',
  )

  parser.add_argument(
    '--into',
    metavar='NET',
    help='an ONNX file or Core ML package of the network: OUT is it with the decoded weights (opq '
    'export: small)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the weights of a file as safetensors, or the model folder that it was made of."""
  from rich.text import Text

  from opq_jax.cli import export
  from opq_jax.cli.console import console
  from opq_jax.cli.outputs import check_new_folder, check_output, output_path
  from opq_jax.cli.safetensors_metadata import given_back
  from opq_jax.cli.stages import timed_stages
  from opq_jax.file.reader import OpqFile
  from opq_jax.importers import named_networks
  from opq_jax.weights import holds_folder, npz, write_folder, write_safetensors

  source, output = Path(arguments.file), Path(arguments.output)
  progress = functools.partial(timed_stages, console(sys.stdout), has_times=False)
  if output.suffix.lower() in export.SUFFIXES and arguments.into is None:
    raise ValueError(f'{output}: needs --into NET, the {output.suffix} in which the weights stand')
  if arguments.into is not None:
    _write_into(source, arguments.output, Path(arguments.into), arguments.to)
    return
  with OpqFile(source) as file:
    is_array_file = output.suffix.lower() in _SUFFIXES[1:]
    is_folder = holds_folder(file) and not is_array_file and arguments.to is None
    if not is_folder and output.suffix.lower() not in _SUFFIXES:
      raise ValueError(
        f'{output}: found suffix {output.suffix}, expected {output.stem}.safetensors or .npz, '
        'the formats that decompress writes'
      )
    if is_folder:
      check_new_folder(output)
    else:
      check_output(source, output_path(arguments.output))
    if is_folder:
      with progress() as stage, stage('decode and write'):
        write_folder(output, file)
      shards = sum(name.endswith('.safetensors') for name in file.side_files)
      others = len(file.side_files) - shards
      console(sys.stdout).print(Text(f'{output}: {shards} files of weights, {others} others'))
      return
    identity = named_networks.identity(file.metadata)
    carried = given_back(file.metadata)
    with progress() as stage, stage('decode'):
      params = file.params()
  names = 'the names in the file'
  if identity is None or arguments.to == 'flax':
    if arguments.to == 'source':
      raise ValueError(
        f'--to: found no name of a network in {source}, expected a file made with --model'
      )
  else:
    from opq_jax import importers  # loads JAX, for the layouts of the framework

    params = importers.to_tensors(identity.name, params, identity.source)
    names = f'the names of {identity.source}'
  if output.suffix.lower() == '.npz':
    npz.write(output, params)
  else:
    write_safetensors(output, params, carried)
  size = os.stat(output).st_size
  console(sys.stdout).print(Text(f'{output}: {size:,} bytes, by {names}'))


def _write_into(source: Path, output: str, into: Path, to: str | None) -> None:
  """Writes the network of another runtime with the decoded weights as floats."""
  from rich.text import Text

  from opq_jax.cli import export
  from opq_jax.cli.console import console

  if to is not None:
    raise ValueError(f'--to: found {to} together with --into, expected one of them')
  written = export.write_into(output, source, into, floats=True)
  line = f'{output}: {written.size:,} bytes, {len(written.leaves)} decoded leaves in {into}'
  console(sys.stdout).print(Text(line), soft_wrap=True)
