"""The paper's targets give the published rates, by arithmetic and by actual codes."""

import numpy as np
import pytest

import opq_jax
from opq_jax import models
from opq_jax.allocation import paper


@pytest.mark.parametrize('name', paper.TARGETS)
def test_paper_rates(name):
  assert name in models.names()
  sparsity, bits, rate = paper.TARGETS[name]
  assert 32 / ((1 - sparsity) * bits) == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize('name', ['alexnet', 'mobilenet_v1'])
def test_paper_rates_of_codes(name):
  sparsity, bits, rate = paper.TARGETS[name]
  rng = np.random.default_rng(0)
  params = {
    f'layer_{i}/kernel': (rng.laplace(size=shape) * scale).astype(np.float32)
    for i, (shape, scale) in enumerate([((3, 3, 32, 64), 0.1), ((512, 256), 0.03)])
  }
  allocation = opq_jax.allocate(params, sparsity=sparsity, bits=bits)
  report = opq_jax.size_report(params, opq_jax.init_state(params, allocation))
  assert report.nominal_rate == pytest.approx(rate, rel=0.01)
  assert report.file_rate < report.nominal_rate
