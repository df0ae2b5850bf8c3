import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

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


def answers(images, gained, lost):
  index = np.arange(images)
  return index >= lost, (index < lost) | (index >= lost + gained)


@pytest.mark.parametrize('images, gained, lost', [(200, 3, 10), (500, 40, 12), (60, 0, 7)])
def test_paired_limits_are_rejected_at_5_percent(images, gained, lost):
  found = accuracy.paired(*answers(images, gained, lost))
  assert (found.gained, found.lost) == (gained, lost)
  assert found.difference == pytest.approx((gained - lost) / images)
  for delta in (found.low, found.high):
    # most likely chances of a loss and a gain that are delta apart, by search
    def unlikely(loss, delta=delta):
      cells = np.array([gained, lost, images - gained - lost])
      chances = np.array([loss + delta, loss, 1 - 2 * loss - delta])
      return -np.sum(scipy.special.xlogy(cells, np.maximum(chances, 1e-300)))

    bounds = max(0.0, -delta), (1 - delta) / 2
    options = {'xatol': 1e-12}
    loss = scipy.optimize.minimize_scalar(unlikely, bounds=bounds, options=options).x
    variance = (2 * loss + delta - delta**2) / images
    score = (found.difference - delta) / np.sqrt(variance)
    assert 2 * scipy.stats.norm.sf(abs(score)) == pytest.approx(0.05, abs=1e-4)


def test_paired_p_value_is_of_the_sign_test():
  found = accuracy.paired(*answers(100, 2, 9))
  by_hand = 2 * scipy.stats.binom.cdf(2, 11, 0.5)
  assert found.p_value == pytest.approx(by_hand)


def test_paired_of_equal_answers_has_an_interval():
  found = accuracy.paired(*answers(500, 0, 0))
  # the score interval of a share of 0 in 500
  expected = accuracy.interval(0, 500)[1]
  assert (found.low, found.high) == pytest.approx((-expected, expected))
  assert found.p_value == 1.0


def test_paired_refuses_other_numbers_of_images():
  with pytest.raises(ValueError, match='found 3 and 4 answers, expected as many'):
    accuracy.paired(np.ones(3, bool), np.ones(4, bool))
