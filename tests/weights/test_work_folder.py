"""The work of a run that is killed: whose it is, and what becomes of damaged work."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from opq_jax.core import files
from opq_jax.weights import carried_files, open_folder
from opq_jax.weights.work_folder import Work
from tests.helpers.model_folders import llama_tensors, write_folder


def test_work_of_another_plan_is_not_used(tmp_path):
  with Work(tmp_path / 'net.opq') as own:
    own.open({'bits': 3}).save_streams(1, {'first': np.zeros(2)})
    assert own.open({'bits': 3}).done == 1
    assert own.open({'bits': 4}).done == 0


def test_work_is_of_one_run_at_a_time(tmp_path):
  pytest.importorskip('fcntl')
  output = tmp_path / 'net.opq'
  with Work(output) as first, Work(output) as second:
    first.open({'rate': 8}).save_streams(1, {'first': np.zeros(2)})
    with pytest.raises(ValueError, match=r'net\.opq\.blocks: found the work of a run that has not'):
      second.open({'rate': 16})
  # the system unlocks what a killed process held
  command = (
    'import os, signal, sys; from opq_jax.weights.work_folder import Work; '
    'work = Work(sys.argv[1]); work.open({"rate": 8}); os.kill(os.getpid(), signal.SIGKILL)'
  )
  killed = subprocess.run([sys.executable, '-c', command, output], check=False)
  assert killed.returncode == -signal.SIGKILL
  with Work(output) as third:
    work = third.open({'rate': 8})
    assert work.done == 1
    work.remove()
  # a folder made anew in the place of one that was removed
  with Work(output) as last:
    assert last.open({'rate': 8}).done == 0


def test_work_that_ends_while_another_run_opens_it(tmp_path, monkeypatch):
  """The other run has removed its folder between our finding it and our opening it."""
  output, open_folder, left = tmp_path / 'net.opq', os.open, ['once']

  def removed_before(path, *options):
    if os.fspath(path).endswith('.blocks') and left:
      os.rmdir(path)
      left.clear()
    return open_folder(path, *options)

  with Work(output) as own:
    monkeypatch.setattr(os, 'open', removed_before)
    assert own.open({'rate': 8}).done == 0
    assert not left and (tmp_path / 'net.opq.blocks' / 'plan.json').is_file()


def test_work_without_locks(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'fcntl', None)
  with Work(tmp_path / 'net.opq') as first, Work(tmp_path / 'net.opq') as second:
    first.open({'rate': 8}).save_streams(1, {'first': np.zeros(2)})
    assert second.open({'rate': 8}).done == 1


def test_folder_of_somebody_else_is_left_alone(tmp_path):
  (tmp_path / 'net.opq.blocks').mkdir()
  (tmp_path / 'net.opq.blocks' / 'mine.txt').write_text('mine')
  with pytest.raises(ValueError, match='expected an empty one or none'):
    Work(tmp_path / 'net.opq').open({})
  assert (tmp_path / 'net.opq.blocks' / 'mine.txt').read_text() == 'mine'


@pytest.mark.parametrize(
  ('name', 'data'), [('streams.npz', b''), ('streams.npz', b'PK\x03\x04'), ('plan.json', b'\xff')]
)
def test_damaged_work_begins_anew(tmp_path, name, data):
  own = Work(tmp_path / 'net.opq')
  work = own.open({'bits': 3})
  work.save_block(0, {'codes': np.arange(3)})
  work.save_streams(1, {'first': np.zeros(2)})
  (work.path / name).write_bytes(data)
  names = contextlib.nullcontext()
  if name == 'streams.npz':
    names = pytest.warns(UserWarning, match='streams.npz: found it damaged')
  with names:
    assert own.open({'bits': 3}).done == 0
  assert [child.name for child in work.path.iterdir()] == ['plan.json']
  work.save_block(0, {'codes': np.arange(3)})
  (work.path / 'block_00000.npz').write_bytes(b'PK')
  with pytest.raises(ValueError, match=r'block_00000.npz: expected codes of .*delete .*net'):
    work.load(0, 'codes')
  own.close()


def test_work_behind_a_link(tmp_path):
  """Such as to a larger disk: the work is removed, the link stays."""
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'net.opq.blocks').symlink_to(tmp_path / 'elsewhere')
  with Work(tmp_path / 'net.opq') as own:
    work = own.open({'bits': 3})
    work.save_block(0, {'codes': np.arange(3)})
    assert [child.name for child in (tmp_path / 'elsewhere').iterdir()] != []
    work.remove()
  assert list((tmp_path / 'elsewhere').iterdir()) == []
  assert (tmp_path / 'net.opq.blocks').is_symlink()


@pytest.mark.parametrize('output', ['net.opq', 'net', 'net.safetensors'])
def test_killed_work_is_not_carried(tmp_path, output):
  """Of any output: what is done lies in the model folder that the next run reads."""
  folder = write_folder(tmp_path / 'llama', llama_tensors(), 1)
  own = Work(folder / output)
  own.open({'bits': 3}).save_block(0, {'codes': np.arange(3)})
  own.close()
  (folder / 'mine.blocks').mkdir()
  (folder / 'mine.blocks' / 'plan.json').write_text('{}')
  (folder / 'mine.blocks' / 'text.txt').write_text('mine')
  carried = carried_files(open_folder(folder))
  assert f'{output}.blocks/' in carried.left_out
  assert [name for name in carried.files if 'blocks' in name] == [
    'mine.blocks/plan.json',
    'mine.blocks/text.txt',
  ]


def test_files_of_somebody_else_in_work_stay(tmp_path):
  with Work(tmp_path / 'net.opq') as own:
    work = own.open({'bits': 3})
    (work.path / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='expected an empty one or none'):
      own.open({'bits': 4})
    own.open({'bits': 3}).remove()
  assert [child.name for child in work.path.iterdir()] == ['mine.txt']
