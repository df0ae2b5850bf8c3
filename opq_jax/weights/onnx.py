"""Opens ONNX files: the tensors of numbers that a graph holds, a flat dict by name.

Needs the package onnx.  Initializers stand under their own names, those of the graphs within
(branches of If, bodies of Loop and Scan) too.  Matrices of floats that nodes `Constant` hold stand
under the names of their outputs.  Data in other files are read beside the file.
`opq_jax.weights.onnx_uses` tells what the graph does with a tensor.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from opq_jax.core import extras
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.weights import checks

EXPECTED = 'an ONNX file'
_GRAPH, _GRAPHS = 5, 10  # AttributeProto.AttributeType


class Constant(NamedTuple):
  """A tensor of numbers that a model holds.

  Attributes:
    graph: in which it stands, a GraphProto.
    output: the name by which nodes know it.
    tensor: a TensorProto.
    node: the node `Constant` that holds it; None of an initializer.
  """

  graph: Any
  output: str
  tensor: Any
  node: Any = None


def is_onnx(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path has the suffix of ONNX files."""
  return os.fspath(path).lower().endswith('.onnx') and not os.path.isdir(path)


def load(path: Path) -> Any:
  """Returns the ModelProto of a file; data in other files stay there.

  Raises:
    ValueError: onnx is missing, or the file is damaged.
    OSError: it cannot be read.
  """
  onnx = extras.require('onnx', 'onnx', str(path))
  return checks.guarded(lambda path: onnx.load(path, load_external_data=False), path, EXPECTED)


def graphs(graph: Any) -> Iterator[Any]:
  """Yields a graph and all graphs within, outer ones first."""
  yield graph
  for node in graph.node:
    for _, inner in inner_graphs(node):
      yield from graphs(inner)


def inner_graphs(node: Any) -> Iterator[tuple[str, Any]]:
  """Yields the graphs that a node has as attributes, with the names of these."""
  for attribute in node.attribute:
    if attribute.type == _GRAPH:
      yield attribute.name, attribute.g
    elif attribute.type == _GRAPHS:
      for number, inner in enumerate(attribute.graphs):
        yield f'{attribute.name}/{number}', inner


def constants(model: Any) -> dict[str, Constant]:
  """Returns the tensors of numbers of a model by the names that they have in a tree.

  A name that an outer graph, or an earlier branch, has given to another tensor already stands
  behind the place of its graph: `If_3/else_branch/weight`.

  Raises:
    ValueError: two tensors of one graph have the same name.
  """
  found: dict[str, Constant] = {}

  def walk(graph: Any, place: str) -> None:
    here: set[str] = set()
    for constant in _of_graph(graph):
      name = constant.output
      if name in here:
        raise ValueError(f'{name}: found two tensors of this name, expected one')
      here.add(name)
      found[f'{place}{name}' if name in found else name] = constant
    for number, node in enumerate(graph.node):
      for attribute, inner in inner_graphs(node):
        walk(inner, f'{place}{node.name or f"{node.op_type}_{number}"}/{attribute}/')

  walk(model.graph, '')
  return found


def array_of(constant: Constant, folder: Path) -> Shaped[np.ndarray, '...']:
  """Returns the array of a tensor; data in another file are read in this folder.

  Raises:
    ValueError or another error of onnx: the data are damaged, or lie outside of the folder.
    OSError: they cannot be read.
  """
  from onnx import TensorProto, numpy_helper

  # a copy: some versions of onnx keep data of other files in the tensor
  tensor = constant.tensor
  if tensor.data_location == TensorProto.EXTERNAL:
    tensor = TensorProto()
    tensor.CopyFrom(constant.tensor)
  return numpy_helper.to_array(tensor, os.fspath(folder))


def is_place(tensor: Any, folder: Path | None) -> bool:
  """Returns whether a tensor has no data: they are in a file of its own name, which is not there.

  Args:
    tensor: a TensorProto.
    folder: where data in other files are; None of a model that is in no file.
  """
  from onnx import TensorProto

  if tensor.data_location != TensorProto.EXTERNAL:
    return False
  locations = [entry.value for entry in tensor.external_data if entry.key == 'location']
  return locations == [tensor.name] and (folder is None or not (folder / tensor.name).exists())


def dtype_of(tensor: Any) -> np.dtype | None:
  """Returns the dtype of a tensor of numbers; None of strings and of types that NumPy lacks."""
  from onnx import helper

  try:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
  except (KeyError, TypeError):  # a type of a newer version, or none
    return None
  return dtype if checks.is_of_numbers(dtype) else None


def open_leaves(path: Path) -> dict[str, StoredLeaf]:
  """Returns the tensors of a file by name; those of other files stay on disk.

  Raises:
    ValueError: onnx is missing, the file is damaged, or two tensors have the same name.
    OSError: it cannot be read.
  """
  model = load(path)

  def opened(path: Path) -> dict[str, StoredLeaf]:
    found = constants(model)

    def fetch(name: str) -> Shaped[np.ndarray, '...']:
      read = lambda path: array_of(found[name], path.parent)
      return checks.guarded(read, path, f'{EXPECTED} whose data are whole')

    leaves = {}
    for name, constant in found.items():
      shape = tuple(constant.tensor.dims)
      if min(shape, default=0) < 0:
        raise ValueError(f'{path}: {name}: found shape {shape}, expected no negative length')
      dtype = dtype_of(constant.tensor)
      assert dtype is not None
      leaves[name] = StoredLeaf(os.fspath(path), name, shape, dtype, fetch)
    return leaves

  return checks.guarded(opened, path, EXPECTED)


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Raises:
    As `open_leaves`.
  """
  return {name: leaf.read() for name, leaf in open_leaves(path).items()}


def _of_graph(graph: Any) -> Iterator[Constant]:
  """Yields the tensors of one graph: initializers of numbers, and constant matrices of floats."""
  for tensor in graph.initializer:
    if dtype_of(tensor) is not None:
      yield Constant(graph, tensor.name, tensor)
  for node in graph.node:
    if node.op_type != 'Constant' or node.domain not in ('', 'ai.onnx'):
      continue
    for attribute in node.attribute:
      # scalars, shapes and axes are parts of the program, of which there are thousands
      if attribute.name == 'value' and sum(size > 1 for size in attribute.t.dims) > 1:
        dtype = dtype_of(attribute.t)
        if dtype is not None and (dtype.kind == 'f' or hasattr(ml_dtypes, dtype.name)):
          yield Constant(graph, node.output[0], attribute.t, node)
