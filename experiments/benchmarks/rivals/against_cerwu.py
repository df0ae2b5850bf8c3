"""Bytes at equal divergence against CERWU, on the same networks and calibration images.

    python -m experiments.benchmarks.rivals.against_cerwu TFDS_FOLDER WEIGHTS.safetensors ... \
      --cerwu_python CERWU/bin/python --cerwu_modules CERWU/modules

CERWU (Conzelmann and Bamler 2025, arXiv 2505.18758) chooses codes by error feedback with a rate
term.  Its repository Conzel/cerwu has no licence, so it is built and run apart from this one:
`cerwu_worker.py` runs in an environment of numpy and pybind11 and imports two modules from
CERWU/modules, compiled as C++20 with -O3:

    _core      src/bindings.cpp and src/cpp/*.cpp of Conzel/cerwu, with Quant, ContextModeler,
               ContextModel and EncLib/*.cpp of Conzel/nncodec
    deepCABAC  extensions/deepCABAC of Conzel/nncodec

The commit of Conzel/nncodec that Conzel/cerwu pins is not public.  The public one lacks the
interface of entropy models, which belongs into its QuantisationInterfaces.h:

    class EstimatorInterface {
    public:
      virtual ~EstimatorInterface() = default;
      virtual float estimate(int32_t level) const = 0;
      virtual void update(int32_t level) = 0;
    };

Both sides have the same moments of the same calibration images, the same correction of BatchNorm on
these images afterwards, and the same bytes of vectors: 16 bits a number, coded as in our files.
CERWU's kernels are streams of its own coder, DeepCABAC, which are decoded again; nothing is counted
for its names, shapes and lengths.  Our bytes are of whole files.  CERWU is swept over steps and
lambda, and its curve is the lower convex hull of the sweep.

Rows of ours that experiments/results/against_nncodec holds are taken from there, and rows that
experiments/results/against_cerwu already holds are not made again.
"""

import argparse
import pathlib
import sys
import tempfile

from experiments.benchmarks.rivals import nncodec_summary
from experiments.benchmarks.rivals.cerwu_jobs import Cerwu, jobs_of_cerwu
from experiments.benchmarks.rivals.cerwu_summary import OURS, RESULTS, report
from experiments.benchmarks.rivals.jobs import LAYERS
from experiments.benchmarks.rivals.opq_jobs import jobs_of_ours
from experiments.benchmarks.rivals.study import Study, Table, copied


def compare(path: pathlib.Path, data_dir: str, python: str, modules: str, table: Table) -> None:
  study = Study(path, data_dir)
  copied(Table(nncodec_summary.RESULTS / 'results.csv'), table, study.name, OURS)
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    cerwu = Cerwu(python, modules, folder, study.network, study.unlabelled)
    ours = jobs_of_ours(study.network, study.unlabelled, folder)
    jobs = [
      *jobs_of_cerwu(study.network, study.unlabelled, cerwu, folder),
      *(job for job in ours if job.method in OURS),
    ]
    jobs.sort(key=lambda job: job.method.startswith(LAYERS))  # the slowest last
    study.run(jobs, table)
    cerwu.close()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('data_dir', help='TFDS folder of array_record files')
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--cerwu_python', default=sys.executable)
  parser.add_argument('--cerwu_modules', required=True, help='folder of _core and deepCABAC')
  arguments = parser.parse_args()
  table = Table(RESULTS / 'results.csv')
  for path in arguments.weights:
    compare(path, arguments.data_dir, arguments.cerwu_python, arguments.cerwu_modules, table)
  words = ' '.join(path.name for path in arguments.weights)
  command = f'python -m experiments.benchmarks.rivals.against_cerwu TFDS_FOLDER {words} '
  report(table.rows(), command + '--cerwu_python CERWU/bin/python --cerwu_modules CERWU/modules')


if __name__ == '__main__':
  main()
