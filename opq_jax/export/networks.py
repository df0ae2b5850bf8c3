"""The ONNX graph of the network that an `.opq` file names."""

import importlib.util
import json
import os
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from opq_jax import models
from opq_jax.core import extras
from opq_jax.core.trees import PyTree
from opq_jax.export.programs import onnx_program
from opq_jax.file.reader import OpqFile
from opq_jax.importers import language_models, named_networks, networks

_CONFIG = 'config.json'


def network_program(path: str | os.PathLike[str]) -> Any:
  """Returns the ONNX graph of the network of an `.opq` file, with places for its weights.

  The file is one of `opq compress --model`, whose network classifies `images` and gives `logits`;
  or one of a model folder, whose network reads `tokens`: a language model gives `logits`, an
  encoder of sentences `embeddings`.  The numbers of images, of sequences and of tokens are open.

  Args:
    path: the file.

  Returns:
    An `onnx.ModelProto`, as of `onnx_program`, for `write_onnx`.

  Raises:
    ValueError: the file names no network, its leaves are not those of the network, or jax2onnx is
      missing.
    OSError: the file cannot be read.
  """
  label = os.fspath(path)
  with OpqFile(path) as file:
    is_named = named_networks.identity_of(path) is not None
    config = None if is_named else file.read_side_files().get(_CONFIG)
    if not is_named and config is None:
      raise ValueError(
        f'{label}: found no name of a network and no {_CONFIG} in it, expected one of them, or '
        'its ONNX file (--into NET)'
      )
    # before the weights are decoded
    if importlib.util.find_spec('jax2onnx') is None:
      extras.require('jax2onnx', 'jax2onnx', f'the ONNX graph of {label}')
    if config is not None:
      return _of_tokens(file, json.loads(config))
  network = networks.load(path)
  _, *image = networks.noise_shape(network.source)

  def classify(variables: PyTree, images: jax.Array) -> PyTree:
    return {'logits': network.model.apply(variables, images)}

  return onnx_program(classify, network.variables, _open('images', *image, dtype=jnp.float32))


def _of_tokens(file: OpqFile, config: dict[str, Any]) -> Any:
  """Returns the graph of a network that reads tokens, by the tensors of its folder."""
  model: Any = models.from_config(config)
  # a tensor that another one repeats is compared with it
  tensors = {name: file[name] for name in file}
  names = language_models.matched(model, tensors).names
  output = 'embeddings' if isinstance(model, models.SentenceEncoder) else 'logits'

  def answer(tensors: PyTree, tokens: jax.Array) -> PyTree:
    variables = language_models.traced_variables(model, tensors, names)
    return {output: model.apply(variables, tokens)}

  limit = [f'length <= {model.positions}', 'length >= 1']
  tokens = _open('sequences', 'length', dtype=jnp.int32, constraints=limit)
  return onnx_program(answer, tensors, tokens)


def _open(*sizes: Any, dtype: Any, constraints: Any = ()) -> jax.ShapeDtypeStruct:
  """Returns a shape whose named lengths are open."""
  shape = jax.export.symbolic_shape(','.join(map(str, sizes)), constraints=constraints)
  return jax.ShapeDtypeStruct(shape, dtype)
