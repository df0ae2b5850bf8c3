"""`opq generate`: text that a language model writes."""

import argparse
import sys

_LARGEST_SEED = 1 << 63  # of JAX


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq generate`."""
  parser.add_argument(
    'model', metavar='MODEL', help='a model folder, a .gguf file, or an .opq file of one'
  )
  parser.add_argument(
    '--prompt',
    default='',
    metavar='TEXT',
    help="the text's begin (default: the model's own begin token)",
  )
  parser.add_argument(
    '--tokens', type=int, default=64, metavar='N', help='tokens to write (default: %(default)s)'
  )
  parser.add_argument(
    '--temperature',
    type=float,
    default=0.0,
    metavar='T',
    help='0 takes the likeliest token, 1 draws as the model says (default: %(default)g)',
  )
  parser.add_argument(
    '--top-p',
    type=float,
    metavar='P',
    help='draw from the likeliest tokens that have this share together; with --temperature '
    '(default: 1)',
  )
  parser.add_argument('--seed', type=int, help='seed of the draws; with --temperature (default: 0)')
  parser.add_argument(
    '--folder',
    metavar='FOLDER',
    help='folder with config.json and tokenizer.json, where MODEL has none of its own',
  )


def run(arguments: argparse.Namespace) -> None:
  """Prints the prompt and what follows, token after token, up to the model's end token."""
  import jax
  import jax.numpy as jnp

  from opq_jax.cli import language
  from opq_jax.models.generation import generate

  draws = {'--top-p': arguments.top_p, '--seed': arguments.seed}
  for option, number in draws.items():
    if number is not None and arguments.temperature == 0:
      raise ValueError(
        f'{option}: found {number}, expected --temperature above 0 too: with 0 the likeliest token '
        'is taken, and none is drawn'
      )
  seed = 0 if arguments.seed is None else arguments.seed
  if not -_LARGEST_SEED <= seed < _LARGEST_SEED:
    raise ValueError(f'--seed: found {seed}, expected {-_LARGEST_SEED} to {_LARGEST_SEED - 1}')
  network = language.load(arguments.model, arguments.folder)
  tokenizer = language.tokenizer_of(network.side_file, arguments.folder or arguments.model)
  prompt = tokenizer.encode(arguments.prompt).ids if arguments.prompt else []
  prompt = prompt or list(network.special_tokens('bos_token_id')[:1])
  if not prompt:
    raise ValueError('--prompt: found none, expected one: the configuration names no bos_token_id')
  written = generate(
    network.model,
    network.variables,
    jnp.array([prompt]),
    arguments.tokens,
    jax.random.key(seed),
    temperature=arguments.temperature,
    top_p=1.0 if arguments.top_p is None else arguments.top_p,
  )
  ends, tokens, shown = set(network.special_tokens('eos_token_id')), [], ''
  sys.stdout.write(arguments.prompt)
  for token in written:
    if int(token[0]) in ends:
      break
    tokens.append(int(token[0]))
    text = _decoded(tokenizer, prompt, tokens)
    # a character of several bytes may be whole only after the next token
    if not text.endswith('\N{REPLACEMENT CHARACTER}'):
      sys.stdout.write(text[len(shown) :])
      sys.stdout.flush()
      shown = text
  sys.stdout.write(_decoded(tokenizer, prompt, tokens)[len(shown) :] + '\n')


def _decoded(tokenizer: object, prompt: list[int], tokens: list[int]) -> str:
  """Returns the text of the tokens after a prompt, with the spaces that they have behind it."""
  decode = tokenizer.decode  # type: ignore[attr-defined]
  return decode(prompt + tokens)[len(decode(prompt)) :]
