import numpy as np
import pytest

from opq_jax.report import accuracy


def test_scores_top1_and_top5():
  reference = np.eye(4, 10, dtype=np.float32)
  logits = np.tile(np.arange(10, 0, -1, dtype=np.float32), (4, 1))  # every answer is 0, then 1, …
  found = accuracy.scores(logits, np.array([0, 1, 4, 5]), reference)
  assert (found['top1'], found['top5'], found['agreement']) == (0.25, 0.75, 0.25)


def test_interval_is_wilsons():
  assert accuracy.interval(181, 200) == pytest.approx((0.8565, 0.9383), abs=1e-3)
  assert accuracy.interval(0, 200)[0] == 0.0
  assert accuracy.interval(200, 200)[1] == pytest.approx(1.0)


def test_divergence_of_probabilities():
  p, q = (
    np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]),
    np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]),
  )
  expected = (0.5 * np.log(2) - 0.25 * np.log(2)) / 2
  # logits are chances up to a constant of their image
  found = accuracy.divergence(np.log(q) + np.array([[3.0], [-7.0]]), np.log(p))
  assert found == pytest.approx(expected)
