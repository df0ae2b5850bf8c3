"""All mutants of a module's source: one expression or statement changed in each.

Own operators over `ast`, after those of cosmic-ray: mutmut skips decorated functions, most of the
functions here (jax.jit, jax.custom_jvp), and cosmic-ray changes the working tree and starts Python
and JAX anew for every mutant, which takes longer than most of these tests.
"""

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any

OPERATORS: dict[type[ast.AST], list[type[ast.AST]]] = {
  ast.Add: [ast.Sub],
  ast.Sub: [ast.Add],
  ast.Mult: [ast.Div],
  ast.Div: [ast.Mult],
  ast.FloorDiv: [ast.Mult],
  ast.Mod: [ast.Mult],
  ast.Pow: [ast.Mult],
  ast.BitAnd: [ast.BitOr],
  ast.BitOr: [ast.BitAnd],
  ast.LShift: [ast.RShift],
  ast.RShift: [ast.LShift],
  ast.Lt: [ast.LtE, ast.GtE],
  ast.LtE: [ast.Lt, ast.Gt],
  ast.Gt: [ast.GtE, ast.LtE],
  ast.GtE: [ast.Gt, ast.Lt],
  ast.Eq: [ast.NotEq],
  ast.NotEq: [ast.Eq],
  ast.Is: [ast.IsNot],
  ast.IsNot: [ast.Is],
  ast.In: [ast.NotIn],
  ast.NotIn: [ast.In],
  ast.And: [ast.Or],
  ast.Or: [ast.And],
}
CALLS = {
  'minimum': 'maximum',
  'maximum': 'minimum',
  'min': 'max',
  'max': 'min',
  'any': 'all',
  'all': 'any',
  'floor': 'ceil',
  'ceil': 'floor',
  'round': 'floor',
  'expm1': 'exp',
  'log1p': 'log',
  'zeros': 'ones',
  'argmin': 'argmax',
  'abs': 'negative',
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A module with one change.

  Attributes:
    function: dotted name of the function or class that holds the change.
    line: number of the changed line.
    text: the line before the change.
    change: `before -> after` of the expression.
    source: the whole module, changed.
  """

  function: str
  line: int
  text: str
  change: str
  source: str

  def key(self) -> str:
    """Returns a name that holds as long as the line stays as it is."""
    return f'{self.function}: {self.text}: {self.change}'


def mutations(source: str) -> list[Mutant]:
  """Returns all mutants of a module."""
  # bytes, in which `ast` counts columns
  data, mutants = source.encode(), []
  lines = data.splitlines(keepends=True)
  begins = [0]
  for line in lines:
    begins.append(begins[-1] + len(line))
  for function, node, text in _changes(ast.parse(source), ''):
    begin = begins[node.lineno - 1] + node.col_offset
    end = begins[node.end_lineno - 1] + node.end_col_offset
    before = data[begin:end].decode()
    mutated = (data[:begin] + text.encode() + data[end:]).decode()
    change = ' '.join(f'{before} -> {text}'.split())
    mutants.append(
      Mutant(function, node.lineno, lines[node.lineno - 1].decode().strip(), change, mutated)
    )
  return mutants


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, Any, str]]:
  """Yields function, node and new text of every change; no annotation, string or decorator."""
  if isinstance(node, ast.JoinedStr):
    return
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    function = f'{function}.{node.name}'.lstrip('.')
  for text in _new_texts(node):
    yield function, node, text
  if isinstance(node, ast.If | ast.While):
    yield function, node.test, f'(not ({ast.unparse(node.test)}))'
  for field, value in ast.iter_fields(node):
    if field in ('annotation', 'returns', 'decorator_list'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.AST):
        yield from _changes(child, function)


def _new_texts(node: ast.AST) -> Iterator[str]:
  """Yields the source of every other form of one node."""
  match node:
    case ast.BinOp() | ast.BoolOp():
      for operator in OPERATORS.get(type(node.op), []):
        yield f'({ast.unparse(_with(node, op=operator()))})'
    case ast.Compare():
      for operator in OPERATORS.get(type(node.ops[0]), []):
        yield f'({ast.unparse(_with(node, ops=[operator(), *node.ops[1:]]))})'
    case ast.UnaryOp():
      if not isinstance(node.operand, ast.Constant):
        yield f'({ast.unparse(node.operand)})'
    case ast.Constant(value=bool()):
      yield str(not node.value)
    case ast.Constant(value=int() | float()):
      yield f'({node.value + 1})'
      yield f'({node.value - 1})'
    case ast.IfExp():
      yield f'({ast.unparse(_with(node, body=node.orelse, orelse=node.body))})'
    case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
      if name in CALLS:
        field = 'attr' if isinstance(node.func, ast.Attribute) else 'id'
        new = _with(node.func, **{field: CALLS[name]})
        yield ast.unparse(_with(node, func=new))
      if name == 'where' and len(node.args) == 3:
        condition, then, otherwise = node.args
        yield ast.unparse(_with(node, args=[condition, otherwise, then]))
      if name == 'clip' and len(node.args) == 3:
        yield ast.unparse(node.args[0])
    case ast.Raise():
      yield 'pass'
    case ast.Expr(value=ast.Call()) | ast.AugAssign():
      yield 'pass'
    case ast.Continue():
      yield 'break'


def _with(node: ast.AST, **changes: Any) -> ast.AST:
  """Returns a node with some fields replaced."""
  fields = {name: getattr(node, name) for name in node._fields}
  return ast.fix_missing_locations(ast.copy_location(type(node)(**fields | changes), node))
