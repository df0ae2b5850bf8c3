"""Scripts and configurations as modules."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def load_module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
