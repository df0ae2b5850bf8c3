"""The page of a file: its data, what it refuses to run, and what a browser shows."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

import opq_jax
from opq_jax.cli.described import described
from opq_jax.report import file_description, html_page
from tests.helpers import chromium
from tests.helpers.opq_files import laplace, state_of

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
REPORT = pathlib.Path(opq_jax.report.__file__).parent
HOSTILE = (
  '</script><script>stolen=1</script>',
  '<img src=x onerror=stolen=1>',
  '"><b>bold</b>',
  "'&lt;!--",
  'right\u202eleft\u2028line\x00',
)


class Parser(html.parser.HTMLParser):
  """Collects elements with their attributes, and the text of the title and of the data."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts, self._inside = [], {}, None
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.elements.append((tag, attributes))
    self._inside = attributes.get('id', tag)

  def handle_data(self, data):
    self.texts[self._inside] = self.texts.get(self._inside, '') + data

  def handle_endtag(self, tag):
    self._inside = None


def hostile():
  """The description of a file whose leaves, metadata and own name are markup."""
  params = {name: laplace(6, 5) for name in HOSTILE}
  metadata = dict(zip(HOSTILE, reversed(HOSTILE), strict=True))
  data = opq_jax.file.serialize(params, state_of(params), metadata)
  return file_description(data, name=HOSTILE[1])


def test_page_holds_descriptions():
  one, other = (file_description(GOLDEN / f'version_{i}.opq') for i in ('1', '2_ties'))
  parsed = Parser(html_page(one, other))
  assert json.loads(parsed.texts['descriptions']) == [one, other]
  assert parsed.texts['title'] == 'version_1.opq and version_2_ties.opq'


def test_page_escapes_names():
  """Names add no element, and come back from the data as they were."""
  plain = Parser(html_page(file_description(GOLDEN / 'version_1.opq')))
  description = hostile()
  page = html_page(description)
  parsed = Parser(page)
  assert parsed.elements[6:] == plain.elements[6:] and len(plain.elements) > 10
  assert json.loads(parsed.texts['descriptions']) == [description]
  assert {leaf['path'] for leaf in description['leaves']} == set(HOSTILE)
  assert parsed.texts['title'] == HOSTILE[1]
  data = page.partition('id="descriptions">')[2].partition('</script>')[0]
  assert re.search('[<>&]', data) is None


def contrast(one, other):
  """The contrast of two colors as WCAG 2 defines it."""

  def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

  lower, higher = sorted((luminance(one), luminance(other)))
  return (higher + 0.05) / (lower + 0.05)


def test_page_has_contrast():
  """4.5 of texts, 3 of bars, on both grounds, in light and dark."""
  style = (REPORT / 'page_parts' / 'page.css').read_text()
  schemes = re.findall(r':root \{(.*?)\}', style, re.DOTALL)
  assert len(schemes) == 2
  for scheme in schemes:
    colors = dict(re.findall(r'--(\w+): (#\w{6});', scheme))
    for ground in ('ground', 'raised'):
      for name in ('text', 'quiet', 'accent', 'alarm'):
        assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
      for name in ('kept', 'zero', 'third', 'fourth'):
        assert contrast(colors[name], colors[ground]) >= 3, (name, ground)


def test_page_asks_nobody():
  parsed = Parser(html_page(file_description(GOLDEN / 'version_1.opq')))
  (policy,) = (a['content'] for _, a in parsed.elements if a.get('http-equiv'))
  assert policy.startswith("default-src 'none'; script-src 'sha256-") and 'unsafe' not in policy
  assert {'src', 'href', 'srcset', 'data', 'action', 'style'}.isdisjoint(
    name for _, attributes in parsed.elements for name in attributes
  )
  assert re.findall(r'url\(|@import', parsed.texts['style']) == []


