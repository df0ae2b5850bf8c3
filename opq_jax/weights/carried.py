"""What an `.opq` file carries of a model folder beside the tensors, so that it can be given back.

Config, tokenizer and every other file but weights are carried as they are.  A file of weights is
carried as its header alone, which says names, dtypes, shapes, order and metadata of its tensors.
PyTorch's files become .safetensors: their headers are made here, and the index of their shards.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.file.side_files import is_name
from opq_jax.weights import safetensors
from opq_jax.weights.gguf import OpenGguf
from opq_jax.weights.hugging_face import INDEX, ModelFolder, read_object
from opq_jax.weights.work_folder import is_work_folder

MAX_FILE = 1 << 26
"""Bytes of one carried file: tokenizers have up to 20 MB."""

HEADER = '.safetensors'
"""The end of the name of a carried file that is the header of a file of weights."""

_WEIGHTS_ENDS = (
  *('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.h5', '.keras', '.msgpack', '.ot', '.onnx'),
  *('.onnx_data', '.gguf', '.ggml', '.tflite', '.mlmodel', '.npz', '.npy', '.pkl', '.pickle'),
  *('.opq', '.safetensors.index.json', '.bin.index.json'),
)
"""Ends of the names of files of weights, of other frameworks too: these are left out."""

_NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}


class CarriedFiles(NamedTuple):
  """The files of a folder that go into an `.opq` file.

  Attributes:
    files: their contents by relative path, for `opq_jax.save(..., side_files=)`; of a file of
      weights the header alone.
    left_out: relative paths of files and folders that are not carried.
    renamed: new names of files of weights that come back as .safetensors.
  """

  files: dict[str, bytes]
  left_out: tuple[str, ...]
  renamed: dict[str, str]


def carried_files(folder: ModelFolder) -> CarriedFiles:
  """Returns what an `.opq` file carries of a folder.

  Left out are hidden files, weights of other frameworks, the state of an optimizer, folders that
  hold weights, the work of a killed run, files of more than 64 MiB, and what is no file.

  Raises:
    ValueError: a tensor has a dtype that safetensors cannot hold.
    OSError: a file cannot be read.

  >>> import tempfile, numpy as np
  >>> from opq_jax.weights import open_folder, write_safetensors
  >>> with tempfile.TemporaryDirectory() as path:
  ...   write_safetensors(f'{path}/model.safetensors', {'w': np.ones(3)})
  ...   _ = Path(path, 'config.json').write_text('{}')
  ...   carried = carried_files(open_folder(path))
  >>> carried.files['config.json'], carried.files['model.safetensors'][8:20]
  (b'{}', b'{"w":{"dtype')
  """
  files: dict[str, bytes] = {}
  renamed: dict[str, str] = {}
  for name, tensors in folder.shards.items():
    if name.endswith(HEADER):
      files[name] = safetensors.header(folder.path / name)
    else:
      renamed[name] = _as_safetensors(name)
      files[renamed[name]] = _header([folder.leaves[tensor] for tensor in tensors])
  if folder.index is not None:
    if renamed:
      files[_as_safetensors(folder.index)] = _renamed_index(folder, renamed)
    else:
      files[folder.index] = (folder.path / folder.index).read_bytes()
  known = {*folder.shards, folder.index}
  left_out = []
  for name, path in _others(folder.path):
    if name in known:
      continue
    if path is None or name in files:
      left_out.append(name)
    else:
      files[name] = path.read_bytes()
  return CarriedFiles(files, tuple(left_out), renamed)


def carried_of_gguf(file: OpenGguf) -> CarriedFiles:
  """Returns what an `.opq` file carries of a GGUF file, so that a model folder can be made of it.

  Config and tokenizer by its metadata, and a header of all tensors; nothing of a file that holds no
  language model.
  """
  if file.model is None:
    return CarriedFiles({}, (), {})
  files: dict[str, bytes] = {f'model{HEADER}': _header([*file.leaves.values()])}
  left_out = []
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    try:
      data = file.side_file(name)
    except ValueError as error:
      problem = str(error).removeprefix(f'{file.path}: ')
      left_out.append(f'{name} ({problem})')
      continue
    if data is not None:
      files[name] = data
  return CarriedFiles(files, tuple(left_out), {})


def _others(folder: Path, above: str = '') -> Iterator[tuple[str, Path | None]]:
  """Yields the relative paths of the files below a folder; None of what is not carried."""
  for child in sorted(folder.iterdir()):
    name = f'{above}{child.name}'
    if is_work_folder(child):
      yield f'{name}/', None
      continue
    if child.is_dir() and not child.is_symlink() and not child.name.startswith('.'):
      inner = list(_others(child, f'{name}/'))
      # a checkpoint or a part of its own: half of it would be worse than none
      is_whole = not any(path is None for _, path in inner)
      yield from inner if is_whole else [(f'{name}/', None)]
      continue
    is_carried = child.is_file() and not child.name.startswith('.') and is_name(name)
    is_carried = is_carried and not name.lower().endswith(_WEIGHTS_ENDS)
    yield name, child if is_carried and child.stat().st_size <= MAX_FILE else None


def _as_safetensors(name: str) -> str:
  """Returns the name under which transformers looks for safetensors in the place of PyTorch's.

  >>> _as_safetensors('pytorch_model-00001-of-00002.bin'), _as_safetensors('net.pt')
  ('model-00001-of-00002.safetensors', 'net.safetensors')
  """
  stem, index = name.removesuffix(INDEX), INDEX if name.endswith(INDEX) else ''
  return re.sub(r'^pytorch_model', 'model', Path(stem).stem) + HEADER + index


def _header(leaves: Sequence[StoredLeaf]) -> bytes:
  """Returns the header of a file of tensors, wide dtypes first as safetensors sorts them."""
  content: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  begin = 0
  for leaf in sorted(leaves, key=lambda leaf: (-leaf.dtype.itemsize, leaf.name)):
    if leaf.dtype not in _NAMES:
      raise ValueError(
        f'{leaf.path}: {leaf.name}: found dtype {leaf.dtype}, expected one of safetensors'
      )
    end = begin + leaf.nbytes
    content[leaf.name] = {
      'dtype': _NAMES[leaf.dtype],
      'shape': list(leaf.shape),
      'data_offsets': [begin, end],
    }
    begin = end
  text = json.dumps(content, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def _renamed_index(folder: ModelFolder, renamed: dict[str, str]) -> bytes:
  """Returns the index of a folder's shards under their new names."""
  assert folder.index is not None
  places = {tensor: renamed[name] for name, own in folder.shards.items() for tensor in own}
  about = read_object(folder.path / folder.index).get('metadata', {})
  content = {'metadata': about, 'weight_map': dict(sorted(places.items()))}
  return (json.dumps(content, indent=2) + '\n').encode()
