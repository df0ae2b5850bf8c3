"""The closed forms against sampled weights, numerical integrals and their own limits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from opq_jax.allocation import laplace

FORMS = {
  'pruned_fraction': ('threshold', 'scale'),
  'pruning_error': ('threshold', 'scale'),
  'survivor_error': ('step', 'scale'),
  'survivor_offset': ('step', 'scale'),
  'survivor_entropy': ('step', 'scale'),
  'distortion': ('threshold', 'step', 'scale'),
  'retained_energy': ('threshold', 'step', 'scale'),
  'entropy': ('threshold', 'step', 'scale'),
}
INF = math.inf
JITTED = {name: jax.jit(getattr(laplace, name)) for name in FORMS}
# a scale has no derivative of its own at inf, so it stays finite
GRADIENTS = {
  name: jax.jit(jax.vmap(jax.value_and_grad(getattr(laplace, name), tuple(range(len(args))))))
  for name, args in FORMS.items()
}


def float64(name, *args):
  """Evaluates a closed form in float64."""
  with jax.enable_x64(True):
    shape = np.broadcast_shapes(*map(np.shape, args))
    return np.asarray(JITTED[name](*(np.broadcast_to(np.float64(a), shape) for a in args)))


def cells(threshold, step, scale):
  """Returns the probabilities of code 0 and of one sign's cells."""
  k = np.arange(math.ceil(60 * scale / step) + 2)
  edges = threshold + step * k
  tail = np.exp(-edges / scale) / 2
  return 1 - 2 * tail[0], tail[:-1] - tail[1:]


POINTS = [
  (0.3, 0.7, 1.0),
  (1.372, 2.157, 1.0),
  (0.02, 0.05, 0.01),
  (5.0, 0.4, 2.0),
  (0.0, 1.0, 3.0),
]


@pytest.mark.parametrize(('threshold', 'step', 'scale'), POINTS)
def test_laplace_matches_integrals(threshold, step, scale):
  def integral(function, low, high):
    return quad(function, low, high, epsabs=0, epsrel=1e-12)[0] if high > low else 0.0

  def density(w):
    return math.exp(-w / scale) / scale  # of |w|

  pruned = integral(density, 0, threshold)
  error = integral(lambda w: w * w * density(w), 0, threshold)
  inside = integral(density, 0, step)
  offset = integral(lambda x: x * density(x), 0, step) / inside
  variance = integral(lambda x: (x - offset) ** 2 * density(x), 0, step) / inside
  zero, one_sign = cells(threshold, step, scale)
  codes = np.concatenate([[zero], one_sign, one_sign])
  codes = codes[codes > 0]
  bits = -np.sum(codes * np.log2(codes))
  values = threshold + step * np.arange(len(one_sign)) + offset
  survivors = one_sign[one_sign > 0] / (1 - pruned)
  expected = {
    'pruned_fraction': pruned,
    'pruning_error': error,
    'survivor_error': variance,
    'survivor_offset': offset,
    'survivor_entropy': -2 * np.sum(survivors * np.log2(survivors)),
    'distortion': error + (1 - pruned) * variance,
    'retained_energy': 2 * np.sum(one_sign * values**2),
    'entropy': bits,
  }
  inputs = {'threshold': threshold, 'step': step, 'scale': scale}
  for name, args in FORMS.items():
    found = float64(name, *(inputs[a] for a in args))
    np.testing.assert_allclose(found, expected[name], rtol=1e-9, atol=1e-15, err_msg=name)


