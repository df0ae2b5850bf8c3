"""Mutation tests: small errors put into a module, which its tests must find.

    python -m experiments.benchmarks.robustness.mutants --count 50
    python -m experiments.benchmarks.robustness.mutants --again             # survivors, new tests
    python -m experiments.benchmarks.robustness.mutants --again --only new  # tests *new* alone

A mutant is a module with one expression or statement changed, drawn with a fixed seed from all
those of `mutations`; its tests run until the first one fails (`mutant_tests`).  A mutant with which
all tests pass has survived: a test is missing, or the change has no effect
(`equivalent_mutants.json` says why).  With `--most`, only that many seconds of the quickest tests
run, and a mutant that only a slower test would find survives.
"""

import argparse
import json
import math
import pathlib
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from experiments.benchmarks.robustness.mutant_tests import Tests, source_of
from experiments.benchmarks.robustness.mutations import Mutant, mutations

PROCESSES = 1
EXPLAINED = pathlib.Path(__file__).parent / 'equivalent_mutants.json'
FILE_TESTS = ['file/test_round_trip.py', 'file/test_writer.py', 'file/test_reader.py']
CONTEXT_TESTS = [
  *('coding/test_contexts.py', 'coding/test_context_search.py', 'coding/test_payload.py'),
]
ALLOCATION_TESTS = [
  'allocation/test_allocator.py',
  'allocation/test_dtypes.py',
  'compression/test_codes.py',
]
RATE_TESTS = [
  'allocation/test_rate_search.py',
  'allocation/test_lattices.py',
  'allocation/test_allocator.py',
]
USAGE_TESTS = ['network/test_usage.py', 'network/test_moments.py']
MOMENT_TESTS = ['network/test_moments.py', 'network/test_stored_moments.py']
ENCODER_TESTS = [
  'encoders/test_feedback.py',
  'encoders/test_trellis.py',
  'encoders/test_any_function.py',
]
SEARCH_TESTS = ['encoders/test_search.py', 'encoders/test_trellis.py']
CORRECTION_TESTS = ['correction/test_batch_norm.py', 'correction/test_biases.py']
READING_TESTS = ['weights/test_reading.py', 'weights/test_stored_leaves.py']
TESTS = {
  'allocation.laplace': ['allocation/test_laplace.py'],
  'allocation.targets': ['allocation/test_targets.py', 'allocation/test_allocator.py'],
  'allocation.allocator': [
    'allocation/test_allocator.py',
    'allocation/test_targets.py',
    'compression/test_codes.py',
  ],
  'allocation.answer_checks': [
    'allocation/test_answer_checks.py',
    'allocation/test_allocator.py',
    'allocation/test_lattices.py',
  ],
  'allocation.solver': ALLOCATION_TESTS,
  'allocation.description': ALLOCATION_TESTS,
  'allocation.units': ALLOCATION_TESTS,
  'allocation.rate_search': RATE_TESTS,
  'allocation.choices': RATE_TESTS,
  'allocation.exponential_tails': RATE_TESTS,
  'compression.cells': ['compression/test_codes.py', *FILE_TESTS],
  'compression.codes': ['compression/test_codes.py', *FILE_TESTS],
  'compression.rate': ['compression/test_rate.py', 'compression/test_zero_cell.py'],
  'compression.records': ['compression/test_codes.py', *FILE_TESTS],
  'compression.zero_cell': ['compression/test_zero_cell.py'],
  'file.checks': [*FILE_TESTS, 'file/test_hostile_files.py'],
  'file.front': [*FILE_TESTS, 'file/test_hostile_files.py'],
  'file.grids': ['file/test_grids.py', *FILE_TESTS, 'file/test_hostile_files.py'],
  'file.index': [*FILE_TESTS, 'file/test_hostile_files.py'],
  'file.reader': [*FILE_TESTS, 'file/test_hostile_files.py'],
  'file.leaf_entries': [*FILE_TESTS, 'file/test_slices.py', 'file/test_hostile_files.py'],
  'file.writer': [*FILE_TESTS, 'file/test_hostile_files.py'],
  'file.written_leaves': [*FILE_TESTS, 'file/test_slices.py', 'file/test_hostile_files.py'],
  'coding.arrangements': CONTEXT_TESTS,
  'coding.context_search': CONTEXT_TESTS,
  'coding.contexts': CONTEXT_TESTS,
  'coding.escapes': ['coding/test_escapes.py'],
  'coding.frequencies': ['coding/test_ans.py', 'coding/test_payload.py'],
  'coding.neighbours': CONTEXT_TESTS,
  'coding.score_fitting': CONTEXT_TESTS,
  'coding.score_ranges': CONTEXT_TESTS,
  'coding.trellis': ['coding/test_trellis.py', 'coding/test_viterbi.py', 'coding/test_contexts.py'],
  'network.uses': USAGE_TESTS,
  'network.views': USAGE_TESTS,
  'network.products': USAGE_TESTS,
  'network.moment_sums': MOMENT_TESTS,
  'network.moments': MOMENT_TESTS,
  'network.stored_moments': MOMENT_TESTS,
  'network.costs': ['network/test_costs.py'],
  'encoders.matrices': ENCODER_TESTS,
  'encoders.factors': ['encoders/test_factors.py', 'encoders/test_at_bits.py'],
  'encoders.feedback': ['encoders/test_feedback.py', 'encoders/test_at_bits.py'],
  'encoders.layer_by_layer': ['encoders/test_layer_by_layer.py', 'encoders/test_any_function.py'],
  'encoders.trellis_grids': ['encoders/test_trellis_grids.py', 'encoders/test_trellis.py'],
  'encoders.trellis_leaves': ENCODER_TESTS,
  'encoders.allocation_search': SEARCH_TESTS,
  'encoders.survey': SEARCH_TESTS,
  'correction.batch_norm': CORRECTION_TESTS,
  'correction.batch_statistics': CORRECTION_TESTS,
  'correction.biases': CORRECTION_TESTS,
  'correction.output_bias': CORRECTION_TESTS,
  'correction.noise': ['correction/test_noise.py', 'correction/test_batch_norm.py'],
  'weights.channels': ['weights/test_channels.py'],
  'weights.checks': READING_TESTS,
  'core.stored_leaves': READING_TESTS,
  'weights.stored_tree': READING_TESTS,
  'weights.safetensors': ['weights/test_safetensors.py', *READING_TESTS],
  'weights.npz': READING_TESTS,
  'weights.leaf_codes': ['weights/test_streaming.py'],
}


