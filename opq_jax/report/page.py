"""Writes the report of a file as one HTML page, which needs no network and no server.

The page has the descriptions as JSON, the module that draws them (`page_parts/drawing.mjs`), and
the decoder of files (`javascript/opq.mjs`), so that it shows files that are dropped on it as well.
Its security policy admits these scripts and styles by their hashes, and nothing else: no requests,
and no script in a name.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any

from opq_jax.report import tables
from opq_jax.report.descriptions import Description

_EXPORT = re.compile(r'^export (?=(?:async )?function (\w+))', re.MULTILINE)
_NEVER_IN_SCRIPTS = re.compile(r'</script|<!--', re.IGNORECASE)

_START = """\
const given = JSON.parse(document.getElementById('descriptions').textContent);
drawing.start(given, async (file, progress) => {
  const bytes = await file.arrayBuffer();
  const about = {name: file.name, bytes: bytes.byteLength};
  return description.describe(decoder.openOpq(bytes), about, progress);
});
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div class="page">
<form>
<label>Open an .opq file <input type="file" id="file" accept=".opq" multiple></label>
<label><input type="checkbox" id="beside"> beside the first one shown</label>
<p>Or drop one here, or two. This page reads them itself: nothing leaves your machine.</p>
<p id="status" role="status"></p>
<p id="alert" role="alert"></p>
</form>
<noscript><p>This page draws with JavaScript, which is off in this browser.</p></noscript>
<main id="shown"></main>
</div>
<script type="application/json" id="descriptions">{descriptions}</script>
<script>{script}</script>
</body>
</html>
"""


def html_page(description: Description, other: Description | None = None) -> str:
  """Returns one self-contained HTML page that shows a file, or two side by side.

  Args:
    description: of a file, by `file_description`.
    other: of a second file, which is compared with the first leaf by leaf.

  Returns:
    The page, to be written as UTF-8.  Names and metadata of the files are data in it, and never
    markup.

  >>> import jax, opq_jax
  >>> params = {'</script>': jax.random.laplace(jax.random.key(0), (64, 32))}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> data = opq_jax.file.serialize(network.params, network.state)
  >>> page = html_page(opq_jax.report.file_description(data, name='net.opq'))
  >>> page.count('</script>'), '<title>net.opq</title>' in page
  (2, True)
  """
  given = [description] if other is None else [description, other]
  title = ' and '.join(tables.visible(one['name']) for one in given)
  script, style = _script(), _part('page_parts', 'page.css')
  policy = (
    f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
    "base-uri 'none'; form-action 'none'"
  )
  return _PAGE.format(
    policy=policy,
    title=html.escape(title),
    style=style,
    descriptions=_json(given),
    script=script,
  )


def _json(value: Any) -> str:
  """Returns JSON that no HTML parser takes for markup."""
  text = json.dumps(value, separators=(',', ':'), allow_nan=False)
  return text.replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')


def _script() -> str:
  """Returns the modules as functions of one script: a page without a server has no imports."""
  modules = {
    'decoder': _part('javascript', 'opq.mjs'),
    'description': _part('page_parts', 'description.mjs'),
    'drawing': _part('page_parts', 'drawing.mjs'),
  }
  parts = ["(() => {\n'use strict';\n"]
  for name, code in modules.items():
    names = ', '.join(_EXPORT.findall(code))
    parts.append(f'const {name} = (() => {{\n{_EXPORT.sub("", code)}return {{{names}}};\n}})();\n')
  script = ''.join([*parts, _START, '})();\n'])
  if found := _NEVER_IN_SCRIPTS.search(script):
    raise ValueError(f'page_parts: found {found[0]!r} in a script, expected none')
  return script


def _part(folder: str, name: str) -> str:
  place = importlib.resources.files('opq_jax.report') / folder / name
  return place.read_text(encoding='utf-8')


def _source(text: str) -> str:
  """Returns the source of a policy that admits this text alone."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"
