"""Small Core ML packages, and the weights that coremltools reads from one."""

import contextlib
import gc
import warnings

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb


def laplace(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).laplace(size=shape).astype(np.float32)


@contextlib.contextmanager
def temporary_folders():
  """Models of coremltools leave the removal of their folders to the garbage collection.

  Older objects are frozen meanwhile, so that a collection does not visit all of a test session.
  """
  gc.freeze()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', ResourceWarning)
      yield
      gc.collect()
  finally:
    gc.unfreeze()


@temporary_folders()
def save(path, program, precision='FLOAT32', target='iOS18'):
  """Writes a package of a program of `mb.program`."""
  model = ct.convert(
    program,
    convert_to='mlprogram',
    compute_precision=getattr(ct.precision, precision),
    minimum_deployment_target=getattr(ct.target, target),
    skip_model_load=True,
  )
  model.save(str(path))


def holding(arrays, target='iOS18'):
  """A program that reads each array by name, and adds its input to it."""

  @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=getattr(ct.target, target))
  def program(x):
    return tuple(
      mb.add(x=mb.const(val=array, name=name), y=mb.cast(x=x, dtype=_short(array)))
      for name, array in arrays.items()
    )

  return program


def layers():
  """A program with every operation that has weights, in a branch too."""
  seeds = {'transposed': 1, 'other': 1}  # equal constants would become one
  const = lambda name, *shape: mb.const(val=laplace(*shape, seed=seeds.get(name, 0)), name=name)

  @mb.program(
    input_specs=[mb.TensorSpec(shape=(1, 8, 10, 10)), mb.TensorSpec(shape=(3,))],
    opset_version=ct.target.iOS18,
  )
  def program(x, t):
    a = mb.conv(x=x, weight=const('conv', 16, 8, 3, 3), bias=np.ones(16, np.float32))
    b = mb.conv_transpose(x=a, weight=const('transposed', 16, 8, 3, 3))
    c = mb.linear(x=mb.reshape(x=b, shape=(8, 100)), weight=const('linear', 24, 100))
    d = mb.matmul(x=c, y=const('heads', 3, 40, 24), transpose_y=True)
    e = mb.matmul(x=const('first', 30, 8), y=d)
    rows = mb.gather(x=const('table', 50, 32), indices=mb.cast(x=t, dtype='int32'), axis=0)
    zeros = np.zeros((1, 20), np.float32)
    h, _, _ = mb.lstm(
      x=mb.expand_dims(x=rows, axes=[1]),
      initial_h=zeros,
      initial_c=zeros,
      weight_ih=const('lstm_ih', 80, 32),
      weight_hh=const('lstm_hh', 80, 20),
    )
    branch = mb.cond(
      pred=mb.greater(x=mb.reduce_max(x=t), y=np.float32(0)),
      _true_fn=lambda: mb.linear(x=h, weight=const('inner', 25, 20)),
      _false_fn=lambda: mb.linear(x=h, weight=const('other', 25, 20)),
    )
    return e, branch

  return program


@temporary_folders()
def weights(path):
  """The constants of a package by name, decompressed by coremltools."""
  model = ct.models.MLModel(str(path), skip_model_load=True)
  plain = ct.optimize.coreml.decompress_weights(model)
  found = ct.optimize.coreml.get_weights_metadata(plain, weight_threshold=0)
  return {name: one.val for name, one in found.items()}


def kinds(path):
  """The types of the operations that make weights, by name."""
  model = ct.utils.load_spec(str(path))
  found = {}

  def walk(block):
    for operation in block.operations:
      if operation.type.startswith('const'):
        found.update((output.name, operation.type) for output in operation.outputs)
      for inner in operation.blocks:
        walk(inner)

  for function in model.mlProgram.functions.values():
    walk(function.block_specializations[function.opset])
  return found


def _short(array):
  return {'float16': 'fp16', 'float32': 'fp32'}[array.dtype.name]