def tried(
  module: str, count: int, seconds: float, budget: float, folder: str
) -> list[dict[str, str]]:
  """Returns the outcomes of the first `count` mutants of a module, or as many as time allows."""
  tests = Tests(module, TESTS[module], folder, budget)
  baseline = tests.measure()
  print(f'{module}: {len(tests.seconds)} tests in {baseline:.0f} s', file=sys.stderr)
  possible, end = mutations(source_of(module)), time.monotonic() + seconds

  def one(mutant: Mutant) -> dict[str, str] | None:
    if time.monotonic() > end:
      return None
    outcome, test, took = tests.outcome(mutant.source, 60 + 5 * baseline)
    print(f'{module} {outcome} {took:.0f} s: {mutant.line}: {mutant.key()} {test}', file=sys.stderr)
    return {
      'module': module,
      'function': mutant.function,
      'line': mutant.text,
      'change': mutant.change,
      'outcome': outcome,
    }

  with ThreadPoolExecutor(PROCESSES) as pool:
    outcomes = pool.map(one, random.Random(0).sample(possible, min(count, len(possible))))
    return [mutant for mutant in outcomes if mutant is not None]


def tried_again(mutants: list[dict[str, str]], only: str, folder: str) -> None:
  """Tries the survivors again, against the present tests."""
  tests: dict[str, Tests] = {}
  for mutant in mutants:
    same = [
      found
      for found in mutations(source_of(mutant['module']))
      if (found.function, found.text, found.change)
      == (mutant['function'], mutant['line'], mutant['change'])
    ]
    if mutant['outcome'] == 'survived' and not _why(mutant) and same:
      module = mutant['module']
      if module not in tests:
        tests[module] = Tests(module, TESTS[module], folder, only=only)
        tests[module].measure()
      # a line may hold the same change twice
      outcomes = [tests[module].outcome(found.source, 3600)[0] for found in same]
      mutant['outcome'] = 'survived' if 'survived' in outcomes else outcomes[0]
      print(mutant, outcomes, file=sys.stderr)


