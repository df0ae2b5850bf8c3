"""Pictures are drawn where matplotlib is, and refused with a reason otherwise."""

import sys

import pytest

from opq_jax.report import plots
from opq_jax.report.plots import Curve

CURVES = [
  Curve('ours', [3e6, 1e6, 2e6], [0.9, 0.7, 0.8], [(0.8, 1.0), (0.6, 0.8), (0.7, 0.9)]),
  Curve('ours', [1e6, 3e6], [0.1, 0.5], variant='not corrected'),
  Curve('other', [1e6, 3e6], [0.6, 0.9]),
  Curve('other', [1e6, 3e6], [0.0, 0.4], variant='not corrected'),
]


@pytest.fixture
def figures(monkeypatch):
  """The figures that are saved."""
  figure = pytest.importorskip('matplotlib.figure')
  seen = []
  save = figure.Figure.savefig

  def savefig(self, path, **options):
    seen.append(self)
    save(self, path, **options)

  monkeypatch.setattr(figure.Figure, 'savefig', savefig)
  return seen


def test_accuracy_plot_is_a_small_png(tmp_path, figures):
  path = tmp_path / 'picture.png'
  plots.accuracy_over_size(path, CURVES, baseline=0.905, title='title')
  assert path.read_bytes().startswith(b'\x89PNG')
  assert path.stat().st_size < 150_000
  [axes] = figures[0].axes
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend == ['ours', 'other', 'not corrected', 'float32: 90.5 %']


def test_accuracy_plot_sorts_and_colours(tmp_path, figures):
  plots.accuracy_over_size(tmp_path / 'picture.png', CURVES)
  lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata())]
  assert list(lines[0].get_xdata()) == [1.0, 2.0, 3.0]
  assert list(lines[0].get_ydata()) == pytest.approx([70, 80, 90])
  colours = [line.get_color() for line in lines]
  assert colours[0] == colours[1] != colours[2] == colours[3]
  assert [line.get_linestyle() for line in lines] == ['-', '--', '-', '--']


@pytest.mark.parametrize(
  ('curves', 'match'),
  [
    ([], 'curves: found none'),
    ([Curve('a', [], [])], 'a: found 0 sizes'),
    ([Curve('a', [1.0, 2.0], [0.5])], 'a: found 2 sizes, 1 accuracies'),
    ([Curve('a', [1.0], [0.5], [(0, 1), (0, 1)])], '2 bounds'),
  ],
)
def test_accuracy_plot_refuses_no_points(tmp_path, curves, match):
  with pytest.raises(ValueError, match=match):
    plots.accuracy_over_size(tmp_path / 'picture.png', curves)
  assert not list(tmp_path.iterdir())


def test_plots_name_the_missing_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(ValueError, match=r'opq_jax\[plots\]'):
    plots.accuracy_over_size(tmp_path / 'picture.png', CURVES)


def test_seconds_plot_has_proportional_line(tmp_path, figures):
  curves = {'a file': [(1e9, 80.0), (1e6, 0.1)], 'a folder': [(1e6, 1.0), (1e9, 100.0)]}
  plots.seconds_over_weights(tmp_path / 'picture.png', curves)
  [axes] = figures[0].axes
  assert (axes.get_xscale(), axes.get_yscale()) == ('log', 'log')
  first, second, proportion = axes.lines
  assert list(first.get_xdata()) == list(second.get_xdata()) == [1e6, 1e9]
  assert list(first.get_ydata()) == [0.1, 80.0]
  assert list(proportion.get_ydata()) == pytest.approx([0.08, 80.0])
  for nothing in ({}, {'a file': []}):
    with pytest.raises(ValueError, match='curves: found'):
      plots.seconds_over_weights(tmp_path / 'picture.png', nothing)


def test_divergence_plot_draws_every_codec(tmp_path, figures):
  curves = {f'codec {number}': [(4.0, 0.1), (2.0, 1.0 + number)] for number in range(9)}
  plots.divergence_over_bits(tmp_path / 'picture.png', curves, title='a network')
  [axes] = figures[0].axes
  assert (axes.get_xscale(), axes.get_yscale()) == ('linear', 'log')
  for number, line in enumerate(axes.lines):
    assert list(line.get_xdata()) == [2.0, 4.0]
    assert list(line.get_ydata()) == [1.0 + number, 0.1]
  looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
  assert len(looks) == 9
  assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
  with pytest.raises(ValueError, match='curves: found'):
    plots.divergence_over_bits(tmp_path / 'picture.png', {'codec': []})
