"""Model folders of Hugging Face on the command line: what an .opq file carries of one."""

from pathlib import Path

from opq_jax.core.messages import listed
from opq_jax.file.reader import OpqFile
from opq_jax.importers.named_networks import identity
from opq_jax.weights import CarriedFiles, carried_files, is_model_folder, open_folder
from opq_jax.weights.carried import carried_of_gguf
from opq_jax.weights.gguf import is_gguf, open_gguf

_MAX_NAMES = 8  # files named in a line; more would hide the rest of it


def may_hold_network(source: Path) -> bool:
  """Returns whether weights are such as language models come in: a model folder or a GGUF file."""
  return is_gguf(source) or is_model_folder(source)


def carried_of(source: Path, is_known: bool = False) -> CarriedFiles:
  """Returns what a file carries of its source beside the weights.

  Of a source of one file nothing, but for the language model of a GGUF file.

  Args:
    source: the weights.
    is_known: whether they are those of a network of `opq_jax.models`: the file then has the names
      of Flax, of which no folder can be made.

  Raises:
    ValueError, OSError: as `open_folder` and `carried_files`.
  """
  if is_gguf(source) and not is_known:
    return carried_of_gguf(open_gguf(source))
  if not is_model_folder(source):
    return CarriedFiles({}, (), {})
  if is_known:
    return CarriedFiles({}, ('all but the weights, with --model',), {})
  return carried_files(open_folder(source))


def carried_notes(source: Path, carried: CarriedFiles) -> list[str]:
  """Returns lines about files of a folder that are left out, or come back under other names."""
  notes = []
  if carried.left_out:
    notes.append(f'{source}: left out {listed(carried.left_out, _MAX_NAMES)}')
  if carried.renamed:
    pairs = [f'{old} as {new}' for old, new in carried.renamed.items()]
    notes.append(f'{source}: opq decompress gives back {listed(pairs, _MAX_NAMES)}')
  return notes


def carried_problems(path: str, against: str) -> list[str]:
  """Returns what differs between the side files of a file and the folder that it was made of.

  Raises:
    ValueError: the side files are damaged, or the folder is.
    OSError: a file cannot be read.
  """
  with OpqFile(path) as file:
    found, is_known = file.read_side_files(), identity(file.metadata) is not None
  expected = carried_of(Path(against), is_known).files
  problems = []
  for name in sorted({*found, *expected}):
    if name not in expected:
      problems.append(f'{name}: found in the file, not in {against}')
    elif name not in found:
      problems.append(f'{name}: found in {against}, not in the file')
    elif found[name] != expected[name]:
      problems.append(f'{name}: found other bytes than in {against}, expected the same')
  return problems
