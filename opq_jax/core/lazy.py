"""Package names that are imported on first use (PEP 562), so that a package itself is cheap."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def attributes(
  package: str, modules: Mapping[str, str], submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """Returns the `__getattr__` and `__dir__` of a package whose names are imported on first use.

  The modules are attributes too: `opq_jax.report.sizes` needs no import statement of its own.  Type
  checkers do not see these names: the package repeats its imports under `TYPE_CHECKING`.

  Args:
    package: the full name of the package, `__name__` in its `__init__.py`.
    modules: the module of each public name, relative to the package: `{'hits': 'accuracy'}`.
    submodules: further modules that are attributes.

  >>> find, names = attributes('opq_jax.core', {'named_leaves': 'trees'})
  >>> find('named_leaves')({'a': 1}), 'named_leaves' in names()
  ({'a': 1}, True)
  >>> find('trees').__name__
  'opq_jax.core.trees'
  >>> find('leaves')
  Traceback (most recent call last):
  AttributeError: module 'opq_jax.core' has no attribute 'leaves'
  """

  known_modules = {*modules.values(), *submodules}

  def find(name: str) -> Any:
    if name in modules:
      value = getattr(importlib.import_module(f'{package}.{modules[name]}'), name)
      # kept, so that `find` is asked once for each name
      setattr(sys.modules[package], name, value)
      return value
    if name in known_modules:
      return importlib.import_module(f'{package}.{name}')
    raise AttributeError(f'module {package!r} has no attribute {name!r}')

  def names() -> list[str]:
    return sorted({*vars(sys.modules[package]), *modules, *known_modules})

  return find, names
