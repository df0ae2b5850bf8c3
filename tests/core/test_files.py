"""A write that is killed, refused or out of disk leaves the old file or the new one, whole."""

import contextlib
import errno
import io
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from experiments.benchmarks.robustness import killed_writes
from opq_jax import cli
from opq_jax.core import files

OLD, NEW = b'old', bytes(50_000)


@contextlib.contextmanager
def small_disk(size):
  """Limits every file to `size` bytes, as a full disk would."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only_folder():
  """Yields a folder with an old file that this process, even root's, may not change."""
  with tempfile.TemporaryDirectory(dir='/tmp') as folder:
    user = os.geteuid()
    with open(f'{folder}/net.opq', 'wb') as file:
      file.write(OLD)
    os.chmod(folder, 0o555)
    if user == 0:
      os.seteuid(65534)
    try:
      yield folder
    finally:
      os.seteuid(user)
      os.chmod(folder, 0o755)
      assert os.listdir(folder) == ['net.opq']
      with open(f'{folder}/net.opq', 'rb') as file:
        assert file.read() == OLD


def test_write_on_full_disk(tmp_path):
  path = tmp_path / 'net.opq'
  files.write_bytes(path, OLD)
  with small_disk(10_000), pytest.raises(OSError, match=r"File too large: '.*/net\.opq'") as caught:
    files.write_bytes(path, NEW)
  assert caught.value.errno == errno.EFBIG
  assert path.read_bytes() == OLD and os.listdir(tmp_path) == ['net.opq']
  files.write_bytes(path, NEW)
  assert path.read_bytes() == NEW and os.listdir(tmp_path) == ['net.opq']


def test_write_in_read_only_folder():
  denied = pytest.raises(PermissionError, match=r"Permission denied: '.*/net\.opq'")
  with read_only_folder() as folder, denied:
    files.write_bytes(f'{folder}/net.opq', NEW)


def test_write_names_the_path(tmp_path):
  (tmp_path / 'net.opq').mkdir()
  with pytest.raises(IsADirectoryError, match=r"'.*/net\.opq'"):
    files.write_bytes(tmp_path / 'net.opq', NEW)
  with pytest.raises(FileNotFoundError, match=r"'.*/no/net\.opq'"):
    files.write_bytes(tmp_path / 'no' / 'net.opq', NEW)
  assert os.listdir(tmp_path) == ['net.opq']


def test_write_through_a_link(tmp_path):
  (tmp_path / 'folder').mkdir()
  target = tmp_path / 'folder' / 'net.opq'
  (tmp_path / 'link.opq').symlink_to('folder/net.opq')
  for content in (OLD, NEW):  # nothing is there at first
    files.write_bytes(tmp_path / 'link.opq', content)
    assert target.read_bytes() == content and (tmp_path / 'link.opq').is_symlink()
  assert os.listdir(tmp_path / 'folder') == ['net.opq']


def test_write_keeps_mode(tmp_path):
  path = tmp_path / 'net.opq'
  for mode in (0o640, 0o604):
    path.write_bytes(OLD)
    path.chmod(mode)
    files.write_bytes(path, NEW)
    assert path.read_bytes() == NEW and path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason='found no root, expected one to give files away')
def test_write_keeps_owner(tmp_path):
  path = tmp_path / 'net.opq'
  path.write_bytes(OLD)
  os.chown(path, 12, 34)
  files.write_bytes(path, NEW)
  assert (path.stat().st_uid, path.stat().st_gid) == (12, 34)


def test_nothing_replaces_what_is_no_file(tmp_path, capfd):
  fifo, inet = tmp_path / 'fifo.opq', tmp_path / 'socket.opq'
  os.mkfifo(fifo)
  with socket.socket(socket.AF_UNIX) as bound:
    bound.bind(os.fspath(inet))
    for path, kind in ((fifo, 'FIFO'), (inet, 'socket'), (pathlib.Path(os.devnull), 'device')):
      before = path.lstat()
      with pytest.raises(ValueError, match=f'{path}: found a {kind}, expected the name of a file'):
        files.write_bytes(path, NEW)
      source = stored(tmp_path, 'leaf by leaf')
      assert cli.main(['compress', str(source), str(path)]) == 2
      assert capfd.readouterr().err == f'opq: {path}: found a {kind}, expected the name of a file\n'
      assert path.lstat()[:2] == before[:2]
      source.unlink()


@pytest.mark.parametrize('output', ['-', 'new/'])
def test_output_is_a_file(tmp_path, output, capfd, monkeypatch):
  monkeypatch.chdir(tmp_path)
  source = stored(tmp_path, 'leaf by leaf')
  assert cli.main(['compress', str(source), output]) == 2
  assert 'expected' in capfd.readouterr().err and os.listdir(tmp_path) == [source.name]