@pytest.mark.skipif(shutil.which('node') is None, reason='found no node, expected Node.js')
def test_browser_describes_as_python():
  """All golden files: the numbers of a dropped file are those of `opq report`."""
  code = """
    import {readFileSync} from 'node:fs';
    import {basename} from 'node:path';
    import {openOpq} from './javascript/opq.mjs';
    import {describe} from './page_parts/description.mjs';
    for (const path of process.argv.slice(1)) {
      const data = readFileSync(path);
      const about = {name: basename(path), bytes: data.length};
      console.log(JSON.stringify(await describe(openOpq(data), about)));
    }
    """
  paths = sorted(GOLDEN.rglob('*.opq'))
  command = ['node', '--input-type=module', '-e', code, *map(str, paths)]
  run = subprocess.run(command, capture_output=True, text=True, cwd=REPORT, check=False)
  assert run.returncode == 0, run.stderr
  lines = run.stdout.splitlines()
  assert len(lines) == len(paths) >= 10
  for path, line in zip(paths, lines, strict=True):
    found, expected = json.loads(line), described(path)
    for one, other in zip(found['leaves'], expected['leaves'], strict=True):
      if one['codes']:
        for key in ('nominal', 'entropy'):
          own = one['codes'].pop(key)
          assert own == pytest.approx(other['codes'].pop(key), rel=1e-3, abs=0.11), one['path']
        own, theirs = (leaf['codes'].pop('grids') for leaf in (one, other))
        assert {key: pytest.approx(ends, rel=1e-6) for key, ends in own.items()} == theirs
    for description in (found, expected):
      description['metadata'].sort()
    assert found == expected, path


@chromium.needs_chromium
def test_page_in_browser(tmp_path):
  """A file is shown, others are chosen and dropped, a damaged one is refused, rows are sorted."""
  page_path = tmp_path / 'page.html'
  page_path.write_text(html_page(described(GOLDEN / 'version_2_slices.opq')), encoding='utf-8')
  damaged = tmp_path / 'damaged.opq'
  data = bytearray((GOLDEN / 'version_1.opq').read_bytes())
  data[-200] ^= 1
  damaged.write_bytes(data)
  texts = lambda selector: (
    f'[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)'
  )
  rows = texts('table.leaves .open .path')
  with chromium.opened(tmp_path / 'profile') as page:
    page.open(page_path)
    with opq_jax.OpqFile(GOLDEN / 'version_2_slices.opq') as file:
      expected = [name for name in file if file.grids(name)]
    assert page.value(rows) == expected

    # by keyboard: the column of bytes, twice, then the first leaf
    page.value(
      '[...document.querySelectorAll(".sort")].find((e) => /^bytes/.test(e.textContent)).focus()'
    )
    sizes = texts('table.leaves tbody:has(.open) > tr:first-child > td:nth-of-type(4)')
    for key, is_falling in (('Enter', True), (' ', False)):
      page.press(key)
      found = [int(text.replace(',', '')) for text in page.value(sizes)]
      assert found == sorted(found, reverse=is_falling) and len(found) == len(expected)
    assert page.value('document.activeElement.closest("th").ariaSort') == 'ascending'
    page.press('Tab')
    page.press('Enter')
    assert page.value('document.activeElement.ariaExpanded') == 'true'
    assert page.value('document.querySelectorAll(".details dl").length') == 1

    page.choose('#file', GOLDEN / 'version_2_ties.opq')
    page.wait('document.getElementById("status").textContent.startsWith("Shown: version_2_ties")')
    with opq_jax.OpqFile(GOLDEN / 'version_2_ties.opq') as file:
      assert page.value(rows) == [name for name in file if file.grids(name)]

    page.value('document.getElementById("beside").checked = true')
    page.drop(GOLDEN / 'version_1.opq')
    page.wait('document.getElementById("status").textContent.includes(" and version_1.opq")')
    heading = 'document.querySelector("h1").textContent'
    assert page.value(heading) == 'A: version_2_ties.opqB: version_1.opq'
    page.choose('#file', damaged)
    page.wait('document.getElementById("alert").textContent')
    told = page.value('document.getElementById("alert").textContent')
    assert told.startswith('damaged.opq is not shown: ') and 'found' in told

    page.look(360)
    assert page.value(
      'document.documentElement.scrollWidth === document.documentElement.clientWidth'
    )
    assert page.value('performance.getEntriesByType("resource").length') == 0
    assert page.messages == []

    page_path.write_text(html_page(hostile()), encoding='utf-8')
    page.open(page_path)
    page.wait('document.querySelector("h1")')
    assert page.value('typeof stolen') == 'undefined' and page.messages == []
    assert page.value('document.querySelectorAll("main img, main script, main b").length') == 0
    shown = page.value(rows)
    assert HOSTILE[0] in shown and 'right\\u{202e}left\\u{2028}line\\u{0}' in shown
