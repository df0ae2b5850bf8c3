"""Optional packages, imported by the function that needs them."""

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
  """Imports an optional module.

  Args:
    module: the full name of the module, such as `'matplotlib.figure'`.
    extra: the extra of `opq_jax` that installs it.
    purpose: the file or the feature that needs it, for the message.

  Raises:
    ValueError: the module is not installed; the message names the extra.

  >>> require('no_such_module', 'plots', 'net.png')
  Traceback (most recent call last):
  ValueError: net.png: needs no_such_module, found no such package: pip install opq_jax[plots]
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition('.')[0]
    raise ValueError(
      f'{purpose}: needs {package}, found no such package: pip install opq_jax[{extra}]'
    ) from error
