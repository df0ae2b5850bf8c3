"""Imports run one way: a room imports rooms below it, inside of functions too."""

import ast
import pathlib

import opq_jax

# from the lowest layer to the highest; rooms of one layer do not import each other
LAYERS = (
  *(('core',), ('coding',), ('allocation',), ('compression',), ('file',), ('network',)),
  *(('encoders',), ('correction',), ('report',), ('weights',), ('data', 'finetuning', 'models')),
  *(('importers',), ('language',), ('export',), ('cli',)),
)
HEIGHTS = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
PACKAGE = pathlib.Path(opq_jax.__file__).parent
# `allocate(file_rate=...)` measures files, and files hold allocations
EXCEPTIONS = {('allocation', 'file')}


def imported_rooms(path):
  """The rooms that a module imports, at its top or in a function."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      names = [f'{node.value.id}.{node.attr}']  # `opq_jax.file`, by the lazy surface
    else:
      continue
    for name in names:
      package, _, rest = name.partition('.')
      room = rest.partition('.')[0]
      room = opq_jax._ROOMS.get(room, room)
      if package == 'opq_jax' and room in HEIGHTS:
        yield room


def test_rooms_import_lower_rooms_only():
  upward = {}
  for room, height in HEIGHTS.items():
    for path in (PACKAGE / room).rglob('*.py'):
      for other in imported_rooms(path):
        if other != room and HEIGHTS[other] >= height:
          upward.setdefault((room, other), set()).add(str(path.relative_to(PACKAGE)))
  assert set(upward) == EXCEPTIONS, upward


def test_layers_name_every_room():
  rooms = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  assert rooms <= set(HEIGHTS)
  assert any(list(imported_rooms(path)) for path in (PACKAGE / 'encoders').glob('*.py'))
