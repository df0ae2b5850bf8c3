"""`opq export`: a compressed network for another runtime."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from opq_jax.export import ExportedModel


_CORE_ML = '.mlpackage'
_STABLEHLO = '.stablehlo'
SUFFIXES = '.onnx', _CORE_ML


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq export`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    'output',
    metavar='OUT',
    help='the .onnx or .stablehlo file, replaced if it exists; or the new .mlpackage',
  )
  parser.add_argument(
    '--into',
    metavar='NET',
    help='for .onnx and .mlpackage: the ONNX file or Core ML package of the float network, whose '
    'tensors have the names of the leaves (default for .onnx: FILE itself names its network, which '
    'jax2onnx converts)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the network, and says what became of every leaf that is not in indices."""
  source, output = Path(arguments.file), Path(arguments.output)
  suffix = output.suffix.lower()
  if suffix not in (*SUFFIXES, _STABLEHLO):
    expected = ', '.join(SUFFIXES)
    raise ValueError(f'{output}: found suffix {suffix!r}, expected {expected} or {_STABLEHLO}')
  if suffix == _STABLEHLO:
    if arguments.into is not None:
      raise ValueError(f'--into: found {arguments.into}, expected none for {output}')
    _write_program(arguments.output, source)
    return
  if arguments.into is not None:
    into = Path(arguments.into)
    written = write_into(arguments.output, source, into)
    _print_sizes(written, output, _size(into))
  elif suffix == _CORE_ML:
    raise ValueError(f'{output}: needs --into NET, the {suffix} in which the weights stand')
  else:
    _write_onnx(arguments.output, source)


def write_into(text: str, source: Path, into: Path, *, floats: bool = False) -> 'ExportedModel':
  """Writes the network of a file into that of another runtime, and prints what differs.

  Args:
    text: the path to write, as it was typed.
    source: the `.opq` file.
    into: the float network.
    floats: whether to write float constants.

  Returns:
    What was written.

  Raises:
    ValueError: suffixes are unknown or differ, the place is not free, or as of the writers.
    OSError: a file cannot be read or written.
  """
  from opq_jax.cli.outputs import check_new_folder, check_output, output_path
  from opq_jax.export import write_core_ml, write_onnx
  from opq_jax.file.reader import OpqFile

  output, suffix = Path(text), Path(text).suffix.lower()
  if suffix not in SUFFIXES:
    raise ValueError(
      f'{output}: found suffix {output.suffix!r} with --into, expected {" or ".join(SUFFIXES)}'
    )
  if into.suffix.lower() != suffix:
    raise ValueError(f'{into}: found suffix {into.suffix!r}, expected {suffix}, that of {output}')
  if suffix == _CORE_ML:
    check_new_folder(output)
  else:
    output = output_path(text)
    check_output(source, output)
    check_output(into, output)
  write = write_core_ml if suffix == _CORE_ML else write_onnx
  with OpqFile(source) as file:
    written = write(output, file, into, floats=floats)
  print_notes(written, source, into)
  return written


def _size(path: Path) -> int:
  """Returns the bytes of a file, or of all files of a folder."""
  if not path.is_dir():
    return os.stat(path).st_size
  return sum(part.stat().st_size for part in path.rglob('*') if part.is_file())


def _write_onnx(text: str, source: Path) -> None:
  """Writes the network that a file names as an ONNX file."""
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.export import network_program, write_onnx
  from opq_jax.file.reader import OpqFile

  output = output_path(text)
  check_output(source, output)
  with OpqFile(source) as file:
    written = write_onnx(output, file, network_program(source))
  print_notes(written, source, 'the network')
  as_floats = written.size + sum(leaf.float_bytes - leaf.bytes for leaf in written.leaves)
  _print_sizes(written, output, as_floats)


def _write_program(text: str, source: Path) -> None:
  """Writes the network that a file names as a program, for any number of images."""
  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.importers import named_networks

  output = output_path(text)
  check_output(source, output)
  if named_networks.identity_of(source) is None:
    raise ValueError(
      f'{source}: found no name of a network, expected a file made with --model; '
      'opq_jax.export.write_stablehlo writes any function'
    )
  import jax  # after the checks, which take no time
  import jax.numpy as jnp

  import opq_jax
  from opq_jax.export import write_stablehlo
  from opq_jax.importers import networks

  network = networks.load(source)
  _, *shape = networks.noise_shape(network.source)
  batch = jax.export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
  apply_fn = lambda variables, images: network.model.apply(variables, images, train=False)
  params, state = opq_jax.load(source)
  written = write_stablehlo(output, apply_fn, params, state, images)
  sides = ', '.join(map(str, shape))
  line = (
    f'{output}: {written.size:,} bytes, for float32 images (batch, {sides}) on '
    f'{", ".join(written.platforms)}; takes {written.arguments:,} bytes of {source}'
  )
  console(sys.stdout).print(Text(line), soft_wrap=True)


def _print_sizes(written: 'ExportedModel', output: Path, size: int) -> None:
  """Prints sizes and forms."""
  import collections

  from rich.text import Text

  from opq_jax.cli.console import console

  forms = collections.Counter(leaf.form for leaf in written.leaves)
  counted = ', '.join(f'{number} as {form}' for form, number in forms.most_common())
  line = f'{output}: {written.size:,} bytes, of {size:,} ({counted})'
  console(sys.stdout).print(Text(line), soft_wrap=True)


def print_notes(written: 'ExportedModel', source: Path, into: Path | str) -> None:
  """Prints on stderr which leaves are floats and why, and which names only one file has."""
  from opq_jax.cli.console import note
  from opq_jax.core.messages import listed

  for reason in dict.fromkeys(leaf.reason for leaf in written.leaves if leaf.reason):
    leaves = [leaf for leaf in written.leaves if leaf.reason == reason]
    size, names = sum(leaf.bytes for leaf in leaves), listed(leaf.name for leaf in leaves)
    note(f'{size:,} bytes of floats, {reason}: {names}')
  left = f'weights of {into} are not in {source}, and stay, {sum(written.left.values()):,} bytes'
  for held, what in (
    (
      written.changed,
      f'leaves that are not compressed differ from those of {into}, and replace them',
    ),
    (written.without_place, f'leaves of {source} are no tensors of {into}'),
    (written.rounded, f'leaves of {source} are rounded to the dtype that they have in {into}'),
    (written.left, left),
  ):
    if held:
      note(f'{len(held)} {what}: {listed(held)}')
