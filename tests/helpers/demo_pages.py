"""The demonstration page in Chromium, from a server on this machine."""

import contextlib
import functools
import http.server
import json
import threading

import numpy as np

from tests.helpers import chromium


class _Handler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@contextlib.contextmanager
def opened(folder, profile):
  """Yields a `chromium.Page` on which the network of the page in a folder is ready."""
  handler = functools.partial(_Handler, directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      with chromium.opened(profile) as page:
        page.open(f'http://127.0.0.1:{server.server_address[1]}/index.html')
        page.wait('document.body.dataset.ready || document.getElementById("alert").textContent')
        alert = page.value('document.getElementById("alert").textContent')
        assert not alert, (alert, page.messages)
        yield page
    finally:
      server.shutdown()
      thread.join()


def answer(page, path, give=None):
  """Gives the page a picture; returns the logits, and the pixels that the network sees."""
  (give or functools.partial(page.choose, '#picture'))(path)
  page.wait(f'document.body.dataset.shown === {json.dumps(path.name)}')
  found = page.value('window.answer')
  pixels = np.array(found['pixels'], np.uint8)
  side = round((pixels.size / 3) ** 0.5)
  return np.array(found['logits'], np.float32), pixels.reshape(side, side, 3)


def seconds(page):
  """The times that the page shows, in seconds by step."""
  rows = '[...document.querySelectorAll("#seconds tr")]'
  return {
    name: float(time)
    for name, time in page.value(f'{rows}.map((row) => [...row.cells].map((c) => c.textContent))')
  }
