"""Headless Chromium, driven by its DevTools protocol through two pipes: no package is needed."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess

import pytest

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser')
needs_chromium = pytest.mark.skipif(
  PROGRAM is None, reason='found no chromium, expected Chromium to open pages'
)
KEYS = {'Tab': 9, 'Enter': 13, ' ': 32}


class Page:
  """A tab of the browser.

  Attributes:
    messages: errors that the page has thrown, and what it has written to the console.
  """

  def __init__(self, send, receive):
    self._send, self._receive = send, receive
    self._number, self._session = 0, None
    self.messages = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
    self._session = attached['sessionId']
    for domain in ('Page', 'Runtime', 'DOM', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method, **params):
    """Calls a method of the protocol, and returns its result."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session is not None:
      message['sessionId'] = self._session
    self._send(message)
    while (answer := self._next()).get('id') != self._number:
      pass
    assert 'error' not in answer, (method, answer['error'])
    return answer['result']

  def _next(self):
    answer = self._receive()
    if answer.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded'):
      self.messages.append(answer['params'])
    return answer

  def open(self, address):
    """Opens a file, or an address of a server, and waits until it is loaded."""
    url = address if str(address).startswith('http:') else pathlib.Path(address).as_uri()
    self.call('Page.navigate', url=url)
    self.wait('document.readyState === "complete" && location.protocol !== "about:"')

  def value(self, expression):
    """Returns the value of an expression, of a promise what it resolves to."""
    result = self.call(
      'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
    )
    assert 'exceptionDetails' not in result, (expression, result['exceptionDetails'])
    return result['result'].get('value')

  def wait(self, expression, seconds=60):
    """Waits in the page until an expression holds."""
    code = f"""new Promise((resolve) => {{
      const end = Date.now() + {1000 * seconds};
      const look = () => {{
        const holds = Boolean({expression});
        if (holds || Date.now() > end) resolve(holds);
        else setTimeout(look, 20);
      }};
      look();
    }})"""
    assert self.value(code), expression

  def press(self, key):
    """Presses a key on whatever has the focus."""
    what = {'key': key, 'windowsVirtualKeyCode': KEYS[key], 'code': 'Space' if key == ' ' else key}
    text = {'Enter': '\r', ' ': ' '}.get(key)
    self.call('Input.dispatchKeyEvent', type='keyDown', **what, **({'text': text} if text else {}))
    self.call('Input.dispatchKeyEvent', type='keyUp', **what)

  def choose(self, selector, *paths):
    """Chooses files in an input."""
    root = self.call('DOM.getDocument')['root']['nodeId']
    node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
    self.call('DOM.setFileInputFiles', nodeId=node, files=[str(path) for path in paths])

  def drop(self, *paths):
    """Drops files on the page, as from a folder."""
    data = {'items': [], 'files': [str(path) for path in paths], 'dragOperationsMask': 1}
    for kind in ('dragEnter', 'dragOver', 'drop'):
      self.call('Input.dispatchDragEvent', type=kind, x=200, y=200, data=data)

  def look(self, width, height=900, scheme='light'):
    """Sets the width of the page in pixels, and light or dark."""
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    features = [{'name': 'prefers-color-scheme', 'value': scheme}]
    self.call('Emulation.setEmulatedMedia', features=features)

  def picture(self, path):
    """Writes the whole page as PNG."""
    shot = self.call('Page.captureScreenshot', captureBeyondViewport=True)
    pathlib.Path(path).write_bytes(base64.b64decode(shot['data']))


@contextlib.contextmanager
def opened(folder):
  """Yields a `Page` of a new browser, whose profile is in a folder, and ends the browser."""
  to_browser, commands = os.pipe()
  answers, from_browser = os.pipe()
  options = [
    *('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'),
    *('--no-first-run', '--disable-extensions', '--disable-background-networking'),
    *('--disable-component-update', '--remote-debugging-pipe', f'--user-data-dir={folder}'),
  ]
  # the protocol is on the descriptors 3 and 4
  shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
  command = ['bash', '-c', shell, 'bash', PROGRAM, *options]
  browser = subprocess.Popen(
    command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
  )
  os.close(to_browser)
  os.close(from_browser)
  with open(commands, 'wb', buffering=0) as writer, open(answers, 'rb') as reader:
    buffer = bytearray()

    def send(message):
      writer.write(json.dumps(message).encode() + b'\0')

    def receive():
      while b'\0' not in buffer:
        data = os.read(reader.fileno(), 1 << 16)
        assert data, 'found that the browser has ended, expected an answer'
        buffer.extend(data)
      message, _, rest = bytes(buffer).partition(b'\0')
      buffer[:] = rest
      return json.loads(message)

    try:
      yield Page(send, receive)
    finally:
      browser.terminate()
      browser.wait(30)
