"""Language models from folders and files: the network, its variables, and the files beside them."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opq_jax import models
from opq_jax.core import trees
from opq_jax.file.reader import OpqFile
from opq_jax.importers import language_models
from opq_jax.weights import StoredLeaf, open_folder, read_weights
from opq_jax.weights.gguf import is_gguf, open_gguf

_CONFIG = 'config.json'
_GENERATION = 'generation_config.json'


class LanguageModel(NamedTuple):
  """A language model with its weights, run as `model.apply(variables, tokens)`.

  Attributes:
    model: the network that the configuration describes.
    variables: `{'params': …}`, in the dtypes of the file.
    config: the configuration.
    ignored: names of tensors that are no weights of the network.
    side_file: returns the bytes of a file beside the weights by its name, None where it is missing.
  """

  model: models.Decoder
  variables: dict[str, Any]
  config: Mapping[str, Any]
  ignored: tuple[str, ...]
  side_file: Callable[[str], bytes | None]

  def special_tokens(self, key: str) -> tuple[int, ...]:
    """Returns the tokens of a key of the configurations, such as 'eos_token_id'; () for none.

    Raises:
      ValueError: the file of the generation's configuration is no JSON object, or something else
        than tokens is under this key.
    """
    text = self.side_file(_GENERATION)
    try:
      generation = json.loads(text) if text else {}
    except ValueError as error:
      raise ValueError(f'{_GENERATION}: expected JSON, found this: {error}') from error
    if not isinstance(generation, dict):
      raise ValueError(f'{_GENERATION}: found {type(generation).__name__}, expected a JSON object')
    found = generation.get(key, self.config.get(key))
    if found is None:
      return ()
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
      raise ValueError(f'{key}: found {str(found)[:80]!r}, expected a token or a list of tokens')
    return tuple(tokens)


def load(
  path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None, **options: Any
) -> LanguageModel:
  """Returns the language model of a folder or of a file.

  Args:
    path: a model folder of Hugging Face, an `.opq` or `.gguf` file, or another file of weights,
      with the tensors of transformers or the leaves of `opq_jax.models`.
    folder: a folder with config.json and the tokenizer, where `path` has none.
    **options: attributes of the model, such as `dtype=jnp.bfloat16`.

  Raises:
    ValueError: there is no config.json, it describes a network that `models.from_config` refuses,
      or the weights are not those of the network.
    OSError: a file cannot be read.
  """
  path = Path(path)
  beside = path if folder is None else Path(folder)
  side_file = side_files(beside)
  text = side_file(_CONFIG)
  if text is None:
    raise ValueError(
      f'{beside}: found no {_CONFIG}, expected one (--folder FOLDER names a folder that has it)'
    )
  try:
    config = json.loads(text)
    if not isinstance(config, dict):
      raise ValueError(f'found {type(config).__name__}, expected a JSON object')
    model = models.from_config(config, **options)
  except ValueError as error:
    raise ValueError(f'{_CONFIG} of {beside}: {error}') from error
  if not isinstance(model, models.Decoder):
    raise ValueError(
      f'{_CONFIG} of {beside}: found model_type '
      f'{config["model_type"]!r}, expected that of a language model'
    )
  with _leaves(path) as leaves:
    try:
      weights = _weights(model, leaves)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error
  return LanguageModel(model, weights.variables, config, weights.ignored, side_file)


@contextlib.contextmanager
def _leaves(path: Path) -> Iterator[Mapping[str, Any]]:
  """Gives the leaves of a folder or file by name; those of folders and `.opq` files stay there."""
  if path.is_dir():
    yield open_folder(path).leaves
  elif is_gguf(path):
    yield open_gguf(path).leaves
  elif path.suffix.lower() == '.opq':
    with OpqFile(path) as file:
      yield {
        name: StoredLeaf(
          os.fspath(path), name, file.shape(name), file.dtype(name), file.__getitem__
        )
        for name in file
      }
  else:
    yield trees.named_leaves(read_weights(path))


def _weights(model: models.Decoder, leaves: Mapping[str, Any]) -> language_models.Weights:
  """Returns variables of tensors of transformers, or of the leaves of the variables."""
  if not any(name.startswith('params/') for name in leaves):
    return language_models.from_tensors(model, leaves)
  arrays = {name: jnp.asarray(language_models.read(leaf)) for name, leaf in leaves.items()}
  shapes = models.variable_shapes(model)
  language_models.check(model, arrays)
  variables = [arrays[name] for name in trees.named_leaves(shapes)]
  return language_models.Weights(jax.tree.unflatten(jax.tree.structure(shapes), variables), ())


def side_files(path: Path) -> Callable[[str], bytes | None]:
  """Returns a reader of the files beside the weights, of a folder, `.opq` or `.gguf` file."""
  if path.is_dir():
    return lambda name: (path / name).read_bytes() if (path / name).is_file() else None
  if is_gguf(path):
    return open_gguf(path).side_file
  if path.suffix.lower() != '.opq':
    return lambda name: None
  with OpqFile(path) as file:
    return file.read_side_files().get
