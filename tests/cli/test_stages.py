"""What a command says while it works."""

import re
import sys
import time

import pytest

from opq_jax.cli import stages
from opq_jax.cli.console import console


def lines_of(text):
  return [re.sub(r'\d+ s', 'N s', line) for line in text.splitlines()]


def test_without_a_terminal_a_line_a_minute(monkeypatch, capsys):
  monkeypatch.setattr(stages, '_MINUTE', 0.05)
  with stages.timed_stages(console(sys.stdout)) as stage:
    with stage('read') as told:
      time.sleep(0.08)  # says nothing for more than a minute
    with stage('choose codes') as told:
      told(0.25)
      time.sleep(0.08)
  captured = capsys.readouterr()
  assert lines_of(captured.err) == [
    'opq: read: N s so far',
    'opq: choose codes: N s so far, 25% done, about N s left',
  ]
  assert captured.out.startswith('read 0.')


def test_lines_end_with_their_stage(monkeypatch, capsys):
  monkeypatch.setattr(stages, '_MINUTE', 0.03)
  with pytest.raises(ValueError, match='broken'), stages.progress_bar('windows') as told:
    told(3, 4)
    time.sleep(0.05)
    raise ValueError('broken')
  found = capsys.readouterr().err
  assert lines_of(found) == ['opq: windows: N s so far, 75% done, about N s left']
  time.sleep(0.1)
  assert capsys.readouterr().err == ''


def test_a_short_run_says_nothing(capsys):
  with stages.timed_stages(console(sys.stdout), has_times=False) as stage, stage('read'):
    pass
  assert capsys.readouterr() == ('', '')
