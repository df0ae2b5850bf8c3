"""A language model over two hosts, each with a part of every kernel: killed, and resumed on one."""

import contextlib

import jax
import numpy as np
import pytest

from tests.helpers import fsdp, processes

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture(scope='module')
def resumed(tmp_path_factory):
  """The weights after two processes of two devices were killed, and one of two devices went on."""
  folder, port = tmp_path_factory.mktemp('run'), processes.free_port()
  arguments = [('-m', 'tests.helpers.fsdp', folder, index, 2, port, STEPS) for index in range(2)]
  with contextlib.ExitStack() as stack:
    both = [
      stack.enter_context(processes.start(*own, devices=2, is_killed=True)) for own in arguments
    ]
    for process in both:
      process.wait_for_line(3)
    for process in both:
      process.kill()
  return fsdp.main(folder, 0, 1, None, STEPS, devices=jax.devices()[:2])


def test_two_hosts_killed_and_resumed_on_one_end_alike(resumed, tmp_path):
  undisturbed = fsdp.main(tmp_path, 0, 1, None, STEPS, devices=jax.devices()[:1])
  leaves, expected = jax.tree.leaves(resumed), jax.tree.leaves(undisturbed)
  assert len(leaves) == len(expected) > 8
  for found, leaf in zip(leaves, expected, strict=True):
    # sums over devices have another order
    np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5)
  start = fsdp.main(tmp_path / 'start', 0, 1, None, 0, devices=jax.devices()[:1])
  moved = [np.abs(a - b).max() for a, b in zip(leaves, jax.tree.leaves(start), strict=True)]
  assert min(moved) > 1e-3  # every leaf was trained