def test_standard_output_closed_or_full(tmp_path):
  opq_jax.save(tmp_path / 'a.opq', {'b': np.ones(3)}, opq_jax.CompressionState({'b': None}))
  command = f'"$0" -m opq_jax.cli inspect {tmp_path}/a.opq '
  closed, full = (
    subprocess.run(
      ['sh', '-c', command + where, sys.executable], capture_output=True, text=True, check=False
    )
    for where in ('>&-', '> /dev/full')
  )
  assert (closed.returncode, closed.stderr) == (0, '')
  assert full.returncode == 2
  assert full.stderr == 'opq: standard output: No space left on device\n'


def test_cli_full_disk_in_one_line(tmp_path, capfd):
  weights = {
    'kernel': np.ones((4, 4), np.float32),
    'bias': np.random.default_rng(0).normal(size=9000),
  }
  state = opq_jax.CompressionState(dict.fromkeys(weights))
  opq_jax.save(tmp_path / 'source.opq', weights, state)
  path = tmp_path / 'net.safetensors'
  path.write_bytes(OLD)
  with small_disk(10_000):
    code = cli.main(['decompress', str(tmp_path / 'source.opq'), str(path)])
  assert code == 2
  assert capfd.readouterr().err == f'opq: {path}: File too large\n'
  assert path.read_bytes() == OLD and len(os.listdir(tmp_path)) == 2


class FullDisk(io.FileIO):
  """A file of a disk that has room for `LEFT` bytes of it."""

  LEFT = 10_000

  def write(self, data):
    room = max(self.LEFT - self.tell(), 0)
    if len(data) <= room:
      return super().write(data)
    super().write(memoryview(data)[:room])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITES = 'save', 'in memory', 'leaf by leaf'


def write(kind, source, output):
  """Writes a network of 20 kB of codes and 26 kB of biases."""
  if kind == 'save':
    state = opq_jax.init_state(weights(), opq_jax.allocate(weights()))
    opq_jax.save(output, weights(), state)
  else:
    arguments = ['compress', str(source), str(output)]
    assert cli.main(arguments) == 0


def weights():
  draw = np.random.default_rng(0).laplace
  return {
    'bias': draw(size=8000).astype(np.float32),
    'kernel': draw(size=(512, 100)).astype(np.float32),
  }


def stored(folder, kind):
  """Returns a file of the network's weights, in the format that this way of writing reads."""
  path = folder / ('net.safetensors' if kind == 'leaf by leaf' else 'net.npz')
  if kind == 'leaf by leaf':
    safetensors.numpy.save_file(weights(), path)
  else:
    np.savez(path, **weights())
  os.chmod(path, 0o644)
  return path


@contextlib.contextmanager
def says_what_failed(kind, output, capfd, message):
  """Checks that `save` raises and the command prints the error, with the file's name."""
  if kind == 'save':
    with pytest.raises(OSError, match=f'{message}: .*{output.name}') as caught:
      yield
    assert caught.value.filename == str(output)
  else:
    with pytest.raises(AssertionError):
      yield
    assert capfd.readouterr().err == f'opq: {output}: {message}\n'


# of the streamed parts; of those, and then of the file that they make
@pytest.mark.parametrize('room', [10_000, 30_000])
@pytest.mark.parametrize('kind', WRITES)
@pytest.mark.parametrize('error', ['ENOSPC', 'EFBIG'])
def test_writers_name_full_disk(tmp_path, monkeypatch, capfd, kind, room, error):
  source, output = stored(tmp_path, kind), tmp_path / 'net.opq'
  write(kind, source, output)
  assert output.stat().st_size > 40_000
  capfd.readouterr()
  output.write_bytes(OLD)
  before = sorted(os.listdir(tmp_path))
  message = 'No space left on device' if error == 'ENOSPC' else 'File too large'
  with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
    stack.enter_context(says_what_failed(kind, output, capfd, message))
    if error == 'ENOSPC':
      patch.setattr(FullDisk, 'LEFT', room)
      # what reads is as ever
      full = lambda path, mode: (FullDisk if mode == 'xb' else open)(path, mode)
      patch.setattr(files, 'open', full, raising=False)
      unnamed = tempfile.TemporaryFile

      def full_unnamed(dir):
        with unnamed(dir=dir) as file:
          return FullDisk(os.dup(file.fileno()), 'w+')

      patch.setattr(tempfile, 'TemporaryFile', full_unnamed)
    else:
      stack.enter_context(small_disk(room))
    write(kind, source, output)
  assert output.read_bytes() == OLD and sorted(os.listdir(tmp_path)) == before
  write(kind, source, output)
  assert sorted(os.listdir(tmp_path)) == before and opq_jax.load(output)


@pytest.mark.parametrize('kind', WRITES)
def test_writers_name_read_only_folder(capfd, kind):
  with tempfile.TemporaryDirectory(dir='/tmp') as readable:
    os.chmod(readable, 0o755)
    source = stored(pathlib.Path(readable), kind)
    # what is imported late may be root's own
    write(kind, source, pathlib.Path(readable) / 'net.opq')
    capfd.readouterr()
    with read_only_folder() as folder:
      output = pathlib.Path(folder) / 'net.opq'
      with says_what_failed(kind, output, capfd, 'Permission denied'):
        write(kind, source, output)


