"""How the operations of an ML program use its constants: which are weights, and their axes.

A constant is a weight where a product or a look-up reads it:

    operation                               outputs                 slices
    conv, linear                            axis 0
    conv_transpose                          axis 1
    matmul, y                               the last axis, or the last but one with transpose_y
                                                                    the axes before the last two
    matmul, x                               the last axis but one, or the last with transpose_x
                                                                    the axes before the last two
    gather                                  the last axis that is not looked up
    lstm, gru, rnn                          axis 0

Converters compute transposes and casts of constants themselves, so that nothing stands between.  A
constant that several operations read has the axes of the first product, or else look-up.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from opq_jax.allocation.leaf_names import kind_of_name
from opq_jax.weights import core_ml
from opq_jax.weights.onnx_uses import LEAST_SLICE, GraphUse

_LOOK_UP = 'gather'
_RECURRENT = ('lstm', 'gru', 'rnn')


def uses_of(package: core_ml.Package) -> dict[str, GraphUse]:
  """Returns how the program of a package uses its weights, by the names of `core_ml.constants`."""
  found = core_ml.constants(package)
  names = {id(constant.block): dict[str, str]() for constant in found.values()}
  for name, constant in found.items():
    names[id(constant.block)][constant.output] = name
  uses: dict[str, GraphUse] = {}

  def walk(block: Any, outer: Mapping[str, str], outer_parameters: Mapping[str, int]) -> None:
    known = {**outer, **names.get(id(block), {})}
    parameters = {**outer_parameters, **_parameters(block)}
    for operation in block.operations:
      for argument, axis, slices in _read_by(operation, found, known, parameters):
        name = known[_name(operation, argument)]
        shape = found[name].shape
        is_large = math.prod(shape[slices:]) >= LEAST_SLICE and math.prod(shape[:slices]) > 1
        use = GraphUse(operation.type, axis, slices if is_large else 0)
        if _goes_before(name, use, uses):
          uses[name] = use
      for inner in operation.blocks:
        walk(inner, known, parameters)

  for function in package.model.mlProgram.functions.values():
    for block in function.block_specializations.values():
      walk(block, {}, {})
  return {name: uses[name] for name in found if name in uses}


def _parameters(block: Any) -> dict[str, int]:
  """Returns the constant booleans and integers of a block, by name."""
  found = {}
  for operation in block.operations:
    if operation.type == 'const':
      tensor = operation.attributes['val'].immediateValue.tensor
      numbers = [*tensor.bools.values, *tensor.ints.values]
      if len(numbers) == 1:
        found[operation.outputs[0].name] = int(numbers[0])
  return found


def _goes_before(name: str, use: GraphUse, uses: Mapping[str, GraphUse]) -> bool:
  """Returns whether a use is the one that says the axes: the first product, or else look-up."""
  if use.kind == _LOOK_UP:
    return name not in uses and kind_of_name(name) is None
  return name not in uses or uses[name].kind == _LOOK_UP


def _name(operation: Any, argument: str) -> str:
  """Returns the name of a value that an operation reads, '' where it is none."""
  if argument not in operation.inputs:
    return ''
  bindings = operation.inputs[argument].arguments
  return bindings[0].name if len(bindings) == 1 else ''


def _read_by(
  operation: Any,
  found: Mapping[str, core_ml.Constant],
  known: Mapping[str, str],
  parameters: Mapping[str, int],
) -> Iterator[tuple[str, int, int]]:
  """Yields argument, axis of the outputs and number of slices of the weights that are read."""
  ranks = {
    argument: len(found[known[name]].shape)
    for argument in operation.inputs
    if (name := _name(operation, argument)) in known and len(found[known[name]].shape) > 1
  }
  number = lambda argument: parameters.get(_name(operation, argument), 0)
  kind = operation.type
  if kind in ('conv', 'linear', 'conv_transpose') and 'weight' in ranks:
    yield 'weight', int(kind == 'conv_transpose'), 0
  elif kind == 'matmul':
    for argument, is_turned in (
      ('y', number('transpose_y')),
      ('x', not number('transpose_x')),
    ):
      if (rank := ranks.get(argument)) is not None:
        yield argument, rank - (2 if is_turned else 1), rank - 2
  elif kind == _LOOK_UP and 'x' in ranks:
    rank = ranks['x']
    looked_up = number('axis') % rank
    yield 'x', rank - (2 if looked_up == rank - 1 else 1), 0
  elif kind in _RECURRENT:
    for argument in ranks:
      if argument.startswith('weight_'):
        yield argument, 0, 0
