"""Training losses: from logits to one number an example."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Loss = Callable[[Float[Array, '*batch classes'], Mapping[str, Array]], Float32[Array, '*batch']]
"""(logits, batch) -> the loss of every example."""


def classification_loss(
  *, label_smoothing: float = 0.0, distillation: float = 0.0, temperature: float = 4.0
) -> Loss:
  """Makes the cross-entropy with smoothed labels, mixed with distillation from a teacher.

  With logits z of the network and u of the teacher, K classes, the label y, smoothing s,
  temperature T, the share a of distillation, and p = softmax(z):

      loss = (1 - a) sum_k t_k (-log p_k)  +  a T^2 KL(softmax(u / T) || softmax(z / T)),
      t_k  = (1 - s) [k = y] + s / K

  The factor T^2 keeps the size of the second term's gradient independent of T (Hinton, Vinyals,
  Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531).

  Args:
    label_smoothing: s, 0 ... 1.
    distillation: a, 0 ... 1; above 0 the batch must hold `teacher_logits`, which
      `opq_jax.finetuning.train_step` adds when it is given a teacher.
    temperature: T, positive.

  Returns:
    A function (logits, batch) -> the loss of every example, float32, in nats; `batch['label']` are
    whole numbers.

  Raises:
    ValueError: an argument is out of range; or, when the loss is called, there is no teacher.

  >>> loss = classification_loss(label_smoothing=0.1)
  >>> loss(jnp.zeros((2, 10)), {'label': jnp.array([3, 4])}).round(4).tolist()  # log 10
  [2.3025999069213867, 2.3025999069213867]
  """
  for name, value in (('label_smoothing', label_smoothing), ('distillation', distillation)):
    if not 0 <= value <= 1:
      raise ValueError(f'{name}: found {value}, expected 0 ... 1')
  if not temperature > 0:
    raise ValueError(f'temperature: found {temperature}, expected a positive number')

  def loss(
    logits: Float[Array, '*batch classes'], batch: Mapping[str, Array]
  ) -> Float32[Array, '*batch']:
    logits = logits.astype(jnp.float32)
    targets = jax.nn.one_hot(batch['label'], logits.shape[-1], dtype=jnp.float32)
    targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[-1]
    cross_entropy = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    if not distillation:
      return cross_entropy
    if 'teacher_logits' not in batch:
      raise ValueError(f'batch: found {sorted(batch)}, expected teacher_logits too: no teacher?')
    student = jax.nn.log_softmax(logits / temperature)
    teacher = jax.nn.log_softmax(batch['teacher_logits'].astype(jnp.float32) / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return (1 - distillation) * cross_entropy + distillation * temperature**2 * divergence

  return loss
