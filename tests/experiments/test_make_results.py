"""Tables go to the places that pages mark for them, and nowhere else."""

import pytest

from experiments import make_results

TABLES = {'one': lambda: '| 1 |', 'two': lambda: '| 2 |'}


def page(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def test_fill_replaces_marked_tables(tmp_path):
  readme = page(tmp_path, 'README.md', 'before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n')
  result = page(tmp_path, 'docs/results/a.md', '<!-- two -->\n| 2 |\n<!-- end of two -->\n')
  page(tmp_path, 'docs/_build/results/a.md', '<!-- three -->\n<!-- end of three -->\n')
  assert make_results.pages(tmp_path) == [readme, result]
  # a page that is as it should be is not written again
  assert make_results.fill([readme, result], TABLES) == {
    readme: 'before\n<!-- one -->\n| 1 |\n<!-- end of one -->\nafter\n'
  }


def test_fill_reports_unknown_and_missing(tmp_path):
  unknown = page(tmp_path, 'README.md', '<!-- three -->\n<!-- end of three -->\n')
  with pytest.raises(ValueError, match=r'found <!-- three -->, expected one of'):
    make_results.fill([unknown], TABLES)
  one = page(tmp_path, 'README.md', '<!-- one -->\n<!-- end of one -->\n')
  with pytest.raises(ValueError, match=r"found no place for \['two'\]"):
    make_results.fill([one], TABLES)


def test_pages_hold_the_present_tables():
  assert make_results.fill(make_results.pages()) == {}
