"""JAX as users have it: frameworks and snippets promote dtypes and ranks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def lenient_jax():
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield
