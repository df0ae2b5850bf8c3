from numba.core import caching

from opq_jax.core import native


def double(number):
  return 2 * number


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch):
  monkeypatch.setattr(caching.FunctionCache._impl_class, '_locator_classes', [])
  assert native.compiled(double)(21) == 42
