"""Converts a JAX function into an ONNX graph whose weights are elsewhere.

A program has what a function computes, and of its parameters names, shapes and dtypes.  It takes
about a thousand bytes an operation, whatever the size of the network.  Its weights come later:

  * `opq_jax.export.write_onnx` puts those of an `.opq` file into it,
  * onnxruntime-web takes them when it opens the program (`externalData`), from the JavaScript
    decoder.

The package jax2onnx converts the operations.  It gets them one by one: calls are inlined, and of a
function that has branches for platforms the one that is no platform's own.
"""

import contextlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from opq_jax.core import extras, messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.export.rewriting import rewrite
from opq_jax.network.inlining import inlined
from opq_jax.weights import onnx as onnx_files

OPSET = 17
"""The operator set of programs: known to runtimes since 2022."""


def onnx_program(fn: Callable[..., Any], params: PyTree, *inputs: PyTree) -> Any:
  """Returns the ONNX graph of `fn(params, *inputs)`.

  Args:
    fn: any function that JAX can trace.
    params: its parameters, arrays or `jax.ShapeDtypeStruct`; their values are not read.
    *inputs: examples of the other arguments, of which shapes and dtypes are read.

  Returns:
    An `onnx.ModelProto`.  Each leaf that `fn` reads is an initializer under its path name, whose
    data are in a file of that name, which does not exist.  Inputs have the names of the arguments
    (`image`, or `batch/tokens` where `batch` is a dict); outputs have the path names of the result,
    and a result that is one array is `output`.  Inputs that `fn` does not read are left out.

  Raises:
    ValueError: jax2onnx is missing, an operation has no counterpart that it knows, two names are
      equal, or `fn` reads no leaf.

  >>> import jax.numpy as jnp, pytest
  >>> _ = pytest.importorskip('jax2onnx')
  >>> predict = lambda params, x: {'logits': x @ params['kernel']}
  >>> kernel = jax.ShapeDtypeStruct((3, 2), jnp.float32)
  >>> graph = onnx_program(predict, {'kernel': kernel}, jnp.ones((1, 3))).graph
  >>> weights = [one.name for one in graph.initializer if one.external_data]
  >>> [one.name for one in graph.input], weights, [one.name for one in graph.output]
  (['x'], ['kernel'], ['logits'])
  """
  with _contained():
    converter = extras.require('jax2onnx', 'jax2onnx', 'an ONNX program')
  leaves, structure = jax.tree.flatten((params, *inputs))
  specs = [jax.ShapeDtypeStruct(jax.numpy.shape(leaf), _dtype(leaf)) for leaf in leaves]
  traced, result = jax.make_jaxpr(
    lambda *flat: fn(*jax.tree.unflatten(structure, flat)), return_shape=True
  )(*specs)
  closed = jax.make_jaxpr(inlined(traced, rewrite))(*specs)
  closed = jax.make_jaxpr(inlined(closed))(*specs)  # what was written anew calls functions too
  weights = list(trees.named_leaves(params))
  names = [*weights, *_input_names(fn, inputs)]
  outputs = [_output_name(path) for path in trees.named_leaves(result)]
  if twice := [name for name, count in Counter([*names, *outputs]).items() if count > 1]:
    raise ValueError(f'fn: found names twice, expected each once: {messages.listed(twice)}')
  is_read = _is_read(closed.jaxpr)
  if not any(is_read[: len(weights)]):
    raise ValueError(f'fn: found no leaf that it reads, expected one of {messages.listed(weights)}')
  kept = [number for number in range(len(names)) if is_read[number]]

  def of_kept(*arguments: Any) -> tuple[Any, ...]:
    given = dict(zip(kept, arguments, strict=True))
    zeros = lambda number: jax.numpy.zeros(specs[number].shape, specs[number].dtype)
    everything = (given[i] if i in given else zeros(i) for i in range(len(specs)))
    return tuple(inlined(closed)(*everything))

  try:
    with _contained():
      model = converter.to_onnx(
        of_kept,
        [specs[number] for number in kept],
        model_name=getattr(fn, '__name__', 'program'),
        opset=OPSET,
        input_names=[names[number] for number in kept],
        output_names=outputs,
      )
  except NotImplementedError as error:
    raise ValueError(f'fn: found an operation that jax2onnx does not convert: {error}') from error
  _remove_unused(model.graph)
  _move_weights(model.graph, set(weights))
  return model


@contextlib.contextmanager
def _contained() -> Iterator[None]:
  """Keeps what a conversion does to the process out of it.

  jax2onnx puts a function of its own in the place of `jax.numpy.cumsum`, which takes the axis by
  name alone.  onnx_ir logs values without a known type, whose records are removed here.
  """
  modules = jax.numpy, jax.lax, jax.nn
  before = [dict(vars(module)) for module in modules]
  logger = logging.getLogger('onnx_ir.serde')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
    for module, names in zip(modules, before, strict=True):
      for name, value in names.items():
        if vars(module).get(name) is not value:
          setattr(module, name, value)


def _dtype(leaf: Any) -> Any:
  return jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(leaf))


def _input_names(fn: Callable[..., Any], inputs: Sequence[PyTree]) -> list[str]:
  """Returns the names of all inputs, by the arguments of a function after its first."""
  known = []
  for parameter in [*inspect.signature(fn).parameters.values()][1:]:
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
      break
    known.append(parameter.name)
  found = []
  for number, tree in enumerate(inputs):
    # of `*args`
    unknown = 'input' if len(inputs) == 1 else f'input_{number}'
    name = known[number] if number < len(known) else unknown
    found += [f'{name}/{path}' if path else name for path in trees.named_leaves(tree)]
  return found


def _output_name(path: str) -> str:
  """Returns the name of a result: its path, behind `output` where that begins with a number."""
  if not path:
    return 'output'
  return f'output/{path}' if path[0].isdecimal() else path


def _is_read(jaxpr: Any) -> list[bool]:
  """Returns for each argument of a jaxpr whether a result depends on it."""
  alive = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
  for equation in reversed(jaxpr.eqns):
    if alive.intersection(equation.outvars):
      alive.update(atom for atom in equation.invars if not isinstance(atom, jex.Literal))
  return [variable in alive for variable in jaxpr.invars]


def _remove_unused(graph: Any) -> None:
  """Removes shapes of values, which runtimes infer, and tensors that no node reads."""
  for one in onnx_files.graphs(graph):
    del one.value_info[:]
    read = {output.name for inner in onnx_files.graphs(one) for output in inner.output}
    read |= {name for inner in onnx_files.graphs(one) for node in inner.node for name in node.input}
    tensors = [tensor for tensor in one.initializer if tensor.name in read]
    del one.initializer[:]
    one.initializer.extend(tensors)


def _move_weights(graph: Any, weights: Collection[str]) -> None:
  """Makes inputs initializers whose data are in files of their names."""
  from onnx import TensorProto

  inputs = []
  for one in graph.input:
    if one.name not in weights:
      inputs.append(one)
      continue
    shape = one.type.tensor_type.shape
    tensor = graph.initializer.add(
      name=one.name,
      data_type=one.type.tensor_type.elem_type,
      dims=[dim.dim_value for dim in shape.dim],
      data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key='location', value=one.name)
  del graph.input[:]
  graph.input.extend(inputs)
