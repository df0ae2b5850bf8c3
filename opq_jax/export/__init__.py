"""Compressed networks for other runtimes, without rounding anything again.

`write_onnx` and `write_core_ml` put the weights of an `.opq` file into an ONNX file or a Core ML
package, as indices and the values that occur.  `onnx_program` makes such an ONNX graph of a
function, `network_program` of the network that a file names.  `write_stablehlo` writes a function
without its weights, as a program of `jax.export` that reads codes: `program_arguments`.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.export.core_ml import write_core_ml
  from opq_jax.export.networks import network_program
  from opq_jax.export.onnx import write_onnx
  from opq_jax.export.programs import onnx_program
  from opq_jax.export.records import ExportedLeaf, ExportedModel
  from opq_jax.export.stablehlo import ExportedProgram, program_arguments, write_stablehlo

__all__ = [
  'ExportedLeaf',
  'ExportedModel',
  'ExportedProgram',
  'network_program',
  'onnx_program',
  'program_arguments',
  'write_core_ml',
  'write_onnx',
  'write_stablehlo',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'ExportedLeaf': 'records',
    'ExportedModel': 'records',
    'ExportedProgram': 'stablehlo',
    'network_program': 'networks',
    'onnx_program': 'programs',
    'program_arguments': 'stablehlo',
    'write_core_ml': 'core_ml',
    'write_onnx': 'onnx',
    'write_stablehlo': 'stablehlo',
  },
)
