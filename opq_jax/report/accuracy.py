"""Accuracy of a classifier, its agreement with another, and the confidence of a sample."""

import math
import statistics
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float, Integer


def hits(
  logits: Float[np.ndarray, 'images classes'], labels: Integer[np.ndarray, ' images'], k: int = 1
) -> Bool[np.ndarray, ' images']:
  """Returns for each image whether its label is among the k largest logits.

  Of equal logits the first counts as the largest.

  >>> logits = np.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]])
  >>> hits(logits, np.array([2, 1])).tolist(), hits(logits, np.array([2, 1]), k=2).tolist()
  ([False, False], [True, True])
  """
  ranking = np.argsort(-logits, axis=-1, kind='stable')
  return (ranking[:, :k] == labels[:, None]).any(axis=-1)


def scores(
  logits: Float[np.ndarray, 'images classes'],
  labels: Integer[np.ndarray, ' images'],
  reference: Float[np.ndarray, 'images classes'],
) -> dict[str, float]:
  """Returns accuracy, its confidence interval, and the agreement with the float network.

  Args:
    logits: logits of the compressed network.
    labels: the right classes.
    reference: logits of the float network for the same images.

  Returns:
    `top1`, `top1_low`, `top1_high` (95 % interval), `top5` and `agreement` (the compressed and the
    float network choose one class), as shares of the images, and `divergence` in nats.

  >>> logits = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
  >>> scores(logits, np.array([1, 1]), reference=logits)['top1']
  0.5
  """
  right = hits(logits, labels)
  low, high = interval(int(right.sum()), len(labels))
  return {
    'top1': float(right.mean()),
    'top1_low': low,
    'top1_high': high,
    'top5': float(hits(logits, labels, k=5).mean()),
    'agreement': float(hits(logits, reference.argmax(axis=-1)).mean()),
    'divergence': divergence(logits, reference),
  }


def divergence(
  logits: Float[np.ndarray, 'images classes'], reference: Float[np.ndarray, 'images classes']
) -> float:
  """Returns the mean over images of KL(reference || logits) of the class probabilities, in nats.

  Args:
    logits: logits of the compressed network.
    reference: logits of the float network for the same images.

  >>> divergence(np.log([[0.5, 0.5]]), np.log([[0.5, 0.5]]))
  0.0
  """
  log_p, log_q = (scipy.special.log_softmax(x, axis=-1) for x in (reference, logits))
  return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
  """Returns Wilson's confidence interval of a binomial share, valid near 0 and 1 too.

  E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

  Args:
    hits: number of successes.
    trials: number of trials.
    confidence: probability that the interval covers the share.

  >>> low, high = interval(181, 200)
  >>> round(low, 3), round(high, 3)
  (0.856, 0.938)
  """
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
  share, weight = hits / trials, z * z / trials
  middle = share + weight / 2
  radius = z * math.sqrt(share * (1 - share) / trials + weight / trials / 4)
  return max((middle - radius) / (1 + weight), 0.0), min((middle + radius) / (1 + weight), 1.0)


class Paired(NamedTuple):
  """Two classifiers compared on the same images.

  Attributes:
    gained: images that the classifier alone has right.
    lost: images that the reference alone has right.
    difference: share of images that the classifier has right, less that of the reference.
    low, high: confidence interval of the difference.
    p_value: of McNemar's exact test that both are right equally often.
  """

  gained: int
  lost: int
  difference: float
  low: float
  high: float
  p_value: float


def paired(
  is_right: Bool[np.ndarray, ' images'],
  reference_is_right: Bool[np.ndarray, ' images'],
  confidence: float = 0.95,
) -> Paired:
  """Compares the accuracy of two classifiers by the images on which only one of them is right.

  Images that both have right, or both wrong, do not enter the variance of the difference, so the
  interval is much narrower than those of the two accuracies.  It is Tango's score interval, which
  holds for few images and for differences near 0 too.

  T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
  paired-sample design", Statistics in Medicine 1998.  Q. McNemar, "Note on the sampling error of
  the difference between correlated proportions or percentages", Psychometrika 1947.

  Args:
    is_right: whether the classifier has each image right.
    reference_is_right: the same of the reference.
    confidence: probability that the interval covers the difference.

  Raises:
    ValueError: the classifiers were judged on different numbers of images, or on none.

  >>> images = np.arange(200)
  >>> right, reference = images >= 10, images < 197  # 3 gained, 10 lost
  >>> found = paired(right, reference)
  >>> found.gained, found.lost, round(found.low, 3), round(found.high, 3)
  (3, 10, -0.077, 0.0)
  """
  if len(is_right) != len(reference_is_right) or not len(is_right):
    raise ValueError(
      f'images: found {len(is_right)} and {len(reference_is_right)} answers, expected as many of '
      'both, and one or more'
    )
  images = len(is_right)
  gained = int((is_right & ~reference_is_right).sum())
  lost = int((~is_right & reference_is_right).sum())
  difference = (gained - lost) / images
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)

  def excess(delta: float, sign: int) -> float:
    # the most likely chance of a loss, given that the difference is delta
    linear = (2 * images - gained + lost) * delta - gained - lost
    root = math.sqrt(max(linear**2 + 8 * images * lost * delta * (1 - delta), 0.0))
    loss = (root - linear) / (4 * images)
    deviation = math.sqrt(images * max(2 * loss + delta * (1 - delta), 0.0))
    return gained - lost - images * delta + sign * z * deviation

  # the difference itself is a second root where there are no losses or no gains
  apart = 1e-9
  low, high = -1.0, 1.0
  if difference > -1:
    low = float(scipy.optimize.brentq(excess, -1.0, difference - apart, args=(-1,)))
  if difference < 1:
    high = float(scipy.optimize.brentq(excess, difference + apart, 1.0, args=(1,)))
  unequal = gained + lost
  p_value = float(scipy.stats.binomtest(gained, unequal).pvalue) if unequal else 1.0
  return Paired(gained, lost, difference, low, high, p_value)
