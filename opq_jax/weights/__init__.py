"""Weights on disk: reading the formats of other libraries, and trees larger than memory.

`read_weights` reads a file or a folder as a whole.  `open_weights` leaves the arrays on disk, and
`compress_stored` makes an `.opq` file of them leaf by leaf.  `graph_uses` says which tensors of an
ONNX file or a Core ML package are weights, and their axes.  `open_folder` opens a model folder of
Hugging Face as a mapping of its tensors, and `write_folder` gives one back.  A module a format; the
packages of a format (coremltools, h5py, msgpack, onnx, Orbax, PyTorch) are imported when there is
such a file.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy
from opq_jax.core.stored_leaves import StoredLeaf

if TYPE_CHECKING:
  from opq_jax.weights.carried import CarriedFiles, carried_files
  from opq_jax.weights.channels import ChannelMode, channel_axis
  from opq_jax.weights.graphs import graph_uses
  from opq_jax.weights.hugging_face import ModelFolder, is_model_folder, open_folder
  from opq_jax.weights.onnx_uses import GraphUse
  from opq_jax.weights.opening import is_streamable, open_weights
  from opq_jax.weights.reading import read_weights
  from opq_jax.weights.safetensors import write_safetensors
  from opq_jax.weights.streaming import StreamedFile, compress_stored
  from opq_jax.weights.written_folder import holds_folder, write_folder

__all__ = [
  'CarriedFiles',
  'ChannelMode',
  'GraphUse',
  'ModelFolder',
  'StoredLeaf',
  'StreamedFile',
  'carried_files',
  'channel_axis',
  'compress_stored',
  'graph_uses',
  'holds_folder',
  'is_model_folder',
  'is_streamable',
  'open_folder',
  'open_weights',
  'read_weights',
  'write_folder',
  'write_safetensors',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'CarriedFiles': 'carried',
    'ChannelMode': 'channels',
    'GraphUse': 'onnx_uses',
    'ModelFolder': 'hugging_face',
    'StreamedFile': 'streaming',
    'carried_files': 'carried',
    'channel_axis': 'channels',
    'compress_stored': 'streaming',
    'graph_uses': 'graphs',
    'holds_folder': 'written_folder',
    'is_model_folder': 'hugging_face',
    'is_streamable': 'opening',
    'open_folder': 'hugging_face',
    'open_weights': 'opening',
    'read_weights': 'reading',
    'write_folder': 'written_folder',
    'write_safetensors': 'safetensors',
  },
)
