"""Two processes of one device each are one process of two, bit for bit, and stop together."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / 'helpers/many_processes.py'


def start(kind, folder, index, count, port):
  environment = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': str(2 // count),
    'PYTHONPATH': os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get('PYTHONPATH', '')]),
  }
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), kind, str(folder), str(index), str(count), str(port)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port():
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]


@pytest.mark.parametrize('kind', ['pmap', 'shard_map'])
def test_two_processes_are_one_with_two_devices(kind, tmp_path):
  for count in (1, 2):
    port = free_port()
    processes = [start(kind, tmp_path, index, count, port) for index in range(count)]
    for process in processes:
      _, complaint = process.communicate(timeout=300)
      assert process.returncode == 0, complaint
  one, two = (np.load(tmp_path / f'{kind}_{count}.npz') for count in (1, 2))
  with one, two:
    assert len(one.files) == len(two.files) > 10
    for name in one.files:
      np.testing.assert_array_equal(one[name], two[name])


def test_after_sigterm_of_one_all_save_the_same_step_and_exit_with_0(tmp_path):
  port = free_port()
  processes = [start('sigterm', tmp_path, index, 2, port) for index in range(2)]
  # Gloo has something to say first
  assert any(line.strip().isdigit() for line in processes[1].stdout)
  processes[1].terminate()
  last = []
  for process in processes:
    output, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    last.append(output.split()[-1])
  assert last[0] == last[1]
  assert (tmp_path / 'sigterm_2' / last[0] / 'train').exists()
