"""llama.cpp's own quantizer, called from its shared library, and what its files decode to.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz

puts the library of llama.cpp v0.5.0 into package/bins/linux-x64.  `llama_model_quantize` reads a
GGUF file of float32 and chooses the type of every tensor by its recipe; the rows of a matrix are
its inputs, in blocks of 32 or 256 with scales.  Tensors whose rows no block of 256 divides fall
back to types of blocks of 32.

With `reshaped`, several rows are written as one, so that blocks of 256 go on in the next row and
nothing falls back: what the types would do on a network of other width, and no file that llama.cpp
could run.

An importance matrix is the mean of x^2 of every input of a kernel.
"""

import ctypes
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np

from experiments.benchmarks.language_models import gguf_files, networks
from experiments.benchmarks.language_models.coded import Coded
from experiments.benchmarks.language_models.networks import Network

VERSION = '0.5.0-dev'  # whose header the structures below follow
_FILE_TYPES = {
  'Q2_K': 10,
  'Q3_K_S': 11,
  'Q3_K_M': 12,
  'Q3_K_L': 13,
  'Q4_K_S': 14,
  'Q4_K_M': 15,
  'Q5_K_S': 16,
  'Q5_K_M': 17,
  'Q6_K': 18,
  'IQ2_XXS': 19,
  'IQ2_XS': 20,
  'Q2_K_S': 21,
  'IQ3_XS': 22,
  'IQ3_XXS': 23,
  'IQ1_S': 24,
  'IQ3_S': 26,
  'IQ3_M': 27,
  'IQ2_S': 28,
  'IQ2_M': 29,
  'IQ4_XS': 30,
  'IQ1_M': 31,
}
"""llama_ftype of every recipe of blocks of 256."""
RECIPES = tuple(_FILE_TYPES)
NEED_IMATRIX = 'IQ1_S', 'IQ1_M', 'IQ2_XXS', 'IQ2_XS', 'IQ2_S', 'IQ2_M', 'Q2_K_S'


class _Imatrix(ctypes.Structure):
  _fields_ = (('name', ctypes.c_char_p), ('data', ctypes.c_void_p), ('size', ctypes.c_size_t))


class _Options(ctypes.Structure):
  _fields_ = (
    *((name, ctypes.c_int32) for name in ('nthread', 'ftype', 'output_type', 'embedding_type')),
    *((name, ctypes.c_bool) for name in ('requantize', 'quantize_output', 'only_copy', 'pure')),
    *((name, ctypes.c_bool) for name in ('keep_split', 'dry_run')),
    ('imatrix', ctypes.POINTER(_Imatrix)),
    *((name, ctypes.c_void_p) for name in ('kv_overrides', 'tensor_overrides', 'prune_layers')),
    ('max_buf_size', ctypes.c_size_t),
  )


