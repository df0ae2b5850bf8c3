"""Names that messages list."""

import itertools
import re

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
