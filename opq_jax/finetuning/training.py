"""Finetuning with the compression frozen: one pure step.

    values   = apply_compression(params, compression_state)      pruned, on the codebook
    loss     = mean over the batch of loss_fn(apply_fn(values, images), batch)
    gradient = straight-through to the latent params, 0 on pruned weights
    params  <- params + optimizer's update

The compression state is an input beside the training state and never an output: no optimizer,
checkpoint or number of devices can change it (Hu et al., AAAI 2021: "nothing is searched or
re-estimated").  `opq_jax.finetuning.parallel` maps the step over devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float32, Int32

from opq_jax.compression import CompressionState, apply_compression, bits_per_weight
from opq_jax.compression import clip_to_grid as clip_gradient
from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.finetuning.batches import Batch, split_batch
from opq_jax.finetuning.evaluation import label_rank
from opq_jax.finetuning.losses import Loss, classification_loss

_STATISTICS = 'batch_stats'

Metrics = dict[str, Float32[Array, '']]


@flax.struct.dataclass
class TrainState:
  """All state that a step changes.

  Attributes:
    step: number of steps taken.
    params: the latent weights.
    batch_stats: BatchNorm's running statistics; an empty dict in a network without BatchNorm.
    opt_state: of the optimizer.
    rng: the random key from which every step derives its own; never changes.
    average: {'params': …, 'batch_stats': …}, exponential moving averages over steps, or None; of
      bfloat16 and other short floats in float32, where its small changes are not rounded away.
  """

  step: Int32[Array, '']
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rng: Array
  average: PyTree


def init_train_state(
  variables: Mapping[str, PyTree],
  optimizer: optax.GradientTransformation,
  key: Array,
  *,
  with_average: bool = False,
) -> TrainState:
  """Makes the state before the first step.

  Args:
    variables: `params`, and `batch_stats` of a network with BatchNorm.
    optimizer: the one that `train_step` is given.
    key: from which every step derives its own.
    with_average: True for a step with `ema_decay`.

  >>> state = init_train_state({'params': {'w': jnp.ones(3)}}, optax.sgd(0.1), jax.random.key(0))
  >>> int(state.step), state.batch_stats, state.average
  (0, {}, None)
  """
  # copies: steps donate their state, and no buffer may be donated twice
  params, batch_stats = jax.tree.map(
    lambda leaf: jnp.array(leaf, copy=True), (variables['params'], variables.get(_STATISTICS, {}))
  )
  average = jax.tree.map(_as_average, {'params': params, _STATISTICS: batch_stats})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    rng=jnp.copy(key),
    average=average if with_average else None,
  )


def kernels(params: PyTree) -> PyTree:
  """Returns a mask for weight decay: True at leaves of two axes or more, not biases or BatchNorm.

      optimizer = optax.chain(optax.add_decayed_weights(1e-4, mask=kernels), optax.sgd(0.01))

  >>> kernels({'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)})
  {'bias': False, 'kernel': True}
  """
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def train_step(
  train_state: TrainState,
  compression_state: CompressionState | None,
  batch: Batch,
  teacher: Mapping[str, PyTree] | None = None,
  *,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  teacher_apply: Callable[..., Any] | None = None,
  loss_fn: Loss | None = None,
  accumulation: int = 1,
  ema_decay: float | None = None,
  clip_to_grid: bool = False,
  price_of_bits: float = 0.0,
  bits_limit: float = 0.0,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[TrainState, Metrics]:
  """Takes one step of any optimizer; a pure function.

  Devices that share `axis_name` average their gradients, running statistics and metrics, so that
  with equal inputs they have equal outputs.  BatchNorm normalises by its device's part of the
  batch, unless the network's BatchNorm has an axis name of its own.

  Args:
    train_state: the latent weights and all other state that changes.
    compression_state: of `train_state.params`; None trains the float network.
    batch: this device's part: {'image': [batch, …], 'label': [batch]} and whatever else `loss_fn`
      reads.  Of a language model, tokens [batch, length] and those that follow them.
    teacher: variables of a network whose logits become `batch['teacher_logits']`, usually the float
      one before compression, or a larger one with `teacher_apply`.
    apply_fn: `model.apply` of a Flax Linen module, or any function called as
      `apply_fn(variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': key})`
      that returns logits and a dict of updates.  Its computation may be in bfloat16
      (`models.create(name, dtype=jnp.bfloat16)`); weights, gradients and updates are in the dtype
      of the params.
    optimizer: see `kernels` for weight decay on kernels alone.
    teacher_apply: the function that computes the teacher's logits, called as
      `teacher_apply(teacher, images, train=False)`; `apply_fn` by default.
    loss_fn: (logits, batch) -> one number an example; by default
      `opq_jax.finetuning.classification_loss()`.
    accumulation: number of equal parts of the batch whose gradients are averaged; only one part
      must fit into memory.  BatchNorm sees one part at a time.
    ema_decay: of `train_state.average`, whose new value is decay * old + (1 - decay) * params;
      None leaves the average as it is.
    clip_to_grid: True to drop gradients that move a weight further beyond the last cell; see
      `opq_jax.compression.clip_to_grid`.
    price_of_bits: p.  With the bits per weight of the codes, b
      (`opq_jax.compression.bits_per_weight`), and their limit l, the loss that is minimised has a
      term p max(b - l, 0), which keeps the file from growing.  The metric `loss` does not count it.
    bits_limit: l.
    axis_name: of the enclosing `pmap` or `shard_map`.

  Returns:
    The next state, and {'loss', 'top1'} averaged over the whole batch.

  Raises:
    ValueError: the compression state was made for another tree; `accumulation` does not divide the
      batch; `ema_decay` is given and there is no average; a number is out of range; an option or
      argument is given without that which reads it; the batch is a padded one (`pad_batch`); or the
      network returns running statistics of another structure.

  >>> def apply_fn(variables, images, train, **_):
  ...   return images @ variables['params']['w'], {}
  >>> optimizer = optax.sgd(0.1)
  >>> state = init_train_state({'params': {'w': jnp.zeros((4, 3))}}, optimizer, jax.random.key(0))
  >>> batch = {'image': jnp.ones((2, 4)), 'label': jnp.array([0, 0])}
  >>> state, metrics = train_step(state, None, batch, apply_fn=apply_fn, optimizer=optimizer)
  >>> int(state.step), round(float(metrics['loss']), 4)  # log 3
  (1, 1.0986)
  """
  if teacher is None and teacher_apply is not None:
    raise ValueError('teacher: found None, expected the variables that teacher_apply takes')
  if teacher is not None and loss_fn is None:
    raise ValueError(
      'loss_fn: found None and a teacher, expected a loss that reads its answers, such as '
      'classification_loss(distillation=0.9)'
    )
  if compression_state is None and (price_of_bits or clip_to_grid):
    option = 'price_of_bits' if price_of_bits else 'clip_to_grid'
    raise ValueError(f'{option}: found it without a compression state, expected both or neither')
  if not price_of_bits and bits_limit:
    raise ValueError(f'bits_limit: found {bits_limit} without a price of bits, expected both')
  # an array, such as a decay that follows the step, may be traced and is not checked
  if isinstance(ema_decay, int | float) and not 0 <= ema_decay < 1:
    raise ValueError(f'ema_decay: found {ema_decay}, expected 0 <= ema_decay < 1')
  if ema_decay is not None and train_state.average is None:
    raise ValueError('average: found None, expected init_train_state(…, with_average=True)')
  if 'is_example' in batch:
    raise ValueError(
      'batch: found is_example of a padded batch, expected a batch of examples alone'
    )
  loss_fn = loss_fn or classification_loss()
  # from the number of the step, so that a run that goes on from a checkpoint draws the same
  # numbers; then from the device, so that dropout differs between parts of the batch
  key = jax.random.fold_in(train_state.rng, train_state.step)
  if axis_name is not None:
    key = jax.random.fold_in(key, lax.axis_index(axis_name))

  def loss(
    params: PyTree, batch_stats: PyTree, part: Batch, key: Array
  ) -> tuple[Float32[Array, ''], tuple[PyTree, Metrics]]:
    values = params if compression_state is None else apply_compression(params, compression_state)
    if teacher is not None:
      teacher_logits = (teacher_apply or apply_fn)(teacher, part['image'], train=False)
      part = {**part, 'teacher_logits': teacher_logits}
    logits, updates = apply_fn(
      _variables(values, batch_stats),
      part['image'],
      train=True,
      mutable=[_STATISTICS],
      rngs={'dropout': key},
    )
    mean = jnp.mean(loss_fn(logits, part))
    is_hit = label_rank(logits, part['label']) == 0
    metrics = {'loss': mean, 'top1': jnp.mean(is_hit.astype(jnp.float32))}
    if price_of_bits and compression_state is not None:
      beyond = bits_per_weight(params, compression_state) - bits_limit
      mean += price_of_bits * jnp.maximum(beyond, 0)
    return mean, (_updated(batch_stats, updates), metrics)

  def gradient(
    batch_stats: PyTree, x: tuple[Batch, Array]
  ) -> tuple[PyTree, tuple[PyTree, Metrics]]:
    gradients, (new, metrics) = jax.grad(loss, has_aux=True)(train_state.params, batch_stats, *x)
    return new, (gradients, metrics)

  batch_stats, results = _accumulated(gradient, train_state.batch_stats, batch, key, accumulation)
  if axis_name is not None:
    # each device has updated the running statistics from its own part; the means are equal
    # everywhere, as replicated outputs must be
    batch_stats, results = lax.pmean((batch_stats, results), axis_name)
  gradients, metrics = results
  if clip_to_grid and compression_state is not None:
    clip = clip_gradient(compression_state)
    gradients, _ = clip.update(gradients, optax.EmptyState(), train_state.params)

  # Adam multiplies floats by integer counts, an error under strict promotion
  with jax.numpy_dtype_promotion('standard'):
    updates, opt_state = optimizer.update(gradients, train_state.opt_state, train_state.params)
  params = optax.apply_updates(train_state.params, updates)
  average = train_state.average
  if ema_decay is not None:
    new = {'params': params, _STATISTICS: batch_stats}
    # in this form a number that does not move stays as it is, bit for bit
    average = jax.tree.map(
      lambda old, new: old + (1 - ema_decay) * (new.astype(old.dtype) - old), average, new
    )
  next_state = dataclasses.replace(
    train_state,
    step=train_state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    average=average,
  )
  return next_state, metrics


def network(
  train_state: TrainState, compression_state: CompressionState, *, averaged: bool = False
) -> tuple[dict[str, PyTree], CompressionState]:
  """Returns the whole compressed network, as `opq_jax.save` takes it.

  Args:
    train_state: with the latent weights.
    compression_state: of `train_state.params`.
    averaged: True for the moving averages of weights and statistics.

  Returns:
    Variables with compressed params, and the compression state of these variables, in which
    running statistics are not compressed.

  Raises:
    ValueError: there is no average, or the compression state was made for another tree.
  """
  if averaged and train_state.average is None:
    raise ValueError('average: found None, expected init_train_state(…, with_average=True)')
  tree = {'params': train_state.params, _STATISTICS: train_state.batch_stats}
  if averaged:
    tree = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), train_state.average, tree)
  variables = _variables(apply_compression(tree['params'], compression_state), tree[_STATISTICS])
  uncompressed = jax.tree.map(lambda _: None, tree[_STATISTICS])
  return variables, CompressionState(_variables(compression_state.tree, uncompressed))


def _accumulated(
  gradient: Callable[[PyTree, tuple[Batch, Array]], tuple[PyTree, PyTree]],
  batch_stats: PyTree,
  batch: Batch,
  key: Array,
  count: int,
) -> tuple[PyTree, PyTree]:
  """Returns running statistics, and gradients and metrics averaged over the parts of a batch.

  Running statistics go from part to part as they go from step to step; gradients are averaged, so
  that the learning rate need not change.

  Args:
    gradient: (running statistics, (part, key)) -> new ones, and gradients and metrics.
    batch_stats: running statistics before the first part.
    batch: all parts.
    key: random numbers of all parts.
    count: of parts.
  """
  if count < 1:
    raise ValueError(f'accumulation: found {count}, expected a positive number of parts')
  if count == 1:
    return gradient(batch_stats, (batch, key))
  parts = split_batch(batch, count, 'parts'), jax.random.split(key, count)
  _, shapes = jax.eval_shape(gradient, batch_stats, jax.tree.map(lambda leaf: leaf[0], parts))

  def add(
    carry: tuple[PyTree, PyTree], part: tuple[Batch, Array]
  ) -> tuple[tuple[PyTree, PyTree], None]:
    batch_stats, results = gradient(carry[0], part)
    sums = jax.tree.map(lambda x, y: x + y.astype(x.dtype), carry[1], results)
    return (batch_stats, sums), None

  # one sum: gradients of all parts side by side would take the memory that parts save
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf)), shapes)
  (batch_stats, sums), _ = lax.scan(add, (batch_stats, zeros), parts)
  means = jax.tree.map(lambda x, leaf: (x / count).astype(leaf.dtype), sums, shapes)
  return batch_stats, means


def _sum_dtype(leaf: Any) -> Any:
  """Returns the dtype of sums and means of many such arrays: float32 for shorter floats."""
  is_short = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
  return jnp.float32 if is_short else leaf.dtype


def _as_average(leaf: Array) -> Array:
  """Returns a copy that later values are averaged into."""
  return jnp.array(leaf, dtype=_sum_dtype(leaf), copy=True)


def _updated(batch_stats: PyTree, updates: Mapping[str, PyTree]) -> PyTree:
  """Returns the running statistics of a network's updates; as they were where it returns none."""
  old = trees.named_leaves(batch_stats)
  new = trees.named_leaves(updates.get(_STATISTICS) or batch_stats)
  if new.keys() != old.keys():
    raise ValueError(
      f'{_STATISTICS}: found {messages.listed(new) or "none"} of the network, expected '
      f'{messages.listed(old) or "none"}, those of the train state'
    )
  # in the containers of the train state, whatever those of the network
  return jax.tree.unflatten(jax.tree.structure(batch_stats), [new[name] for name in old])


def _variables(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
  """Returns Flax's collections; a network without BatchNorm has only `params`."""
  return {'params': params, **({_STATISTICS: batch_stats} if batch_stats else {})}
