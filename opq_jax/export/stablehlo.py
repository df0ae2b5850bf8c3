"""Writes functions of compressed parameters as StableHLO: a program without the weights.

Codes and codebooks are arguments of the program, which decodes them where it uses them: a weight
stays one byte, or half of one, until then.  The program runs wherever JAX does, without the Python
code of the network, and its StableHLO is what other runtimes read.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Shaped

from opq_jax.compression import CompressionState, coded, decoded
from opq_jax.core import extras, files, trees
from opq_jax.core.trees import PyTree

PLATFORMS = 'cpu', 'cuda', 'tpu'
"""Platforms for which a program is lowered by default: each has its own convolutions in it."""

_KNOWN = *PLATFORMS, 'rocm'


class ExportedProgram(NamedTuple):
  """A program that was written.

  Attributes:
    size: bytes of the file.
    arguments: bytes of codes, codebooks and other leaves, which the program takes.
    platforms: that it runs on.
  """

  size: int
  arguments: int
  platforms: tuple[str, ...]


def program_arguments(params: PyTree, state: CompressionState) -> dict[str, Shaped[Array, '...']]:
  """Returns the codes, codebooks and other leaves that a program of `write_stablehlo` takes.

  By name: `params/conv/kernel/codes`, `params/conv/kernel/grid/step`, ..., `params/conv/bias`.  Any
  file of named arrays can hold them, for a machine without opq_jax.

  Args:
    params: the tree, with latent weights or compressed ones.
    state: its kinds and codebooks.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (64, 32)), 'bias': jnp.zeros(32)}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> list(program_arguments(network.params, network.state))[:2]
  ['bias', 'kernel/codes']
  """
  return _with_numbers(coded(params, state))


def _with_numbers(tree: PyTree) -> dict[str, Shaped[Array, '...']]:
  """Returns the arrays of a coded tree by name, but those without numbers."""
  return {name: leaf for name, leaf in trees.named_leaves(tree).items() if np.size(leaf)}


def write_stablehlo(
  path: str | os.PathLike[str],
  fn: Callable[..., PyTree],
  params: PyTree,
  state: CompressionState,
  *inputs: PyTree,
  platforms: Sequence[str] = PLATFORMS,
) -> ExportedProgram:
  """Writes `fn(params, *inputs)` as a program of codes, which `jax.export.deserialize` reads.

  The program is called as `program.call(program_arguments(params, state), *inputs)`.

  Args:
    path: the file to write; an existing one is replaced.  It appears whole or not at all.
    fn: any function that JAX can trace; it reads decoded parameters.
    params: the tree, with latent weights or compressed ones.
    state: its kinds and codebooks.
    *inputs: arrays, or `jax.ShapeDtypeStruct`s of them; an axis of any length is a name of
      `jax.export.symbolic_shape`.
    platforms: that the program shall run on: `cpu`, `cuda`, `tpu`, `rocm`.  JAX writes some
      operations otherwise for each of them, and refuses to run a program elsewhere.

  Returns:
    What was written.

  Raises:
    ValueError: a platform is unknown, flatbuffers is missing, or `state` was made for another tree.
    OSError: the file cannot be written.

  >>> import tempfile, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (64, 32))}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> x = jax.ShapeDtypeStruct(export.symbolic_shape('batch, 64'), jnp.float32)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   written = write_stablehlo(
  ...     f'{folder}/net.stablehlo', lambda p, x: x @ p['kernel'], network.params, network.state, x)
  ...   with open(f'{folder}/net.stablehlo', 'rb') as file:
  ...     program = export.deserialize(bytearray(file.read()))
  >>> program.call(program_arguments(network.params, network.state), jnp.ones((3, 64))).shape
  (3, 32)
  """
  if not platforms or not {*platforms} <= {*_KNOWN}:
    raise ValueError(f'platforms: found {list(platforms)}, expected some of {", ".join(_KNOWN)}')
  extras.require('flatbuffers', 'stablehlo', os.fspath(path))
  tree = coded(params, state)
  structure, named = jax.tree.structure(tree), trees.named_leaves(tree)

  def program(arguments: dict[str, Any], *inputs: PyTree) -> PyTree:
    # arrays without numbers, of which most leaves have some, are no arguments
    leaves = [
      arguments.get(name, jnp.zeros(leaf.shape, leaf.dtype)) for name, leaf in named.items()
    ]
    return fn(decoded(jax.tree.unflatten(structure, leaves)), *inputs)

  shapes, sizes = {}, 0
  for name, leaf in _with_numbers(tree).items():
    shapes[name] = jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype))
    sizes += leaf.nbytes
  data = export.export(jax.jit(program), platforms=tuple(platforms))(shapes, *inputs).serialize()
  files.write_bytes(path, bytes(data))
  return ExportedProgram(len(data), sizes, tuple(platforms))
