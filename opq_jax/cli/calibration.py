"""Language models on the command line: which folders hold one, and its calibration tokens."""

import argparse
import dataclasses
from pathlib import Path

from opq_jax import encoders, models
from opq_jax.cli import language
from opq_jax.cli.console import note
from opq_jax.cli.encoding import (
  FEEDBACK,
  LAYER_BY_LAYER,
  MAX_TOKENS,
  TOKENS,
  TRELLIS,
  Encoding,
  TokenSet,
)
from opq_jax.cli.folders import may_hold_network
from opq_jax.cli.stages import Stage
from opq_jax.core.messages import listed
from opq_jax.language import (
  Calibration,
  StoredNetwork,
  at_random,
  calibration,
  compression,
  of_text,
  stored_network,
  written_by,
)
from opq_jax.models.attention import check_vocabulary
from opq_jax.weights import open_folder
from opq_jax.weights.gguf import is_gguf, open_gguf

_MOST_LINES = 4  # of a network that is not that of the configuration, in a note


def network_in(source: Path, *, is_needed: bool) -> StoredNetwork | None:
  """Returns the language model of a folder or GGUF file; None for other weights.

  Args:
    source: the weights.
    is_needed: whether to raise where the folder holds no language model that is known, nor an
      encoder of sentences; otherwise a note says of a model folder what is not.

  Raises:
    ValueError: as above.
  """
  problem = f'{source}: found no model folder of Hugging Face, expected that of a language model'
  # an encoder of sentences is run where this is asked for
  known = models.Decoder | models.SentenceEncoder if is_needed else models.Decoder
  if may_hold_network(source):
    folder = open_gguf(source) if is_gguf(source) else open_folder(source)
    try:
      model = models.from_config(folder.config)
      if isinstance(model, known):
        return stored_network(model, folder.leaves)
      problem = f'{source}: found a {folder.config["model_type"]}, expected a language model'
    except ValueError as error:
      first, *more = str(error).split('\n')
      lines = [line.strip() for line in more]
      problem = f'{source}: {first} {listed(lines, _MOST_LINES)}'.rstrip()
      if not is_needed and (is_gguf(source) or (source / 'config.json').is_file()):
        note(f'{problem}; bits are allocated from the weights alone')
  if is_needed:
    raise ValueError(problem)
  return None


def calibrated(arguments: argparse.Namespace, network: StoredNetwork, stage: Stage) -> Calibration:
  """Returns the calibration tokens that the options ask for; random ones without an option.

  Raises:
    ValueError: the text is too short, or the model has no token that texts begin with.
    OSError: the text cannot be read.
  """
  source, model = arguments.calibration, network.model
  window = min(calibration.WINDOW, model.positions)
  count = arguments.calibration_tokens or MAX_TOKENS
  if source is None:
    return cost_tokens(network)
  if isinstance(model, models.SentenceEncoder):
    return _of_encoder(arguments, model, count)
  if source == calibration.RANDOM:
    return at_random(model.vocabulary, count, window)
  if source == calibration.SELF:
    loaded = language.load(arguments.input, None)
    first = loaded.special_tokens('bos_token_id') or loaded.special_tokens('eos_token_id')
    if not first:
      raise ValueError(
        f'{arguments.input}: found no bos_token_id and no eos_token_id in its configuration, '
        'expected a token that texts begin with: --calibration TEXT'
      )
    with stage('write text') as told:
      return written_by(loaded.model, loaded.variables, first[0], count, window, told)
  return of_text(_texts(arguments, model), count, window)


def _of_encoder(
  arguments: argparse.Namespace, model: models.SentenceEncoder, count: int
) -> Calibration:
  """Returns the calibration tokens of an encoder of sentences.

  Windows of a text stand between the tokens that frame a sentence; tokens of a file are taken as
  they are.

  Raises:
    ValueError, OSError: as `calibrated`; an encoder writes no text.
  """
  source, window = arguments.calibration, min(calibration.SENTENCE, model.positions)
  if source == calibration.RANDOM:
    return at_random(model.vocabulary, count, window)
  if source == calibration.SELF:
    raise ValueError(
      '--calibration: found self with an encoder of sentences, which writes no text, expected TEXT '
      'or random'
    )
  frame = language.frame_of(source, arguments.input)
  found = of_text(_texts(arguments, model), count, window - len(frame))
  return calibration.framed(found, *frame) if frame else found


def _texts(
  arguments: argparse.Namespace, model: models.Decoder | models.SentenceEncoder
) -> list[list[int]]:
  """Returns the tokens of the calibration texts.

  Raises:
    ValueError: as `language.texts`, or a token is not of the model's vocabulary.
    OSError: as `language.texts`.
  """
  found = language.texts(arguments.calibration, arguments.input)
  try:
    check_vocabulary(found, model.vocabulary)
  except ValueError as error:
    raise ValueError(f'{arguments.calibration}: {error}, the tokens of the model') from error
  return found


def cost_tokens(network: StoredNetwork) -> Calibration:
  """Returns the random tokens from which costs are computed where no others are given."""
  window = min(compression.COST_WINDOW, network.model.positions)
  return at_random(network.model.vocabulary, compression.COST_TOKENS, window)


def planned(arguments: argparse.Namespace, plan: Encoding, found: Calibration) -> Encoding:
  """Returns the plan with costs, encoder and calibration tokens."""
  tokens = TokenSet(found.source, found.tokens.size, found.digest[:16])
  plan = dataclasses.replace(plan, tokens=tokens)
  if arguments.calibration is None:
    return plan
  return dataclasses.replace(
    plan,
    encoder=LAYER_BY_LAYER,
    first=TRELLIS if arguments.trellis else FEEDBACK,
    trellis_version=encoders.TRELLIS_VERSION if arguments.trellis else None,
    moments=TOKENS,
    inputs=TOKENS,
  )


def encoder_of(plan: Encoding) -> encoders.LeafEncoder | None:
  """Returns the encoder of each leaf; None where codes are rounded.

  Its moments are measured on the way.
  """
  if plan.inputs != TOKENS:
    return None
  return encoders.Trellis() if plan.first == TRELLIS else encoders.Feedback({})
