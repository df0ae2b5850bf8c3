"""Two processes of one device each equal one process of two, bit for bit, and stop together."""

import numpy as np
import pytest

from tests.helpers import many_processes, processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The folder that one process and two wrote, and the last step of each after SIGTERM of one."""
  folder = tmp_path_factory.mktemp('runs')
  many_processes.main(folder, index=0, count=1)
  port = processes.free_port()
  both = [
    processes.start('-m', 'tests.helpers.many_processes', folder, index, 2, port, devices=1)
    for index in range(2)
  ]
  both[1].wait_for_line(3)
  both[1].terminate()
  return folder, [process.finish().split()[-1] for process in both]


@pytest.mark.parametrize('kind', ['pmap', 'shard_map'])
def test_two_processes_equal_one(kind, runs):
  folder, _ = runs
  one, two = (np.load(folder / f'{kind}_{count}.npz') for count in (1, 2))
  with one, two:
    assert len(one.files) == len(two.files) > 10
    for name in one.files:
      np.testing.assert_array_equal(one[name], two[name])


def test_sigterm_of_one_process_stops_all(runs):
  folder, last = runs
  assert last[0] == last[1]
  assert (folder / 'sigterm' / last[0] / 'train').exists()
