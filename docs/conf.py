"""Configuration of the documentation: `sphinx-build -W -q -b html docs OUT`."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import api_docstrings  # noqa: E402

import opq_jax  # noqa: E402

project = 'opq_jax'
author = 'The opq_jax authors'
copyright = author
version = release = opq_jax.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.viewcode',
]
exclude_patterns = ['_build', 'jupyter_execute']
html_theme = 'furo'
html_title = f'opq_jax {release}'
html_static_path: list[str] = []

myst_enable_extensions = ['amsmath', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3

# the notebooks run in every build, and an error in one of them is an error of the build
nb_execution_mode = 'force'
nb_execution_timeout = 300  # seconds a cell; both notebooks take well below a minute on two cores
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # shapes and dtypes stand in the docstrings, readable

# every reference must resolve, but for those to other projects, which a build without a network
# cannot look up
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!opq_jax).*')]


def setup(app):
  api_docstrings.setup(app)