class _Traits(ctypes.Structure):
  _fields_ = (
    ('type_name', ctypes.c_char_p),
    *((name, ctypes.c_int64) for name in ('block', 'interleave')),
    ('type_size', ctypes.c_size_t),
    ('is_quantized', ctypes.c_bool),
    ('to_float', ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ('from_float', ctypes.c_void_p),
  )


class Library:
  """llama.cpp's shared library.

  Args:
    folder: with `libllama.*.so` and `libggml*.so`.
  """

  def __init__(self, folder: pathlib.Path):
    # ggml first: the library of llama.cpp finds it loaded
    flags = ctypes.RTLD_GLOBAL
    self._base = ctypes.CDLL(str(folder / 'libggml-base.so'), flags)
    self._llama = ctypes.CDLL(str(next(folder.glob('libllama.*.so'))), flags)
    self._llama.llama_version.restype = ctypes.c_char_p
    version = self._llama.llama_version().decode()
    if version != VERSION:
      raise ValueError(f'{folder}: found llama.cpp {version}, expected {VERSION}')
    self._llama.llama_model_quantize_default_params.restype = _Options
    self._base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    self._lines: list[str] = []
    self._log = log(lambda level, text, data: self._lines.append(text.decode(errors='replace')))
    self._llama.llama_log_set(self._log, None)
    self._llama.llama_backend_init()

  def quantize(
    self,
    source: pathlib.Path,
    target: pathlib.Path,
    recipe: str,
    imatrix: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Writes the quantized file of a float32 file.

    Raises:
      ValueError: the library refused; the message ends with its own.
    """
    options = self._llama.llama_model_quantize_default_params()
    options.nthread, options.ftype = 2, _FILE_TYPES[recipe]
    if imatrix is not None:
      kept = {name: np.ascontiguousarray(x, np.float32) for name, x in imatrix.items()}
      entries = (_Imatrix * (len(kept) + 1))()  # the last one is empty
      for entry, (name, x) in zip(entries, kept.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), x.ctypes.data, x.size
      options.imatrix = entries
    self._lines.clear()
    function = self._llama.llama_model_quantize
    status = function(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if status:
      raise ValueError(f'{recipe}: found status {status}: {"".join(self._lines[-5:])}')

  def decoded(self, data: np.ndarray, kind: int, size: int) -> np.ndarray:
    """Returns the values of a tensor's bytes by the library's own `to_float`, flat."""
    traits = self._base.ggml_get_type_traits(kind).contents
    data, values = np.ascontiguousarray(data), np.empty(size, np.float32)
    if data.nbytes != size // traits.block * traits.type_size:
      raise ValueError(f'data: found {data.nbytes} bytes for {size} weights of type {kind}')
    traits.to_float(data.ctypes.data, values.ctypes.data, size)
    return values


def coded_network(
  network: Network,
  library: Library,
  source: pathlib.Path,
  recipe: str,
  imatrix: Mapping[str, np.ndarray] | None,
  *,
  reshaped: bool,
) -> tuple[Coded, dict[str, int]]:
  """Quantizes a network, and decodes it.

  Args:
    network: the network.
    library: llama.cpp.
    source: the file that `write_gguf` wrote, with the same `reshaped`.
    recipe: one of `RECIPES`.
    imatrix: from `importance`, or None.
    reshaped: as above.

  Returns:
    The decoded network with the bits of all tensors, and how many weights have each type.
  """
  import gguf

  own = gguf_files.places(network)
  if imatrix is not None and reshaped:
    imatrix = {
      name: np.tile(x, gguf_files.rows_joined(own[name].shape)) for name, x in imatrix.items()
    }
  with tempfile.TemporaryDirectory() as folder:
    target = pathlib.Path(folder) / 'quantized.gguf'
    library.quantize(source, target, recipe, imatrix)
    size = target.stat().st_size
    leaves = {path: np.empty_like(leaf) for path, leaf in networks.leaves(network.params).items()}
    bits: dict[str, float] = dict.fromkeys(leaves, 0.0)
    types: dict[str, int] = {}
    for tensor in gguf.GGUFReader(target).tensors:
      place = own.pop(tensor.name)
      kind = tensor.tensor_type
      if kind.name in ('F32', 'F16'):
        values = np.array(tensor.data, np.float32)
      else:
        values = library.decoded(tensor.data, int(kind), int(tensor.n_elements))
      values = values.reshape(place.shape)
      if values.ndim == 2:
        values = gguf_files.in_order(network.name, values)
      values = values.T if place.path.endswith('/kernel') else values
      leaves[place.path][... if place.layer is None else place.layer] = values
      bits[place.path] += 8 * tensor.n_bytes
      types[kind.name] = types.get(kind.name, 0) + int(tensor.n_elements)
  if own:
    raise ValueError(f'{recipe}: found no tensors {sorted(own)}, expected all of the network')
  return Coded(leaves, bits, 8 * size - sum(bits.values())), types
