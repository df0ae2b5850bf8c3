"""File sizes and accuracy against MPEG's NNCodec, on the same networks and images.

    python3 -m venv NNCODEC && NNCODEC/bin/pip install nncodec==2.1.3
    python -m experiments.benchmarks.rivals.against_nncodec TFDS_FOLDER WEIGHTS.safetensors ... \
      --nncodec_python NNCODEC/bin/python

NNCodec (ISO/IEC 15938-17) needs numpy below 2 and so an environment of its own, where
`nncodec_worker.py` runs.  Each file of weights is named as a network (`mobilenet_v1.safetensors`),
with the images of `configs/one_shot.py:NETWORK`.  Rows that experiments/results/against_nncodec
already holds are not made again.

Networks are judged as decoded from files that were written and read back; only our files of kernels
alone stay in memory.  `noise` is `opq_jax.correction.correct_batch_norm` and `synthetic` is
`opq_jax.correction.correct_on_images` with `opq_jax.correction.synthetic_inputs`, for both codecs.
NNCodec's corrected vectors form a stream of their own, quantized as all its vectors; its bytes
replace those of the uncorrected vectors.  Seconds are from the weights to the file, including
correction and moments; the first of a kind includes XLA's compilation.  Processor time is reliable
on a busy machine too.
"""

import argparse
import pathlib
import sys
import tempfile

from experiments.benchmarks.rivals.jobs import FEEDBACK, KERNELS, LAYERS
from experiments.benchmarks.rivals.nncodec_jobs import (
  NNCodec,
  jobs_of_nncodec,
  jobs_of_nncodec_errors,
)
from experiments.benchmarks.rivals.nncodec_summary import RESULTS, report
from experiments.benchmarks.rivals.opq_jobs import jobs_of_our_errors, jobs_of_ours
from experiments.benchmarks.rivals.recipe_jobs import jobs_of_recipes
from experiments.benchmarks.rivals.study import Study, Table


def compare(path: pathlib.Path, data_dir: str, python: str, table: Table) -> None:
  study = Study(path, data_dir)
  network = study.network
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    nncodec = NNCodec(python, folder)
    jobs = [
      *jobs_of_ours(network, study.unlabelled, folder),
      *jobs_of_nncodec(network, nncodec),
      *jobs_of_our_errors(network),
      *jobs_of_nncodec_errors(network, nncodec),
      *jobs_of_recipes(network, folder),
    ]
    # who has little time has the answers to most questions first
    slow = FEEDBACK, LAYERS
    jobs.sort(key=lambda job: (job.method.startswith(slow), KERNELS in job.method))
    study.run(jobs, table)
    nncodec.close()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('data_dir', help='TFDS folder of array_record files')
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--nncodec_python', default=sys.executable)
  arguments = parser.parse_args()
  table = Table(RESULTS / 'results.csv')
  for path in arguments.weights:
    compare(path, arguments.data_dir, arguments.nncodec_python, table)
  words = ' '.join(path.name for path in arguments.weights)
  command = 'python -m experiments.benchmarks.rivals.against_nncodec TFDS_FOLDER '
  report(table.rows(), f'{command}{words} --nncodec_python NNCODEC/bin/python')


if __name__ == '__main__':
  main()
