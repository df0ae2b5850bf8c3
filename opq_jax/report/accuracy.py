"""Accuracy of a classifier, its agreement with another, and the confidence of a sample."""

import math
import statistics

import numpy as np
import scipy.special
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
