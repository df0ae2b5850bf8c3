"""`opq evaluate`: how well a language model predicts a text."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from opq_jax.models.perplexity import Evaluation
  from opq_jax.report.text_windows import Mean


_WINDOW = 512  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq evaluate`."""
  parser.add_argument(
    'model', metavar='MODEL', help='a model folder, a .gguf file, or an .opq file of one'
  )
  text = parser.add_mutually_exclusive_group(required=True)
  text.add_argument('--text', metavar='FILE', help='a text in UTF-8')
  text.add_argument(
    '--tokens', metavar='FILE', help='JSON: a list of tokens, or a list of lists, a text each'
  )
  parser.add_argument(
    '--against',
    metavar='OTHER',
    help='another model, the float one for instance: KL(OTHER || MODEL) too',
  )
  parser.add_argument(
    '--folder',
    metavar='FOLDER',
    help='folder with config.json and tokenizer.json, where MODEL has none of its own',
  )
  parser.add_argument(
    '--window',
    type=int,
    metavar='N',
    help=f'tokens read at once (default: {_WINDOW}, or as many as the model can read)',
  )
  parser.add_argument(
    '--stride',
    type=int,
    metavar='N',
    help='tokens from the begin of a window to that of the next (default: a whole window); less '
    'than a window gives more context, and takes longer; every token is counted once',
  )
  parser.add_argument(
    '--max-tokens', type=int, metavar='N', help='use the first N tokens of each text only'
  )
  parser.add_argument('--json', action='store_true', help='print the results as JSON, for programs')


def run(arguments: argparse.Namespace) -> None:
  """Prints perplexity, and the divergence from another model, with 95 % intervals."""
  from rich.text import Text

  from opq_jax.cli import language
  from opq_jax.cli.console import console
  from opq_jax.cli.stages import progress_bar
  from opq_jax.models.perplexity import evaluate

  if arguments.max_tokens is not None and arguments.max_tokens < 2:
    raise ValueError(f'--max-tokens: found {arguments.max_tokens}, expected 2 or more')
  network = language.load(arguments.model, arguments.folder)
  against = None
  if arguments.against is not None:
    other = language.load(arguments.against, arguments.folder)
    if not language.same_tokenizer(network, other):
      raise ValueError(f'{arguments.against}: found another tokenizer than that of the model')
    against = other.model, other.variables
  if arguments.window is None:
    read = [network.model, *([against[0]] if against else [])]
    arguments.window = min(_WINDOW, *(model.positions for model in read))
  sequences = [tokens[: arguments.max_tokens] for tokens in _sequences(arguments, network)]
  with progress_bar('windows') as progress:
    found = evaluate(
      network.model,
      network.variables,
      sequences,
      window=arguments.window,
      stride=arguments.stride,
      against=against,
      progress=progress,
    )
  if arguments.json:
    print(json.dumps(_as_json(arguments, found), indent=2, allow_nan=False))
    return
  stdout = console(sys.stdout)
  stdout.print(Text(f'perplexity  {_shown(found.perplexity, ".4g")}'))
  if found.divergence is not None:
    stdout.print(Text(f'KL          {_shown(found.divergence, ".3g")} nats a token'))
    stdout.print(Text(f'agreement   {100 * (found.agreement or 0):.1f} % of the likeliest tokens'))
  stdout.print(Text(f'{found.tokens:,} tokens in {found.windows:,} windows', style='dim'))


def _sequences(arguments: argparse.Namespace, network: Any) -> list[list[int]]:
  """Returns the tokens of the texts; no special tokens are added to a text."""
  from opq_jax.cli import language

  if arguments.tokens is not None:
    return language.tokens_in(arguments.tokens)
  path = Path(arguments.text)
  text = language.read_text(path)
  tokenizer = language.tokenizer_of(network.side_file, arguments.folder or arguments.model)
  tokens = tokenizer.encode(text, add_special_tokens=False).ids
  if len(tokens) < 2:
    raise ValueError(f'{path}: found a text of {len(tokens)} tokens, expected 2 or more')
  return [tokens]


def _shown(mean: 'Mean', form: str) -> str:
  """Returns a mean with its interval; of one window there is none."""
  if math.isinf(mean.low):
    return f'{mean.value:{form}}'
  return f'{mean.value:{form}} ({mean.low:{form}} to {mean.high:{form}})'


def _as_json(arguments: argparse.Namespace, found: 'Evaluation') -> dict[str, Any]:
  def mean(value: 'Mean | None') -> dict[str, float | None] | None:
    if value is None:
      return None
    finite = not math.isinf(value.low)
    low, high = (value.low, value.high) if finite else (None, None)
    return {'value': value.value, 'low': low, 'high': high}

  return {
    'model': arguments.model,
    'against': arguments.against,
    'text': arguments.text or arguments.tokens,
    'window': arguments.window,
    'stride': arguments.stride or arguments.window,
    'tokens': found.tokens,
    'windows': found.windows,
    'loss': mean(found.loss),
    'perplexity': mean(found.perplexity),
    'divergence': mean(found.divergence),
    'agreement': found.agreement,
  }
