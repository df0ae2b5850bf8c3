from numba.core import caching

from opq_jax.core import native


def double(number):
  return 2 * number


def test_compiled_without_cache(monkeypatch):
  monkeypatch.setattr(caching.FunctionCache._impl_class, '_locator_classes', [])
  assert native.compiled(double)(21) == 42
