"""`opq decompress`: the decoded weights of a file as plain arrays, or as a model folder."""

import argparse
import os
import sys
from pathlib import Path

# suffixes by which programs choose a reader, which would fail at a safetensors file
_OTHER_FORMATS = ('.pt', '.pth', '.npz', '.npy', '.msgpack', '.h5', '.keras', '.bin', '.opq')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq decompress`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    'output',
    metavar='OUT',
    help='the .safetensors file, replaced if it exists; or of a file made of a model folder, the '
    'new folder',
  )
  parser.add_argument(
    '--to',
    choices=('source', 'flax'),
    help='names under which the weights of a known network are written (default: source, the '
    'framework that they came from)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the weights of a file as safetensors, or the model folder that it was made of."""
  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.outputs import check_new_folder, check_output
  from opq_jax.file.reader import OpqFile
  from opq_jax.importers import named_networks
  from opq_jax.weights import holds_folder, write_folder, write_safetensors

  source, output = Path(arguments.file), Path(arguments.output)
  if output.suffix.lower() in _OTHER_FORMATS:
    check_output(source, output)
    raise ValueError(
      f'{output}: found the suffix of another format, expected {output.stem}.safetensors: '
      'decompress writes that format alone'
    )
  with OpqFile(source) as file:
    is_folder = holds_folder(file) and output.suffix != '.safetensors' and arguments.to is None
    if is_folder:
      check_new_folder(output)
    else:
      check_output(source, output)
    if is_folder:
      write_folder(output, file)
      shards = sum(name.endswith('.safetensors') for name in file.side_files)
      others = len(file.side_files) - shards
      console(sys.stdout).print(Text(f'{output}: {shards} files of weights, {others} others'))
      return
    identity = named_networks.identity(file.metadata)
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
  write_safetensors(output, params)
  size = os.stat(output).st_size
  console(sys.stdout).print(Text(f'{output}: {size:,} bytes, by {names}'))
