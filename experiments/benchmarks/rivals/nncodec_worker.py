"""NNCodec's side of `against_nncodec`; runs in an environment of its own, which has no JAX.

Each line of JSON on stdin is a request, each line of JSON on stdout its answer:

    {"params": "in.npz", "stream": "net.nnc", "decoded": "out.npz", "settings": {"qp": -32}}
    {"bytes": 210034, "encode": [8.9, 8.8], "decode": [0.9, 0.9]}

Settings go to `nncodec.nn.encode`.  It does not pass `lambda_scale` on; with one, settings go to
`nncodec.nnc.compress`, with the same defaults.  The stream is decoded from the file on disk.
Seconds are of the wall clock and of the processor.
"""

import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from nncodec import nn, nnc


def encode(params, settings):
  if 'lambda_scale' in settings:
    options = {'row_skipping': True, 'param_opt': True, 'use_dq': True, **settings}
    return nnc.compress(params, bitstream_path=None, return_bitstream=True, **options)
  with tempfile.TemporaryDirectory() as folder:
    return nn.encode(params, {'verbose': False, 'results': folder, **settings})


def seconds():
  return np.array([time.perf_counter(), time.process_time()])


def answer(question):
  with np.load(question['params']) as file:
    params = dict(file)
  stream = pathlib.Path(question['stream'])
  begin = seconds()
  stream.write_bytes(encode(params, question['settings']))
  encoded = seconds()
  decoded = nn.decode(bytearray(stream.read_bytes()))
  end = seconds()
  np.savez(question['decoded'], **{name: np.asarray(leaf) for name, leaf in decoded.items()})
  return {
    'bytes': stream.stat().st_size,
    'encode': (encoded - begin).tolist(),
    'decode': (end - encoded).tolist(),
  }


def main():
  torch.set_num_threads(2)
  # NNCodec prints to stdout
  answers, sys.stdout = sys.stdout, sys.stderr
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == '__main__':
  main()
