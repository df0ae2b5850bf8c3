"""Warnings that are kept for later, and names that messages list."""

import itertools
import re
import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opq_jax.core import messages

NUMBERS = st.integers(0, 12).map(str)
NAMES = st.builds(
  '{}.{}.{}{}'.format, st.sampled_from('ab'), NUMBERS, st.sampled_from('wb'), NUMBERS
)


def expanded(listed):
  """All names of a list, with every range of numbers written out."""
  found = []
  for name in re.split(r', (?![^{]*})', listed):
    parts = [
      [part] if i % 2 == 0 else [n for run in part.split(',') for n in numbers_of(run)]
      for i, part in enumerate(re.split(r'[{}]', name))
    ]
    found += map(''.join, itertools.product(*parts))
  return found


def numbers_of(run):
  first, _, last = run.partition('-')
  return [str(number) for number in range(int(first), int(last or first) + 1)]


@given(st.lists(NAMES, min_size=1, max_size=60, unique=True), st.integers(1, 60))
def test_listed_names_once_or_counts(names, most):
  """Names in ranges stand for just these names, each of them once; the others are counted."""
  first, _, left = messages.listed(names, most).partition(' and ')
  found = expanded(first)
  assert len(set(found)) == len(found) and set(found) <= set(names)
  assert len(found) + int(left.removesuffix(' more') or 0) == len(names)


def test_listed_layers_of_a_model():
  names = [f'layers.{i}.{kind}.weight' for i in range(24) for kind in ('q_proj', 'k_proj')]
  del names[6]
  assert messages.listed(names) == 'layers.{0-2,4-23}.q_proj.weight, layers.{0-23}.k_proj.weight'
  # few names are written out
  assert messages.listed(names[:2]) == 'layers.0.q_proj.weight, layers.0.k_proj.weight'


def test_collected_warnings_of_threads():
  """Of two threads in turn each keeps its own warnings, and warnings are shown afterwards."""
  found = {}
  steps = [threading.Event() for _ in range(4)]

  def collect(name, first):
    # the first begins, then the second; the first ends, then the second
    steps[first].wait(10)
    with messages.collected() as found[name]:
      steps[first + 1].set()
      steps[first + 2].wait(10)
      messages.warn(name, FutureWarning)
    steps[min(first + 3, 3)].set()

  shown = warnings._showwarnmsg_impl
  threads = [threading.Thread(target=collect, args=(name, i)) for i, name in enumerate('ab')]
  for thread in threads:
    thread.start()
  steps[0].set()
  for thread in threads:
    thread.join()
  assert {name: list(map(repr, own)) for name, own in found.items()} == {
    'a': ["FutureWarning('a')"],
    'b': ["FutureWarning('b')"],
  }
  assert warnings._showwarnmsg_impl is shown
  with pytest.warns(FutureWarning, match='again'):
    messages.warn(found['a'][0].__class__('again'))


def test_collected_inside_of_collected():
  with messages.collected() as outer:
    with messages.collected() as inner:
      messages.warn('one')
    messages.warn('two')
    messages.warn(inner[0])
  assert list(map(str, inner)) == ['one'] and list(map(str, outer)) == ['two', 'one']
