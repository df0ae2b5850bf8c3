"""The `.opq` file: a compressed network in few bytes, written, read and checked.

`opq_jax.file.index` describes the format.  Reading needs neither JAX nor numba until a state or a
payload along a trellis asks for it, so names are imported when they are used.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.file.rate import FileTarget, at_file_rate
  from opq_jax.file.reader import OpqFile, load
  from opq_jax.file.writer import save, serialize

__all__ = ['FileTarget', 'OpqFile', 'at_file_rate', 'load', 'save', 'serialize']

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'FileTarget': 'rate',
    'OpqFile': 'reader',
    'at_file_rate': 'rate',
    'load': 'reader',
    'save': 'writer',
    'serialize': 'writer',
  },
)
