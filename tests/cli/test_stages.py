"""What a command says while it works."""

import re
import sys
import time

import pytest

from opq_jax.cli import stages
from opq_jax.cli.console import console
from opq_jax.report import progress_bars


def lines_of(text):
  return [re.sub(r'\d+ s', 'N s', line) for line in text.splitlines()]


def said(capsys, expected):
  """What stderr has once it has a text; a busy machine may be late."""
  text, end = '', time.monotonic() + 30
  while expected not in text:
    assert time.monotonic() < end, text
    time.sleep(0.01)
    text += capsys.readouterr().err
  return list(dict.fromkeys(lines_of(text)))


def test_without_a_terminal_a_line_a_minute(monkeypatch, capsys):
  monkeypatch.setattr(progress_bars, '_MINUTE', 0.05)
  with stages.timed_stages(console(sys.stdout)) as stage:
    with stage('read'):  # tells nothing
      assert said(capsys, 'read') == ['opq: read: N s so far']
    capsys.readouterr()
    with stage('choose codes') as told:
      told(0.25)
      found = said(capsys, 'done')
  assert found[-1] == 'opq: choose codes: N s so far, 25% done, about N s left'
  assert capsys.readouterr().out.startswith('read ')


def test_lines_end_with_their_stage(monkeypatch, capsys):
  monkeypatch.setattr(progress_bars, '_MINUTE', 0.03)
  with pytest.raises(ValueError, match='broken'), stages.progress_bar('windows') as told:
    told(3, 4)
    assert said(capsys, 'done')[-1] == 'opq: windows: N s so far, 75% done, about N s left'
    raise ValueError('broken')
  capsys.readouterr()
  time.sleep(0.1)
  assert capsys.readouterr().err == ''


def test_a_short_run_says_nothing(capsys):
  with stages.timed_stages(console(sys.stdout), has_times=False) as stage, stage('read'):
    pass
  assert capsys.readouterr() == ('', '')
