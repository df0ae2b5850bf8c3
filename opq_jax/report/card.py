"""Writes a model card of Hugging Face: what a file holds, how it was made, how it is opened."""

import json
import math
import re
from collections.abc import Sequence

from opq_jax.core import messages
from opq_jax.report import tables
from opq_jax.report.descriptions import Description
from opq_jax.report.records import rate
from opq_jax.report.size_tables import EXPLANATIONS

_TAGS = 'opq', 'pruned', 'quantized'
_MAX_NAMES = 8  # leaves that a sentence names
# an organization and a name, or a name alone
_REPOSITORY = re.compile(r'[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?', re.ASCII)
# what Markdown takes for markup, or GitHub for a link; dots and slashes of names stay readable
_MARKUP = re.compile(r'([!#$&*:<>\[\\\]_`{|}~]|(?<=www)\.)', re.IGNORECASE)


def model_card(description: Description, *, base: str | None = None) -> str:
  """Returns a model card in Markdown, with front matter in YAML, of facts of the file alone.

  Args:
    description: of the file, by `file_description`.
    base: the repository of the network that was compressed, `OWNER/NAME`; a file does not know it.

  Raises:
    ValueError: `base` is no name of a repository.

  >>> import jax, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64))}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> data = opq_jax.file.serialize(network.params, network.state)
  >>> described = opq_jax.report.file_description(data, name='net.opq')
  >>> model_card(described, base='example/net').splitlines()[1:3]
  ['library_name: opq_jax', 'base_model: "example/net"']
  """
  if base is not None and not _REPOSITORY.fullmatch(base):
    raise ValueError(f'base: found {base!r}, expected the name of a repository, OWNER/NAME')
  front = ['---', 'library_name: opq_jax']
  # a string of JSON is one of YAML too
  front += [f'base_model: {json.dumps(base)}'] if base else []
  front += ['tags:', *(f'- {tag}' for tag in _TAGS), '---']
  parts = [
    '\n'.join(front),
    f'# {_escaped(description["name"])}',
    _summary(description, base),
    f'## Sizes\n\n{_sizes(description)}',
    *([f'## How it was made\n\n{_made(description)}'] if description['metadata'] else []),
    f'## How to open it\n\n{_opening(description)}',
  ]
  return '\n\n'.join(parts) + '\n'


def _summary(description: Description, base: str | None) -> str:
  """Returns what the file holds, in sentences."""
  leaves = description['leaves']
  compressed = _compressed(description)
  weights, bits = _weights(compressed), 8 * sum(leaf['bytes'] for leaf in compressed)
  survivors = _total(compressed, 'survivors')
  of_base = f'{_escaped(base)}' if base else 'A network'
  sentences = [
    f'{of_base}, pruned and quantized with opq\\_jax: {description["bytes"]:,} bytes, '
    f'{len(leaves):,} leaves, of which {len(compressed):,} are compressed.'
  ]
  if weights:
    sentences.append(
      f'Their {weights:,} weights take {bits / weights:.2f} bits each, and '
      f'{1 - survivors / weights:.1%} of them are pruned.'
    )
  if escaped := _total(compressed, 'escaped'):
    sentences.append(f'{escaped:,} of their weights are stored as they are.')
  if rotated := sum(leaf['codes']['isRotated'] for leaf in compressed):
    sentences.append(
      f'{rotated:,} compressed leaves have rotated inputs: they are read exactly, and cannot be '
      'finetuned as they are.'
    )
  if scaled := sum(leaf['codes']['scaledOutputs'] > 0 for leaf in compressed):
    sentences.append(f'{scaled:,} compressed leaves have scales of their outputs.')
  if dead := [leaf['path'] for leaf in compressed if not leaf['codes']['survivors']]:
    named = _escaped(messages.listed(dead, _MAX_NAMES))
    sentences.append(f'All weights are pruned of {named}.')
  sentences.append('All other leaves are stored bit for bit.')
  return ' '.join(sentences)


def _sizes(description: Description) -> str:
  compressed = _compressed(description)
  rows = []
  for name, explanation in EXPLANATIONS.items():
    if name == 'file':
      size, base = description['bytes'], description['asFloat32']
    else:
      size, base = _total(compressed, name), 4 * _weights(compressed)
    times = f'{rate(base, size):.2f}' if base and size else ''
    rows.append((name, f'{size:,.0f}', times, explanation))
  return _table(('size', 'bytes', 'times smaller than in float32', 'what it is'), rows)


def _made(description: Description) -> str:
  rows = [(_escaped(key), _escaped(text)) for key, text in description['metadata']]
  return _table(('metadata', 'value'), rows)


def _opening(description: Description) -> str:
  name = description['name']
  is_rotated = any(leaf['codes']['isRotated'] for leaf in _compressed(description))
  if is_rotated:
    python = f'with opq_jax.OpqFile({name!r}) as file:\n  params = file.params()'
  else:
    python = f'params, state = opq_jax.load({name!r})'
  parts = [
    'In Python (`pip install opq_jax`):',
    f'```python\nimport opq_jax\n\n{python}\n```',
    'In JavaScript, with the `opq.mjs` of the same package:',
    "```js\nimport {openOpq} from './opq.mjs';\n\n"
    f'const response = await fetch({json.dumps(name)});\n'
    'const file = openOpq(await response.arrayBuffer());\n'
    'const {shape, dtype, values} = file.leaf(file.names[0]);\n```',
  ]
  if description['sideFiles']:
    count = len(description['sideFiles'])
    parts.append(
      f'`opq decompress` writes the weights as plain arrays, with the {count:,} files that the '
      'network carries.'
    )
  return '\n\n'.join(parts)


def _compressed(description: Description) -> list[Description]:
  return [leaf for leaf in description['leaves'] if leaf['codes'] is not None]


def _total(compressed: Sequence[Description], field: str) -> float:
  return sum(leaf['codes'][field] for leaf in compressed)


def _weights(compressed: Sequence[Description]) -> int:
  return sum(math.prod(leaf['shape']) for leaf in compressed)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [columns, ['---'] * len(columns), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _escaped(text: str) -> str:
  r"""Returns text that Markdown shows as it is: names and metadata are untrusted.

  >>> _escaped('a|b <img>')
  'a\\|b \\<img\\>'
  """
  return _MARKUP.sub(r'\\\1', tables.visible(text))
