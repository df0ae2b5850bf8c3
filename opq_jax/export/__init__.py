"""Compressed networks for other runtimes, without rounding anything again.

`write_onnx` puts the weights of an `.opq` file into an ONNX file, as indices and the values that
occur.  A module a format.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.export.onnx import ExportedLeaf, ExportedModel, write_onnx

__all__ = ['ExportedLeaf', 'ExportedModel', 'write_onnx']

__getattr__, __dir__ = lazy.attributes(
  __name__, {'ExportedLeaf': 'onnx', 'ExportedModel': 'onnx', 'write_onnx': 'onnx'}
)
