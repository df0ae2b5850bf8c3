"""Writes docs/reference from the `__all__` of every room: python docs/write_reference.py"""

import pathlib

import api_docstrings

FOLDER = pathlib.Path(__file__).parent / 'reference'
SUBJECTS = {
  'opq_jax': 'The top level: the names that most programs need.',
  'opq_jax.allocation': 'How much of every leaf to prune, and how finely to quantize it.',
  'opq_jax.compression': 'Masks and codebooks, and the compressed forward pass.',
  'opq_jax.encoders': 'Which code a weight gets.',
  'opq_jax.network': 'How a function uses its leaves, and second moments of their inputs.',
  'opq_jax.correction': 'BatchNorm and biases after compression; files for inference.',
  'opq_jax.coding': 'Codes to bytes and back.',
  'opq_jax.file': 'The .opq file.',
  'opq_jax.weights': 'Weights on disk.',
  'opq_jax.report': 'Sizes, tables, pages and verification.',
  'opq_jax.finetuning': 'Training steps, losses and checkpoints.',
  'opq_jax.models': 'Networks of the paper and of its field.',
  'opq_jax.importers': 'Weights of other frameworks.',
  'opq_jax.language': 'Language models from disk to disk.',
  'opq_jax.export': 'Compressed networks for other runtimes.',
  'opq_jax.data': 'Datasets, batches and augmentation.',
  'opq_jax.core': 'Trees, files and native loops.',
  'opq_jax.cli': 'The command line as a function.',
}
HEAD = """\
# API reference

Names at the top level are reached as `opq_jax.NAME`, all others by their room, `opq_jax.ROOM.NAME`.
Everything else is private and may change. `tests/docs/test_public_names.py` holds this list to the
package, and `python docs/write_reference.py` writes it.

```{toctree}
:maxdepth: 1
"""


def page(room: str) -> str:
  """The page of a room, without its ending."""
  return room.partition('.')[2] or 'top'


def main() -> None:
  rooms = {room: api_docstrings.public_names(room) for room in api_docstrings.rooms()}
  rooms = {room: names for room in SUBJECTS if (names := rooms.pop(room, None))} | rooms
  lines = [HEAD, *map(page, rooms), '```', '']
  for room, names in rooms.items():
    text = f'# {room}\n\n```{{eval-rst}}\n.. door:: {room}\n```\n'
    (FOLDER / f'{page(room)}.md').write_text(text)
    lines += [f'## {room}', '', f'[{SUBJECTS.get(room, room)}]({page(room)}.md)', '']
    lines += [*(f'- `{name}`' for name in names), '']
  (FOLDER / 'index.md').write_text('\n'.join(lines))


if __name__ == '__main__':
  main()
