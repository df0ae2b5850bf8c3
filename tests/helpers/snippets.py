"""Finds the code of README.md, CONTRIBUTING.md and docs/, page by page."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
_FENCE = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_NOT_RUN = '# not run: '


class Snippet(NamedTuple):
  """A block of code.

  Attributes:
    line: of its first line in the page.
    language: 'python' or 'bash'.
    text: of the block.
    is_run: whether the test runs it; the others begin with a comment that gives a reason.
  """

  line: int
  language: str
  text: str
  is_run: bool


def pages():
  """Returns the path of every page by its name."""
  found = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
  return {str(p.relative_to(ROOT)): p for p in found if '_build' not in p.parts}


def snippets(path):
  """Returns the blocks of Python and of shell commands of a page."""
  text = path.read_text()
  return [
    Snippet(
      text[: match.start()].count('\n') + 2, match[1], match[2], not match[2].startswith(_NOT_RUN)
    )
    for match in _FENCE.finditer(text)
    if match[1] in ('python', 'bash')
  ]


def commands(text):
  """Splits a shell block into commands, lists of words without comments and `&&`."""
  joined = text.replace('\\\n', ' ')
  words = [shlex.split(line, comments=True) for line in joined.splitlines()]
  found = []
  for line in words:
    command = []
    for word in [*line, '&&']:
      if word == '&&':
        found.append(command)
        command = []
      else:
        command.append(word)
  return [command for command in found if command]