@pytest.mark.parametrize(('threshold', 'step', 'scale'), POINTS)
def test_laplace_matches_samples(threshold, step, scale):
  n = 400_000
  weights = np.random.default_rng(0).laplace(scale=scale, size=n)
  magnitude = np.abs(weights)
  survives = magnitude > threshold
  cell = np.floor((magnitude - threshold) / step)
  rest = (magnitude - threshold - cell * step)[survives]
  offset = float64('survivor_offset', step, scale)
  value = np.where(survives, threshold + cell * step + offset, 0)
  codes = np.where(survives, np.sign(weights) * (1 + cell), 0).astype(int)
  _, index, counts = np.unique(codes, return_inverse=True, return_counts=True)
  surprise = -np.log2(counts / n)[index]
  sampled = {
    'pruned_fraction': ~survives,
    'pruning_error': np.where(survives, 0, weights**2),
    'survivor_offset': rest,
    'survivor_error': (rest - offset) ** 2,
    'distortion': (magnitude - value) ** 2,
    'retained_energy': value**2,
    'entropy': surprise,
    'survivor_entropy': surprise[survives] + np.log2(survives.mean()),
  }
  inputs = {'threshold': threshold, 'step': step, 'scale': scale}
  for name, args in FORMS.items():
    found = float64(name, *(inputs[a] for a in args))
    error = np.std(sampled[name]) / math.sqrt(len(sampled[name]))
    if 'entropy' in name:
      error += len(counts) / len(sampled[name])  # the bias of an empirical entropy
    assert abs(found - np.mean(sampled[name])) <= 4.5 * error + 1e-12, name


def test_laplace_limits():
  for scale in (0.5, 3.0):
    expected = {
      ('pruned_fraction', (0.0,)): 0,
      ('pruned_fraction', (INF,)): 1,
      ('pruning_error', (0.0,)): 0,
      ('pruning_error', (INF,)): 2 * scale**2,
      ('survivor_error', (0.0,)): 0,
      ('survivor_error', (INF,)): scale**2,
      ('survivor_offset', (0.0,)): 0,
      ('survivor_offset', (INF,)): scale,
      ('survivor_entropy', (0.0,)): INF,
      ('survivor_entropy', (INF,)): 1,
      ('distortion', (0.0, 0.0)): 0,
      ('distortion', (0.0, INF)): scale**2,
      ('distortion', (INF, 0.0)): 2 * scale**2,
      ('distortion', (INF, INF)): 2 * scale**2,
      ('retained_energy', (0.0, 0.0)): 2 * scale**2,
      ('retained_energy', (0.0, INF)): scale**2,
      ('retained_energy', (INF, 0.0)): 0,
      ('retained_energy', (INF, INF)): 0,
      ('entropy', (0.0, INF)): 1,
      ('entropy', (1.0, 0.0)): INF,
      ('entropy', (INF, 0.0)): 0,
      ('entropy', (INF, 1.0)): 0,
      ('entropy', (INF, INF)): 0,
    }
    for (name, args), value in expected.items():
      for number in (np.float32, np.float64):
        with jax.enable_x64(number is np.float64):
          found = float(JITTED[name](*map(number, args), number(scale)))
        assert found == value, (name, args, scale, number)


@pytest.mark.parametrize('at', [0.0, 1e-3, 1.0, INF])
def test_laplace_channel_of_zeros(at):
  at, zero = np.float32(at), np.float32(0)
  assert JITTED['pruned_fraction'](at, zero) == 1
  for name in ('pruning_error', 'survivor_error', 'survivor_offset'):
    assert JITTED[name](at, zero) == 0
  for step in np.float32([0, 1e-3, 1, INF]):
    for name in ('distortion', 'retained_energy', 'entropy'):
      assert JITTED[name](at, step, zero) == 0


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('number', [np.float32, np.float64])
def test_laplace_has_no_nan(name, number):
  lengths = [0, 1e-30, 1e-12, 1e-3, 1, 1e3, 1e12, INF]
  scales = [0, 1e-30, 1e-12, 1, 1e12]
  points = list(itertools.product(*[lengths] * (len(FORMS[name]) - 1), scales))
  with jax.enable_x64(number is np.float64):
    value, gradient = jax.device_get(GRADIENTS[name](*np.array(points, number).T))
  for point, v, *g in zip(points, value, *gradient, strict=True):
    assert not np.isnan(v), point
    assert not np.isnan(g).any(), (point, g)
    assert v >= 0, point


@pytest.mark.parametrize('name', FORMS)
def test_laplace_gradients(name):
  points = np.random.default_rng(1).uniform(0.2, 3, size=(20, len(FORMS[name])))
  h = 1e-6
  with jax.enable_x64(True):
    _, gradients = jax.device_get(GRADIENTS[name](*points.T))
  for k, gradient in enumerate(gradients):
    move = h * np.eye(points.shape[1])[k]
    slope = (float64(name, *(points + move).T) - float64(name, *(points - move).T)) / (2 * h)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)


