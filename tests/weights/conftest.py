import pytest

from tests.helpers import weight_trees


@pytest.fixture(params=['checkpoint', 'steps'])
def orbax_folder(request, tmp_path):
  """A folder of `weight_trees.large_nested_tree`: a checkpoint, or the steps of a manager."""
  save = {
    'checkpoint': weight_trees.save_orbax_checkpoint,
    'steps': weight_trees.save_orbax_steps,
  }[request.param]
  save(tmp_path / 'net')
  return tmp_path / 'net'
