"""Model cards: front matter that is YAML, facts of the file, and names that are no markup."""

import pathlib

import pytest
import yaml

import opq_jax
from opq_jax.report import file_description, file_report, model_card
from tests.helpers.opq_files import laplace, state_of

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


def test_card_has_front_matter_and_sizes():
  path = GOLDEN / 'version_2_rotated.opq'
  card, report = model_card(file_description(path), base='Qwen/Qwen2.5-0.5B'), file_report(path)
  _, front, text = card.split('---\n', 2)
  assert yaml.safe_load(front) == {
    'library_name': 'opq_jax',
    'base_model': 'Qwen/Qwen2.5-0.5B',
    'tags': ['opq', 'pruned', 'quantized'],
  }
  assert f'| file | {report.file:,} | {report.as_float32 / report.file:.2f} |' in text
  assert f'| packed | {report.packed:,} | {report.packed_rate:.2f} |' in text
  assert f'{report.sparsity:.1%} of them are pruned' in text
  # rotated leaves have no state, which `load` would warn of
  assert "OpqFile('version_2_rotated.opq')" in text and 'opq_jax.load' not in text


def test_card_without_base_opens_by_load():
  card = model_card(file_description(GOLDEN / 'version_1.opq'))
  front = yaml.safe_load(card.split('---\n')[1])
  assert 'base_model' not in front and "opq_jax.load('version_1.opq')" in card


def test_card_escapes_metadata():
  params = {'w': laplace(6, 5)}
  metadata = {'a|b': '<img src=x>\n# title', '`c`': '[link](https://example.org)'}
  data = opq_jax.file.serialize(params, state_of(params), metadata)
  card = model_card(file_description(data, name='a\n---\nb.opq'))
  assert '| a\\|b | \\<img src=x\\>\\\\n\\# title |' in card
  assert '| \\`c\\` | \\[link\\](https\\://example.org) |' in card
  assert '\n# title' not in card and card.count('\n---\n') == 1


@pytest.mark.parametrize('base', ['', 'a/b/c', 'a b', 'a\nlicense: mit', '../x'])
def test_card_refuses_base(base):
  with pytest.raises(ValueError, match=r'base: found .*, expected the name of a repository'):
    model_card(file_description(GOLDEN / 'version_1.opq'), base=base)