def test_cli_unreadable_weights(capfd):
  with tempfile.TemporaryDirectory(dir='/tmp') as readable:
    os.chmod(readable, 0o755)
    source = stored(pathlib.Path(readable), 'leaf by leaf')
    write('leaf by leaf', source, pathlib.Path(readable) / 'net.opq')
    capfd.readouterr()
    os.chmod(source, 0)
    with read_only_folder() as folder:
      assert cli.main(['compress', str(source), f'{folder}/net.opq']) == 2
      assert capfd.readouterr().err == f'opq: {source}: Permission denied\n'


def test_write_long_names(tmp_path):
  path = tmp_path / ('n' * 251 + '.opq')
  files.write_bytes(path, NEW)
  assert path.read_bytes() == NEW


def test_write_removes_litter(tmp_path):
  pytest.importorskip('fcntl')
  path = tmp_path / 'net.opq'
  command = (
    'import os, signal, sys; from opq_jax.core import files; '
    'os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); '
    'files.write_bytes(sys.argv[1], b"new")'
  )
  killed = subprocess.run([sys.executable, '-c', command, path], check=False)
  assert killed.returncode == -9
  (left,) = tmp_path.iterdir()
  files.write_bytes(path, OLD)
  assert left.exists()  # it may be of a process that only just began
  os.utime(left, (1, 1))
  with open(left, 'rb') as file:
    assert files._lock(file)  # as a process does that still writes
    files.write_bytes(path, OLD)
    assert left.exists()
  files.write_bytes(tmp_path / 'other.opq', OLD)
  assert left.exists()
  files.write_bytes(path, NEW)
  assert not left.exists() and path.read_bytes() == NEW


def test_interrupted_folder_is_whole_or_absent(tmp_path):
  # whoever interrupts has begun to remove the folder when the writer moves it to its place
  command = """
import os, sys, threading, time
from opq_jax.core import files, temporaries

def interrupt():
  before = os.unlink
  def unlink(*arguments, **options):
    before(*arguments, **options)
    removing.set()
    time.sleep(0.5)
  os.unlink = unlink
  temporaries.remove_all()
  os._exit(130)

removing = threading.Event()
with files.new_folder(sys.argv[1]) as folder:
  for name in 'abcd':
    (folder / name).write_bytes(b'new')
  threading.Thread(target=interrupt, daemon=True).start()
  removing.wait()
"""
  path = tmp_path / 'out'
  ended = subprocess.run([sys.executable, '-c', command, path], check=False, timeout=60)
  assert ended.returncode == 130
  assert not list(tmp_path.iterdir())


def test_save_survives_kills(tmp_path):
  found = killed_writes.killed('opq_jax.save', tmp_path, 3, unkilled=1)
  assert found['old file'] + found['new file'] == found['kills'] == 3
  assert found['neither'] == found['left after the next write'] == 0


def test_save_spares_open_readers(tmp_path):
  # a reader that has it open keeps what it reads
  path = tmp_path / 'net.opq'
  data = {'a': np.arange(300_000, dtype=np.float32)}
  state = opq_jax.CompressionState({'a': None})
  opq_jax.save(path, data, state)
  with opq_jax.OpqFile(path) as file:
    opq_jax.save(path, {'a': np.zeros(3)}, state)
    np.testing.assert_array_equal(file['a'], data['a'])


def test_new_folder_of_killed_process(tmp_path):
  code = (
    'import os, pathlib, signal, sys; from opq_jax.core import files\n'
    'with files.new_folder(sys.argv[1]) as folder:\n'
    '  (folder / "part").write_bytes(b"half")\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  killed = subprocess.run([sys.executable, '-c', code, tmp_path / 'model'])
  assert killed.returncode == -signal.SIGKILL
  (left,) = tmp_path.iterdir()
  assert left.name.startswith('.opq-') and (left / 'part').read_bytes() == b'half'
  # a minute later the next run removes it, but not what a running process holds
  os.utime(left, (0, 0))
  with files.new_folder(tmp_path / 'model') as folder:
    (folder / 'whole').write_bytes(b'whole')
    os.utime(folder, (0, 0))
    with files.new_folder(tmp_path / 'model'):
      assert folder.is_dir() and not left.exists()
    (tmp_path / 'model').rmdir()
  assert [path.name for path in tmp_path.rglob('*')] == ['model', 'whole']


def test_new_folder_with_errors(tmp_path):
  with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / 'model') as folder:
    (folder / 'part').write_bytes(b'half')
    _ = 1 / 0
  assert not list(tmp_path.iterdir())
  with pytest.raises(OSError, match='none/model'), files.new_folder(tmp_path / 'none' / 'model'):
    pass
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'mine').write_bytes(b'mine')
  for place in ('full', 'full/mine'):
    with pytest.raises(ValueError, match=f'{place}: found a f'), files.new_folder(tmp_path / place):
      pass
  assert (tmp_path / 'full' / 'mine').read_bytes() == b'mine'
