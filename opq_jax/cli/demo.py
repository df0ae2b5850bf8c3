"""`opq demo`: a small network from training to its compressed file."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq demo`, whose defaults are those of `digits.run`."""
  for name, kind, text in (
    ('--seed', int, 'seed of the split, the initial weights and the batches (default: 0)'),
    ('--rate', float, '32 over the bits per weight of the compressed leaves (default: 40)'),
    ('--output', Path, 'keep the .opq file here (default: it is deleted)'),
  ):
    parser.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text)


def run(arguments: argparse.Namespace) -> None:
  """Trains, compresses, finetunes, writes, reads and evaluates a network, and prints a table."""
  from opq_jax.cli import digits

  options = {name: value for name, value in vars(arguments).items() if name != 'command'}
  digits.run(**options)
