"""One-shot pruning and quantization of JAX parameter trees, from the weights alone.

    network = opq_jax.compress(params, compression_rate=16.0)
    opq_jax.save('network.opq', network.params, network.state)
    params, state = opq_jax.load('network.opq')

or step by step:

    allocation = opq_jax.allocate(params, compression_rate=16.0)
    state      = opq_jax.init_state(params, allocation)
    compressed = opq_jax.apply_compression(params, state)

The method is OPQ (Hu et al., AAAI 2021), with one joint target for pruning and quantization,
encoders that choose codes by the error of each layer's output, a data-free correction of BatchNorm,
and an entropy-coded file of our own.

The rooms (`opq_jax.encoders`, `opq_jax.network`, `opq_jax.correction`, ...) are attributes.  Names
and rooms are imported on first use, so `import opq_jax` costs next to nothing.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from opq_jax import (
    allocation,
    cli,
    coding,
    compression,
    core,
    correction,
    data,
    encoders,
    export,
    file,
    finetuning,
    importers,
    language,
    models,
    network,
    report,
    weights,
  )
  from opq_jax.allocation import Allocation, allocate
  from opq_jax.compression import (
    CompressionState,
    apply_compression,
    coded,
    compressed,
    decode,
    decoded,
    encode,
    init_state,
    keep_compressed,
  )
  from opq_jax.encoders import compress
  from opq_jax.file import OpqFile, load, save
  from opq_jax.network import usage
  from opq_jax.report import size_report, summary

__version__ = '0.2.0.dev0'

__all__ = [
  'Allocation',
  'CompressionState',
  'OpqFile',
  'allocate',
  'allocation',
  'apply_compression',
  'cli',
  'coded',
  'coding',
  'compress',
  'compressed',
  'compression',
  'core',
  'correction',
  'data',
  'decode',
  'decoded',
  'encode',
  'encoders',
  'export',
  'file',
  'finetuning',
  'importers',
  'init_state',
  'keep_compressed',
  'language',
  'load',
  'models',
  'network',
  'report',
  'save',
  'size_report',
  'summary',
  'usage',
  'weights',
]

# the room of each name; the other names of `__all__` are rooms themselves
_ROOMS = {
  'Allocation': 'allocation',
  'CompressionState': 'compression',
  'OpqFile': 'file',
  'allocate': 'allocation',
  'apply_compression': 'compression',
  'coded': 'compression',
  'compress': 'encoders',
  'compressed': 'compression',
  'decode': 'compression',
  'decoded': 'compression',
  'encode': 'compression',
  'init_state': 'compression',
  'keep_compressed': 'compression',
  'load': 'file',
  'save': 'file',
  'size_report': 'report',
  'summary': 'report',
  'usage': 'network',
}


class _FormerModules:
  """Finds `import opq_jax.artifact` and other modules of the last release; the last finder."""

  def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    package, _, module = name.rpartition('.')
    if package != __name__ or module == 'deprecated':
      return None
    is_former = importlib.import_module('opq_jax.deprecated').is_module(module)
    return ModuleSpec(name, self) if is_former else None  # type: ignore[arg-type]

  def create_module(self, spec: ModuleSpec) -> None:
    """Returns None: the import system makes an empty module, which `exec_module` replaces."""

  def exec_module(self, module: ModuleType) -> None:
    deprecated = importlib.import_module('opq_jax.deprecated')
    sys.modules[module.__name__] = deprecated.find(module.__name__.rpartition('.')[2])


if not any(type(finder).__name__ == '_FormerModules' for finder in sys.meta_path):
  sys.meta_path.append(_FormerModules())


def __getattr__(name: str) -> Any:
  if name in _ROOMS:
    value = getattr(importlib.import_module(f'opq_jax.{_ROOMS[name]}'), name)
    globals()[name] = value  # so that the next use does not come here
    return value
  if name in __all__:
    return importlib.import_module(f'opq_jax.{name}')
  # by `importlib`, for `from opq_jax import deprecated` would ask this function
  deprecated = importlib.import_module('opq_jax.deprecated')
  return deprecated if name == 'deprecated' else deprecated.find(name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
