"""Docstrings become reStructuredText in which nothing is markup by accident."""

import sys

import pytest

from tests.helpers import snippets


@pytest.fixture(scope='module')
def api():
  pytest.importorskip('docutils')  # of the extra `docs`
  sys.path.insert(0, str(snippets.ROOT / 'docs'))
  try:
    import api_docstrings

    api_docstrings._learn_places()
    yield api_docstrings
  finally:
    sys.path.remove(str(snippets.ROOT / 'docs'))


def rst(api, text):
  lines = api.converted(text.splitlines())
  return '\n'.join(line for line in lines if line.strip())


def test_escaped_markup(api):
  assert rst(api, 'Where |w| > 2 * x_ and `a_b` holds.') == (
    'Where \\|w\\| > 2 \\* x\\_ and \\ ``a_b``\\  holds.'
  )


def test_escaped_names_are_links(api):
  assert rst(api, 'As `allocate` and `opq_jax.encoders.Trellis` do') == (
    'As \\ :py:obj:`allocate <opq_jax.allocate>`\\  and '
    '\\ :py:obj:`opq_jax.encoders.Trellis <opq_jax.encoders.Trellis>`\\  do'
  )
  assert rst(api, 'docs/method/allocation.md') == ':doc:`/method/allocation`'


def test_converted_blocks(api):
  text = 'Solves\n\n    min |x|\n\nfor\n\n  * one\n  * two *stars*\n\n>>> 1 * 2\n2'
  assert rst(api, text) == ('Solves\n::\n  min |x|\nfor\n* one\n* two \\*stars\\*\n>>> 1 * 2\n2')


def test_converted_sections(api):
  text = (
    'Does.\n\nArgs:\n  a, b: two numbers: both\n    positive.\n  *c: others.\n\n'
    'Returns:\n  The sum: a number.\n\nRaises:\n  ValueError: a is 0.\n'
  )
  assert rst(api, text).splitlines() == [
    'Does.',
    ':param a:',
    '  two numbers: both',
    '  positive.',
    ':param b: see \\ ``a``',
    ':param \\*c:',
    '  others.',
    ':returns:',
    '  The sum: a number.',
    ':raises ValueError:',
    '  a is 0.',
  ]


def test_places_first_room(api):
  """A name of several rooms is described once, at the top level where it is one of that."""
  places = api.places()
  assert places['opq_jax.encoders.compress'] == 'opq_jax.compress'
  assert places['opq_jax.encoders.Trellis'] == 'opq_jax.encoders.Trellis'
  assert set(places) == {
    f'{room}.{name}' for room in api.rooms() for name in api.public_names(room)
  }
