"""Compressed networks for other runtimes, without rounding anything again.

`write_onnx` and `write_core_ml` put the weights of an `.opq` file into an ONNX file or a Core ML
package, as indices and the values that occur.  A module a format.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.export.core_ml import write_core_ml
  from opq_jax.export.onnx import write_onnx
  from opq_jax.export.records import ExportedLeaf, ExportedModel

__all__ = ['ExportedLeaf', 'ExportedModel', 'write_core_ml', 'write_onnx']

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'ExportedLeaf': 'records',
    'ExportedModel': 'records',
    'write_core_ml': 'core_ml',
    'write_onnx': 'onnx',
  },
)