# (form, argument) -> whether it rises or falls
TRENDS = {  # the distortion may fall in the threshold and in the scale, where cells are wide
  ('pruned_fraction', 'threshold'): 1,
  ('pruned_fraction', 'scale'): -1,
  ('pruning_error', 'threshold'): 1,
  ('survivor_error', 'step'): 1,
  ('survivor_error', 'scale'): 1,
  ('survivor_offset', 'step'): 1,
  ('survivor_offset', 'scale'): 1,
  ('survivor_entropy', 'step'): -1,
  ('survivor_entropy', 'scale'): 1,
  ('distortion', 'step'): 1,
  ('retained_energy', 'step'): -1,
  ('retained_energy', 'scale'): 1,
  ('entropy', 'step'): -1,
}


@pytest.mark.parametrize('name', FORMS)
def test_laplace_gradients_where_forms_meet(name):
  """At lengths of one scale, two, and log 2 of it, a form is computed in another way."""
  at = np.array([1.0, 2.0, math.log(2), 2 * math.log(2)], np.float32)
  with jax.enable_x64(False):
    arguments = [at for _ in FORMS[name][:-1]] + [np.ones_like(at)]
    beside = [np.nextafter(x, np.float32(2), dtype=np.float32) for x in arguments[:-1]]
    _, exact = GRADIENTS[name](*arguments)
    _, near = GRADIENTS[name](*beside, arguments[-1])
  for one, other in zip(exact, near, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('name', 'argument'), TRENDS)
def test_laplace_is_monotone(name, argument):
  grid = np.geomspace(1e-6, 1e3, 400)
  others = np.random.default_rng(2).uniform(0.1, 4, size=(4, 3))
  for other in others:
    args = [grid if a == argument else o for a, o in zip(FORMS[name], other, strict=False)]
    values = float64(name, *args)
    change = TRENDS[name, argument] * np.diff(values)
    assert (change >= -1e-14 * np.abs(values[1:])).all()


@pytest.mark.parametrize('name', FORMS)
def test_laplace_in_float32(name):
  decades = np.geomspace(1e-3, 1e3, 25)
  ratios = np.array(list(itertools.product(*[decades] * (len(FORMS[name]) - 1))), np.float32)
  for scale in np.float32([1e-6, 1e-2, 1, 1e3]):
    args = [*(ratios * scale).T, np.broadcast_to(scale, len(ratios))]
    found = JITTED[name](*args)
    exact = float64(name, *args)
    assert found.dtype == jnp.float32
    normal = exact > 1e-30  # below, exp(-b) itself leaves float32
    # exp(-b) is as accurate as b, which a rounding moves by b * eps
    loss = 1 + (args[0] / scale if 'threshold' in FORMS[name] else 0)
    error = np.abs(np.asarray(found, float) - exact) / np.where(normal, exact, 1)
    assert (error < 1e-6 * loss)[normal].all(), (scale, error.max())
    assert (np.asarray(found)[~normal] < 1e-29).all()


@given(
  b=st.floats(0, 40), d=st.floats(1e-6, 40), scale=st.floats(1e-6, 1e6), unit=st.floats(1e-3, 1e3)
)
def test_laplace_identities(b, d, scale, unit):
  threshold, step = b * scale, d * scale
  get = lambda name, *args: float(float64(name, *args))
  error = get('distortion', threshold, step, scale)
  kept = get('retained_energy', threshold, step, scale)
  assert error + kept == pytest.approx(2 * scale**2, rel=1e-12)
  assert get('survivor_error', step, scale) <= scale**2
  assert get('survivor_offset', step, scale) <= step / 2 * (1 + 1e-12)
  # units of length cancel
  moved = get('distortion', threshold * unit, step * unit, scale * unit)
  assert moved == pytest.approx(unit**2 * error, rel=1e-9)
  moved = get('entropy', threshold * unit, step * unit, scale * unit)
  assert moved == pytest.approx(get('entropy', threshold, step, scale), rel=1e-9, abs=1e-14)
