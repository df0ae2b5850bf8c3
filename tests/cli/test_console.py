"""What reaches a terminal: names of files are untrusted."""

import io

import numpy as np
from rich.text import Text

from opq_jax.cli.command import main
from opq_jax.cli.console import console

NAME = 'a\x1b[31mb'


def test_a_console_escapes_control_characters():
  stream = io.StringIO()
  console(stream).print(Text(f'{NAME}: done\nnext line', style='dim'))
  assert stream.getvalue() == 'a\\x1b[31mb: done\nnext line\n'


def test_commands_escape_names_of_files(tmp_path, capsys):
  source, output = tmp_path / f'{NAME}.npz', tmp_path / f'{NAME}.opq'
  np.savez(source, kernel=np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32))
  back = tmp_path / f'{NAME} back.npz'
  assert main(['compress', str(source), str(output), '--bits-per-weight', '4']) == 0
  assert main(['inspect', str(output)]) == 0
  assert main(['verify', str(output), '--against', str(source)]) == 0
  assert main(['decompress', str(output), str(back)]) == 0
  assert main(['report', str(output), str(tmp_path / f'{NAME}.html')]) == 0
  assert main(['inspect', str(tmp_path / f'{NAME}.none')]) == 2
  printed = capsys.readouterr()
  shown = printed.out + printed.err
  assert shown.count('\\x1b[31mb') >= 5
  assert '\x1b' not in shown
