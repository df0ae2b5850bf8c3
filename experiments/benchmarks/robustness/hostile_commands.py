"""Commands on damaged files and folders: what `opq` makes of them.

    compress, KIND     of an ONNX file with data beside it, a GGUF file, a state dict of PyTorch, a
                       Core ML package, a folder of Hugging Face with shards, one of PyTorch's, an
                       Orbax checkpoint
    export, KIND       of a good .opq file into a damaged ONNX file or Core ML package
    decompress, folder of an .opq file of a model folder, resealed

A command ends with 0 and OUT that can be read, or with 2, one line of an error, and OUT as it was.
"""

import contextlib
import io
import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

import opq_jax
from experiments.benchmarks.robustness import hostile_bundles
from experiments.benchmarks.robustness.mutated_bytes import mutated, resealed
from opq_jax import cli
from opq_jax.core import trees
from opq_jax.weights import carried_files, open_folder, read_weights

COMMANDS = (
  *('compress, onnx', 'compress, gguf', 'compress, pt', 'compress, mlpackage'),
  *('compress, folder', 'compress, torch folder', 'compress, orbax'),
  *('export, onnx', 'export, mlpackage', 'decompress, folder'),
)
"""The kinds."""


class Command(NamedTuple):
  """A command on a bundle.

  Attributes:
    bundle: the undamaged input.
    run: from a bundle to what OUT holds.
  """

  bundle: bytes
  run: Callable[[bytes], Any]


def command_of(kind: str, folder: Path) -> Command:
  """Returns a kind by its name; files are written to `folder`."""
  verb, _, form = kind.partition(', ')
  made = folder / 'made'
  made.mkdir()
  good = folder / 'good.opq'
  source = _SOURCES[form](made) if verb != 'decompress' else _carried_folder(made)
  if verb == 'compress':
    words = lambda place, out: ['compress', str(place), str(out), '--rate', '8']
    name = 'out.opq'
  elif verb == 'export':
    network = opq_jax.compress(read_weights(source), compression_rate=8.0)
    opq_jax.save(good, network.params, network.state)
    words = lambda place, out: ['export', str(good), str(out), '--into', str(place)]
    name = f'out.{form}'
  else:
    words = lambda place, out: ['decompress', str(place), str(out)]
    name = 'out'
  beside = [made / other for other in os.listdir(made) if not other.startswith('_')]
  files = [hostile_bundles.files_of(path) for path in sorted(beside)]
  bundle = hostile_bundles.packed({name: data for part in files for name, data in part.items()})

  def run(bundle: bytes) -> Any:
    return _outcome(bundle, source.name, name, words)

  return Command(bundle, run)


def damaged(kind: str, bundle: bytes, rng: random.Random) -> bytes:
  """Returns a damaged input of a kind."""
  if kind != 'decompress, folder':
    return hostile_bundles.damaged(bundle, rng)
  ((name, data),) = hostile_bundles.unpacked(bundle).items()
  changed = mutated(data, rng) if rng.random() < 0.1 else resealed(data, rng)
  return hostile_bundles.packed({name: changed})


def _outcome(
  bundle: bytes, source: str, name: str, words: Callable[[Path, Path], list[str]]
) -> Any:
  """Runs a command; returns the arrays of OUT.

  Raises:
    ValueError: the command has refused its input in one line, and left everything as it was.
    RuntimeError: anything else.
  """
  with tempfile.TemporaryDirectory() as above:
    folder = Path(above, 'folder')
    folder.mkdir()
    canary = Path(above, 'canary')
    canary.write_bytes(b'canary')
    hostile_bundles.write(folder, bundle)
    out = folder / 'made' / name
    out.parent.mkdir(exist_ok=True)
    is_file = name.endswith(('.opq', '.onnx'))
    if is_file:
      out.write_bytes(b'old')
    before = _listing(Path(above))
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
      contextlib.redirect_stdout(stdout),
      contextlib.redirect_stderr(stderr),
      warnings.catch_warnings(),
    ):
      warnings.simplefilter('ignore')
      code = cli.main(words(folder / source, out))
    after = _listing(Path(above))
    inside = f'folder/made/{name}'
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    if stray := {path for path in changed if path != inside and not path.startswith(f'{inside}/')}:
      raise RuntimeError(f'{sorted(stray)}: found changes beside OUT')
    lines = stderr.getvalue().splitlines()
    if code == 2:
      errors = [line for line in lines if not line.startswith('opq: note')]
      if changed:
        raise RuntimeError(f'found changes of {sorted(changed)} and exit code 2')
      if not errors or not all(line.startswith(('opq: ', '  ')) for line in errors):
        raise RuntimeError(f'found {errors[:3]}, expected a line that says what is wrong')
      raise ValueError(errors[-1])
    if code != 0:
      raise RuntimeError(f'found exit code {code}: {lines[:3]}')
    if not all(line.isprintable() for line in [*lines, *stdout.getvalue().splitlines()]):
      raise RuntimeError('found control characters in the output')
    return _held(out)


def _held(out: Path) -> Any:
  """Returns what an output holds: the arrays of a file, or the weights of a model folder."""
  if out.suffix == '.onnx':
    import onnx

    onnx.load(out)
  return trees.named_leaves(read_weights(out))


