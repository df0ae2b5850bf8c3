"""Writes that are killed, run out of disk or are not allowed leave the old file, or the new one."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import opq_jax
from experiments.benchmarks import killed_writes
from opq_jax import cli, files

OLD, NEW = b'old', bytes(50_000)


@contextlib.contextmanager
def small_disk(size):
  """No file grows beyond `size` bytes: what a full disk does, without one."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only_folder():
  """A folder with an old file that this process, even root's, may not change."""
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


def test_a_full_disk_leaves_the_old_file(tmp_path):
  path = tmp_path / 'net.opq'
  files.write_bytes(path, OLD)
  with small_disk(10_000), pytest.raises(OSError, match=r"File too large: '.*/net\.opq'") as caught:
    files.write_bytes(path, NEW)
  assert caught.value.errno == errno.EFBIG
  assert path.read_bytes() == OLD and os.listdir(tmp_path) == ['net.opq']
  files.write_bytes(path, NEW)
  assert path.read_bytes() == NEW and os.listdir(tmp_path) == ['net.opq']


def test_a_read_only_folder_leaves_the_old_file():
  denied = pytest.raises(PermissionError, match=r"Permission denied: '.*/net\.opq'")
  with read_only_folder() as folder, denied:
    files.write_bytes(f'{folder}/net.opq', NEW)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
  (tmp_path / 'net.opq').mkdir()
  with pytest.raises(IsADirectoryError, match=r"'.*/net\.opq'"):
    files.write_bytes(tmp_path / 'net.opq', NEW)
  with pytest.raises(FileNotFoundError, match=r"'.*/no/net\.opq'"):
    files.write_bytes(tmp_path / 'no' / 'net.opq', NEW)
  assert os.listdir(tmp_path) == ['net.opq']


def test_the_command_says_in_one_line_what_is_full_or_not_allowed(tmp_path, capfd):
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


def test_names_of_every_length_are_written(tmp_path):
  path = tmp_path / ('n' * 251 + '.opq')
  files.write_bytes(path, NEW)
  assert path.read_bytes() == NEW


def test_what_killed_writes_left_is_removed_and_what_others_write_is_not(tmp_path):
  pytest.importorskip('fcntl')
  path = tmp_path / 'net.opq'
  command = (
    'import os, signal, sys; from opq_jax import files; '
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
    assert files._is_locked(file)  # as a process does that still writes
    files.write_bytes(path, OLD)
    assert left.exists()
  files.write_bytes(tmp_path / 'other.opq', OLD)
  assert left.exists()
  files.write_bytes(path, NEW)
  assert not left.exists() and path.read_bytes() == NEW


def test_kills_leave_the_old_file_or_the_new_one(tmp_path):
  found = killed_writes.killed('save', tmp_path, 2)
  assert found['first'] + found['second'] == found['kills'] == 2
  assert found['damaged'] == found['missing'] == found['parts left at last'] == 0


def test_an_old_file_is_not_opened_for_writing(tmp_path):
  # a reader that has it open keeps what it reads
  path = tmp_path / 'net.opq'
  data = {'a': np.arange(300_000, dtype=np.float32)}
  state = opq_jax.CompressionState({'a': None})
  opq_jax.save(path, data, state)
  with opq_jax.OpqFile(path) as file:
    opq_jax.save(path, {'a': np.zeros(3)}, state)
    np.testing.assert_array_equal(file['a'], data['a'])
