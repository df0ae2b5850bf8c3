"""`opq report` and `opq card`: what they write, and what they refuse to write over."""

import pathlib
import shutil

import pytest

from opq_jax import cli

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name in ('version_1', 'version_2_ties'):
    shutil.copy(GOLDEN / f'{name}.opq', tmp_path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_report_writes_page(folder, capsys):
  assert cli.main(['report', 'version_1.opq', 'one.html']) == 0
  assert f'one.html: {(folder / "one.html").stat().st_size:,} bytes' in capsys.readouterr().out
  assert cli.main(['report', 'version_1.opq', 'version_2_ties.opq', 'both.html']) == 0
  page = (folder / 'both.html').read_text(encoding='utf-8')
  assert '<title>version_1.opq and version_2_ties.opq</title>' in page


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    # a page that is forgotten is no reason to write over the second file
    (['version_1.opq', 'version_2_ties.opq'], 'expected one that ends in .html'),
    (['version_1.opq', 'version_1.opq'], 'found the input itself'),
    (['version_1.opq', 'nowhere/page.html'], 'found no folder nowhere'),
    (['missing.opq', 'page.html'], 'missing.opq: No such file'),
  ],
)
def test_report_refuses_outputs(folder, capsys, argv, message):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert cli.main(['report', *argv]) == 2
  assert message in capsys.readouterr().err
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_report_refuses_damage(folder, capsys):
  data = bytearray((folder / 'version_1.opq').read_bytes())
  data[-200] ^= 1
  (folder / 'damaged.opq').write_bytes(data)
  assert cli.main(['report', 'version_1.opq', 'damaged.opq', 'page.html']) == 2
  assert capsys.readouterr().err.count('\n') == 1 and not (folder / 'page.html').exists()


def test_card_prints_or_writes(folder, capsys):
  assert cli.main(['card', 'version_1.opq']) == 0
  printed = capsys.readouterr().out
  assert printed.startswith('---\nlibrary_name: opq_jax\n') and '# version\\_1.opq' in printed
  assert cli.main(['card', 'version_1.opq', '--base', 'a/b', '--out', 'README.md']) == 0
  assert 'base_model: "a/b"\n' in (folder / 'README.md').read_text()
  assert cli.main(['card', 'version_1.opq', '--base', 'a b']) == 2
