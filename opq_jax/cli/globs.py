"""Which leaves a glob or a regular expression of the command line names."""

import functools
import re
from fnmatch import fnmatchcase

EXPRESSION = 're:'
"""What a regular expression begins with."""


def matches(path: str, glob: str) -> bool:
  """Returns whether a glob matches a path; `re:...` is a regular expression of the whole path.

  Paths hold brackets, `blocks[0].kernel`, which globs read as sets of characters: a glob is taken
  both ways, so that a path that was shown matches itself.

  Raises:
    ValueError: the regular expression is none.

  >>> [matches('blocks[0].kernel', g) for g in ('blocks[0].kernel', 'blocks[*].k*', 'blocks[0]')]
  [True, True, False]
  >>> [matches('block1/kernel', glob) for glob in ('block[12]/*', r're:block\\d/.*', 're:block')]
  [True, True, False]
  """
  if glob.startswith(EXPRESSION):
    return _compiled(glob).fullmatch(path) is not None
  return fnmatchcase(path, glob) or fnmatchcase(path, glob.replace('[', '[[]'))


@functools.cache
def _compiled(glob: str) -> re.Pattern[str]:
  try:
    return re.compile(glob.removeprefix(EXPRESSION))
  except re.error as error:
    raise ValueError(f'{glob}: found no regular expression, {error}') from error
