"""ONNX files of other packages: compressed, exported into themselves, and run in onnxruntime.

    python -m experiments.benchmarks.export.onnx_files FILE.onnx ... [--bits 4]

A file of a package is named after the folders where it was unpacked.  Inputs are random: the first
axis without a length has 1, an axis of pixels or samples 96; integers are below 128.  Both the
decompressed floats and the exported file run on one thread, in turn.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import onnxruntime

from experiments.benchmarks import harness
from opq_jax import cli

MODULE = 'experiments.benchmarks.export.onnx_files'
FREE = 96
"""Length of an axis that the file leaves open, beyond the first: several strides of 32."""

NAMED: dict[str, Any] = {'sr': np.array(16000)}
"""Inputs whose values matter, by name: the sampling rate of silero-vad."""

SHAPES = {
  ('silero', 'input'): (1, 512),
  ('silero', 'state'): (2, 1, 128),
  ('silero', 'h'): (2, 1, 64),
  ('silero', 'c'): (2, 1, 64),
  ('ddddocr/common.onnx', 'input1'): (1, 1, 64, 160),
  ('rec', 'x'): (1, 3, 48, 320),
}
"""Shapes that a network demands and its file does not say, by part of its path and input."""


def inputs_of(session: onnxruntime.InferenceSession, path: str, seed: int = 0) -> dict[str, Any]:
  """Returns random inputs of a network."""
  rng = np.random.default_rng(seed)
  inputs = {}
  for one in session.get_inputs():
    known = (shape for (part, name), shape in SHAPES.items() if part in path and name == one.name)
    shape = next(known, None)
    if shape is None:
      free = [1] + [FREE] * len(one.shape)
      shape = [n if isinstance(n, int) else free[axis] for axis, n in enumerate(one.shape)]
    if one.name in NAMED:
      inputs[one.name] = NAMED[one.name]
    elif 'int' in one.type:
      dtype = one.type.removeprefix('tensor(').removesuffix(')')
      inputs[one.name] = rng.integers(0, 128, shape).astype(dtype)
    else:
      dtype = {'tensor(float)': np.float32, 'tensor(float16)': np.float16}[one.type]
      inputs[one.name] = rng.random(shape).astype(dtype)
  return inputs


def opened(path: pathlib.Path) -> onnxruntime.InferenceSession:
  """Opens a file in onnxruntime, on one thread."""
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def row_of(path: pathlib.Path, bits: float, rounds: int) -> dict[str, object]:
  """Compresses and exports a file; returns its sizes, the largest difference and the time."""
  with tempfile.TemporaryDirectory() as folder:
    packed, small, back = (
      pathlib.Path(folder, name) for name in ('net.opq', 'small.onnx', 'back.onnx')
    )
    for arguments in (
      ['compress', path, packed, '--bits-per-weight', bits],
      ['export', packed, small, '--into', path],
      ['decompress', packed, back, '--into', path],
    ):
      if cli.main([str(argument) for argument in arguments]):
        raise ValueError(f'{path}: opq {arguments[0]} failed')
    sessions = {'floats': opened(back), 'indices': opened(small)}
    inputs = inputs_of(sessions['floats'], path.as_posix())
    outputs = {name: session.run(None, inputs) for name, session in sessions.items()}
    pairs = [*zip(outputs['floats'], outputs['indices'], strict=True)]
    largest = max(
      float(np.max(np.abs(a.astype(np.float64) - b), initial=0))
      for a, b in pairs
      if np.issubdtype(a.dtype, np.number)
    )
    seconds = harness.in_turn(
      {name: lambda s=session: s.run(None, inputs) for name, session in sessions.items()}, rounds
    )
    sizes = [one.stat().st_size for one in (path, packed, small)]
    return {
      'package': path.parts[0],
      'file': path.name,
      'bytes': sizes[0],
      '.opq': sizes[1],
      'small.onnx': sizes[2],
      'times smaller': round(sizes[0] / sizes[2], 2),
      'largest difference of outputs': f'{largest:.1g}',
      'time, indices over floats': round(seconds['indices'] / seconds['floats'], 2),
    }


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('files', nargs='+', type=pathlib.Path)
  parser.add_argument('--bits', type=float, default=4.0)
  parser.add_argument('--rounds', type=int, default=31)
  options = parser.parse_args(arguments)
  for path in options.files:
    rows = [row_of(path, options.bits, options.rounds)]
    rows = harness.with_earlier('onnx_files', rows, ['package', 'file'])
    command = f'python -m {MODULE} PACKAGE/FILE.onnx ... --bits {options.bits:g}'
    harness.report('onnx_files', 'ONNX files of other packages', command, rows)


if __name__ == '__main__':
  main(sys.argv[1:])
