"""Opens trees of leaves that stay on disk until they are read, one by one.

.safetensors   a flat dict by name
.gguf          a flat dict by name, dequantized, a language model as transformers has it; needs gguf
               (`pip install opq_jax[gguf]`)
.onnx          a flat dict by name; needs onnx (`pip install opq_jax[onnx]`)
.mlpackage     a flat dict by name; needs coremltools (`pip install opq_jax[coreml]`)
a folder       of Hugging Face, a flat dict by name; or an Orbax checkpoint
"""

import os
from pathlib import Path

from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.weights import core_ml, gguf, hugging_face, onnx, orbax, safetensors


def is_streamable(path: str | os.PathLike[str]) -> bool:
  """Returns whether `open_weights` takes a path.

  It takes folders, .gguf, .onnx, and .safetensors that is no `.opq`.
  """
  path = Path(path)
  if path.is_dir() or path.suffix.lower() in ('.gguf', '.onnx'):
    return True
  if path.suffix.lower() != '.safetensors' or not path.is_file():
    return False
  with safetensors.opened(path) as file:
    return not safetensors.is_opq(file)


def open_weights(path: str | os.PathLike[str]) -> PyTree:
  """Returns the tree of a file or folder with a `StoredLeaf` for every array.

  Args:
    path: a `.safetensors`, `.gguf` or `.onnx` file, a Core ML package, a folder of Hugging Face
      (`open_folder`), or one of Orbax.

  Warns:
    UserWarning: a GGUF file is quantized already, or weights of a Core ML package are.

  Raises:
    ValueError: the file is damaged, of another format or an `.opq`, or has no weights.
    OSError: it cannot be read.

  >>> import tempfile, numpy as np, safetensors.numpy
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   safetensors.numpy.save_file({'w': np.eye(3)}, f'{folder}/net.safetensors')
  ...   leaf = open_weights(f'{folder}/net.safetensors')['w']
  ...   print(leaf.shape, leaf.dtype, leaf.read().sum())
  (3, 3) float64 3.0
  """
  files.check_readable(path)
  if os.fspath(path).lower().endswith('.gguf'):
    leaves = gguf.open_leaves(Path(path))
  elif onnx.is_onnx(path):
    leaves = onnx.open_leaves(Path(path))
  elif core_ml.is_core_ml(path):
    leaves = core_ml.open_leaves(Path(path))
  elif not os.path.isdir(path):
    if (suffix := Path(path).suffix.lower()) != '.safetensors':
      raise ValueError(
        f'{path}: found suffix {suffix!r}, expected .safetensors, .gguf, .onnx, .mlpackage or a '
        'folder; read_weights reads other formats, as a whole'
      )
    leaves = safetensors.open_leaves(path)
  elif hugging_face.is_model_folder(path):
    leaves = hugging_face.open_folder(path).leaves
  else:
    leaves = orbax.open_leaves(Path(path))
  if not trees.named_leaves(leaves):
    raise ValueError(f'{path}: found no weights, expected at least one')
  return leaves
