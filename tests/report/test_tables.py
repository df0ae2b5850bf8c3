from opq_jax.report import tables


def test_shorten_keeps_both_ends():
  assert tables.shorten('short', 8) == 'short'
  assert tables.shorten('abcdefghij', 5) == 'ab…ij'
  assert len(tables.shorten('x' * 50, 20)) == 20