def _why(mutant: dict[str, str]) -> str:
  """Returns why no test can find a mutant, where that is known.  Lines keep their keys in moves."""
  explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
  return explained.get(': '.join(mutant[name] for name in ('line', 'change')), '')


def write(mutants: list[dict[str, str]], options: dict[str, str]) -> None:
  """Writes the rows of the table, and every mutant.

  Args:
    mutants: of all modules.
    options: of the command that drew the mutants of each module.
  """
  # not at the top: forked test runs import this module, and must not have imported opq_jax
  from experiments.benchmarks import harness

  rows: list[dict[str, object]] = []
  for module in dict.fromkeys(mutant['module'] for mutant in mutants):
    of_it = [mutant for mutant in mutants if mutant['module'] == module]
    survived = [mutant for mutant in of_it if mutant['outcome'] == 'survived']
    rows.append(
      {
        'module': f'`{module}`',
        'mutants': len(mutations(source_of(module))),
        'drawn': len(of_it),
        'killed': len(of_it) - len(survived),
        'equivalent': sum(bool(_why(mutant)) for mutant in survived),
        'survived': sum(not _why(mutant) for mutant in survived),
      }
    )
  commands = []
  for option in dict.fromkeys(options.values()):
    modules = ' '.join(module for module in TESTS if options.get(module) == option)
    commands.append(
      f'python -m experiments.benchmarks.robustness.mutants {option} --modules {modules}'
    )
  command = '` and `'.join(commands)
  harness.report('mutants', 'mutants, and what the tests say of them', command, rows)
  path = harness.RESULTS / 'mutants.json'
  listed = [
    mutant | {'why': _why(mutant)} if mutant['outcome'] == 'survived' else mutant
    for mutant in mutants
  ]
  document = {'command': command, 'options': options, 'rows': rows, 'mutants': listed}
  path.write_text(json.dumps(document, indent=1) + '\n')


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--count', type=int, default=50, help='mutants of each module')
  parser.add_argument('--seconds', type=float, default=3600, help='for each module, at most')
  parser.add_argument('--most', type=float, default=math.inf, help='seconds of quickest tests')
  parser.add_argument('--modules', nargs='+', default=list(TESTS), choices=list(TESTS))
  parser.add_argument('--again', action='store_true', help='only those that have survived so far')
  parser.add_argument('--only', default='', help='with --again: tests of these names, as for -k')
  arguments = parser.parse_args()
  from experiments.benchmarks import harness

  path = harness.RESULTS / 'mutants.json'
  document = json.loads(path.read_text()) if path.exists() else {'mutants': [], 'options': {}}
  # without those of modules that have been renamed or cut since
  mutants = [mutant for mutant in document['mutants'] if mutant['module'] in TESTS]
  options = {name: option for name, option in document['options'].items() if name in TESTS}
  with tempfile.TemporaryDirectory() as folder:
    if arguments.again:
      tried_again(mutants, arguments.only, folder)
      write(mutants, options)
      return
    for module in arguments.modules:
      # outcomes of other modules are kept
      mutants = [mutant for mutant in mutants if mutant['module'] != module]
      mutants += tried(module, arguments.count, arguments.seconds, arguments.most, folder)
      mutants.sort(key=lambda mutant: list(TESTS).index(mutant['module']))
      options[module] = f'--count {arguments.count} --seconds {arguments.seconds:g}'
      if arguments.most < math.inf:
        options[module] += f' --most {arguments.most:g}'
      write(mutants, options)


if __name__ == '__main__':
  main()