def _listing(folder: Path) -> dict[str, bytes]:
  """Returns all files below a folder, by name."""
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


# ---- undamaged inputs ----


def _arrays() -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0).laplace
  return {
    'first.weight': draw(size=(64, 32)).astype(np.float32),
    'first.bias': draw(size=64).astype(np.float32),
    'second.weight': draw(size=(48, 64)).astype(np.float32),
  }


def _onnx(folder: Path) -> Path:
  import onnx
  from onnx import TensorProto, helper, numpy_helper

  arrays = _arrays()
  nodes = [
    helper.make_node('Gemm', ['x', 'first.weight', 'first.bias'], ['h'], transB=1),
    helper.make_node('Gemm', ['h', 'second.weight'], ['y'], transB=1),
  ]
  value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
  graph = helper.make_graph(
    nodes,
    'net',
    [value('x', 32)],
    [value('y', 48)],
    [numpy_helper.from_array(array, name) for name, array in arrays.items()],
  )
  path = folder / 'net.onnx'
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
  # one of the two matrices beside the file
  onnx.save(model, path, save_as_external_data=True, location='net.data', size_threshold=9000)
  return path


def _gguf(folder: Path) -> Path:
  import gguf

  path = folder / 'net.gguf'
  writer = gguf.GGUFWriter(path, 'llama')
  kinds = {'first.weight': 'Q8_0', 'second.weight': 'F32', 'first.bias': 'F32'}
  for name, array in _arrays().items():
    kind = gguf.GGMLQuantizationType[kinds[name]]
    if kind.name == 'F32':
      writer.add_tensor(name, array)
    else:
      writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _torch_tensors() -> dict[str, Any]:
  import torch

  return {name: torch.from_numpy(array) for name, array in _arrays().items()}


def _pt(folder: Path) -> Path:
  import torch

  path = folder / 'net.pt'
  torch.save({'state_dict': _torch_tensors(), 'epoch': 3}, path)
  return path


def _core_ml(folder: Path) -> Path:
  import coremltools as ct
  from coremltools.converters.mil import Builder as mb

  arrays = _arrays()

  @mb.program(input_specs=[mb.TensorSpec(shape=(1, 32))], opset_version=ct.target.iOS18)
  def program(x: Any) -> Any:
    const = lambda name: mb.const(val=arrays[name], name=name.replace('.', '_'))
    hidden = mb.linear(x=x, weight=const('first.weight'), bias=const('first.bias'))
    return mb.linear(x=hidden, weight=const('second.weight'))

  model = ct.convert(
    program,
    convert_to='mlprogram',
    compute_precision=ct.precision.FLOAT32,
    minimum_deployment_target=ct.target.iOS18,
    skip_model_load=True,
  )
  path = folder / 'net.mlpackage'
  model.save(str(path))
  return path


def _index(places: dict[str, str]) -> bytes:
  return json.dumps({'metadata': {'total_size': 1}, 'weight_map': places}).encode()


def _brains() -> dict[str, np.ndarray]:
  return {name: array.astype(ml_dtypes.bfloat16) for name, array in _arrays().items()}


def _folder(folder: Path) -> Path:
  path = folder / 'model'
  path.mkdir()
  (path / 'config.json').write_text(json.dumps({'model_type': 'llama', 'hidden_size': 32}))
  (path / 'tokenizer.json').write_text(json.dumps({'vocab': {'a': 0}}))
  places = {}
  for number, name in enumerate(_brains()):
    places[name] = f'model-0000{number % 2 + 1}-of-00002.safetensors'
    shard = {other: _brains()[other] for other in places if places[other] == places[name]}
    safetensors.numpy.save_file(shard, path / places[name], {'format': 'pt'})
  (path / 'model.safetensors.index.json').write_bytes(_index(places))
  return path


def _torch_folder(folder: Path) -> Path:
  import torch

  path = folder / 'model'
  path.mkdir()
  (path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
  places = {}
  for number, name in enumerate(_torch_tensors()):
    places[name] = f'pytorch_model-0000{number % 2 + 1}-of-00002.bin'
    shard = {other: _torch_tensors()[other] for other in places if places[other] == places[name]}
    torch.save(shard, path / places[name])
  (path / 'pytorch_model.bin.index.json').write_bytes(_index(places))
  return path


def _orbax(folder: Path) -> Path:
  import orbax.checkpoint as ocp

  path = folder / 'checkpoint'
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), _arrays())
  return path


def _carried_folder(folder: Path) -> Path:
  """Writes an `.opq` file of a model folder, and nothing of the folder."""
  with tempfile.TemporaryDirectory() as elsewhere:
    model = open_folder(_folder(Path(elsewhere)))
    network = opq_jax.compress(dict(model), compression_rate=8.0)
    carried = carried_files(model).files
  path = folder / 'net.opq'
  opq_jax.save(path, network.params, network.state, side_files=carried)
  return path


_SOURCES: dict[str, Callable[[Path], Path]] = {
  'onnx': _onnx,
  'gguf': _gguf,
  'pt': _pt,
  'mlpackage': _core_ml,
  'folder': _folder,
  'torch folder': _torch_folder,
  'orbax': _orbax,
}
