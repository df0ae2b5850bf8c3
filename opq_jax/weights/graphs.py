"""What the graph of a file says about its weights."""

import os
from pathlib import Path

from opq_jax.weights import checks, core_ml, core_ml_uses, onnx, onnx_uses
from opq_jax.weights.onnx_uses import GraphUse


def graph_uses(path: str | os.PathLike[str]) -> dict[str, GraphUse] | None:
  """Returns how the graph of an ONNX file or a Core ML package uses its weights, by name.

  None of any other file.  Tensors that no product and no look-up reads are left out, as are tables
  of positions by name.

  Raises:
    ValueError: onnx or coremltools is missing, or the file is damaged.
    OSError: it cannot be read.
  """
  path = Path(path)
  if onnx.is_onnx(path):
    model = onnx.load(path)
    return checks.guarded(lambda _: onnx_uses.uses_of(model), path, onnx.EXPECTED)
  if core_ml.is_core_ml(path):
    package = core_ml.load(path)
    return checks.guarded(lambda _: core_ml_uses.uses_of(package), path, core_ml.EXPECTED)
  return None
