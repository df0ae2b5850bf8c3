"""CERWU's side of `against_cerwu`; runs in an environment of its own, which has no JAX.

Each line of JSON on stdin is a request, each line of JSON on stdout its answer:

    {"layers": "in.npz", "decoded": "out.npz", "settings": {"nbins": 16, "log10_lm": -4}}
    {"bytes": 61034, "encode": [24.9, 24.8], "decode": [0.1, 0.1]}

`layers` holds matrices `NAME/weights` of shape (rows, K), a row for each output, and their
`NAME/hessian` of shape (groups, K, K), both in PyTorch's order of inputs.  Each group of rows is a
layer of its own, as in CERWU, which takes depthwise convolutions apart; `decoded` holds the
weights after decoding.

The C++ core `_core` of CERWU chooses the codes, `deepCABAC` of its fork of NNCodec codes them, both
unchanged.  CERWU's layers of Python around the core import packages that this environment lacks, so
the arithmetic between weights and core is here, from arXiv 2505.18758 with the constants of its
repository: steps from the largest weight, H + gamma lambda I with gamma = 1 / (ln 2 var w), weights
w H (H + gamma lambda I)^-1, damping of 1 % of the mean of the diagonal before and after.

Settings:
  nbins: steps between -max |w| and max |w|; codes up to +-nbins are tried, as in CERWU.
  log10_lm: logarithm of lambda, of a bit in units of the error of a layer's outputs.
  order: `row` or `col`, the order in which weights are quantized and coded.
  damping: share of the mean of the diagonal; CERWU has .01.
"""

import argparse
import json
import sys
import time

import numpy as np

_UNARY_LENGTH = 10  # less 1, of NNCodec's binarization, and of CERWU's estimate of rates
_STEP_BYTES = 2


def seconds():
  return np.array([time.perf_counter(), time.process_time()])


def step_of(weights, nbins):
  """Returns the step of 16 bits, rounded up, at which the largest weight has code nbins // 2."""
  step = np.abs(weights).max() / (nbins // 2) if weights.any() else 1.0
  bits = np.asarray(step, np.float32).view(np.uint32)
  return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def damped(hessian, damping):
  hessian = hessian.copy()
  diagonal = np.diagonal(hessian).copy()
  diagonal[diagonal == 0] = 1
  np.fill_diagonal(hessian, diagonal + damping * diagonal.mean())
  return hessian


def quantized(core, weights, hessian, settings):
  """Returns the codes of a layer of shape (rows, K), and their step."""
  damping = settings.get('damping', 0.01)
  step = step_of(weights, settings['nbins'])
  scaled = weights.astype(np.float64) / step
  hessian = damped(hessian.astype(np.float64), damping) * float(step) ** 2
  variance = scaled.var(ddof=1)
  lm = 10 ** settings['log10_lm']
  gamma = 1 / (np.log(2) * variance) if variance else 0.0
  regular = hessian + gamma * lm * np.eye(len(hessian))
  moved = np.linalg.solve(regular, hessian @ scaled.T).T
  inverse = np.linalg.inv(damped(regular, damping))
  factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
  options = {
    'max_idx': settings['nbins'],
    'entropy_model': 'regularized',
    'entropy_model_options': {'base_model': 'deepcabac', 'gamma': gamma},
    'scan_order_major': settings.get('order', 'row'),
  }
  floats = (np.ascontiguousarray(x, np.float32) for x in (moved, factor))
  return core.GPTQ(options).run(*floats, np.float32(lm)), step


def encoded(cabac, codes):
  encoder = cabac.Encoder()
  encoder.initCtxModels(_UNARY_LENGTH, 1)
  encoder.encodeLayer(np.ascontiguousarray(codes, np.int32), 0, 0)
  return encoder.finish()


def decoded(cabac, stream, shape):
  decoder = cabac.Decoder()
  decoder.setStream(stream)
  decoder.initCtxModels(_UNARY_LENGTH)
  codes = np.zeros(shape, np.int32)
  decoder.decodeLayer(codes, 0, 0)
  decoder.finish()
  return codes


def answer(core, cabac, question, layers):
  settings = question['settings']
  turned = (lambda codes: codes.T) if settings.get('order') == 'col' else (lambda codes: codes)
  names = sorted({name.rsplit('/', 1)[0] for name in layers})
  begin = seconds()
  streams = {}
  for name in names:
    weights, hessians = layers[f'{name}/weights'], layers[f'{name}/hessian']
    groups = np.split(weights, len(hessians))
    pairs = [
      quantized(core, group, hessian, settings)
      for group, hessian in zip(groups, hessians, strict=True)
    ]
    codes = np.concatenate([codes for codes, _ in pairs])
    streams[name] = codes, encoded(cabac, turned(codes)), np.array([step for _, step in pairs])
  end = seconds()
  found = {}
  for name, (codes, stream, steps) in streams.items():
    read = turned(decoded(cabac, stream, turned(codes).shape))
    if not np.array_equal(read, codes):
      raise ValueError(f'{name}: found other codes after decoding, expected those encoded')
    found[name] = read * np.repeat(steps, len(read) // len(steps))[:, None]
  last = seconds()
  np.savez(question['decoded'], **found)
  return {
    'bytes': sum(len(stream) + _STEP_BYTES * len(steps) for _, stream, steps in streams.values()),
    'encode': (end - begin).tolist(),
    'decode': (last - end).tolist(),
  }


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('modules', help='folder of the compiled _core and deepCABAC')
  sys.path.insert(0, parser.parse_args().modules)
  import _core
  import deepCABAC

  layers, read = {}, None
  for line in sys.stdin:
    question = json.loads(line)
    if question['layers'] != read:
      with np.load(question['layers']) as file:
        layers, read = dict(file), question['layers']
    print(json.dumps(answer(_core, deepCABAC, question, layers)), flush=True)


if __name__ == '__main__':
  main()
