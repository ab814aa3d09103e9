"Figures: exact values in every chart form, NaN refused, and what a page without plotly.js shows."
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from monosem.core import Estimate
from monosem.plotting import (StoredFigure, arrows, curves, estimates, faint, histogram, lines, matrices,
                              matrices_over_bars, stacked_bars)
from test_site import CHROME, needs_chrome

SENTENCE = 'This figure needs plotly.js, which this page does not load.'


A = np.array


def values(trace, *names): return [np.asarray(getattr(trace, k)).tolist() for k in names]


def test_lines_draw_each_column_against_x():
    table = pd.DataFrame({'t': [1, 10, 100], 'up': [1., np.nan, 3.], 'down': [-1., -2., -3.]})
    fig = lines(table, 't', ['down', 'up'], 'A title', 'time', 'height', log_x=True)
    down, up = fig.data
    assert values(down, 'x', 'y') == [[1, 10, 100], [-1, -2, -3]]
    np.testing.assert_array_equal(up.y, [1, np.nan, 3])  # NaN is a gap, not a zero
    assert (down.name, up.name) == ('down', 'up')
    assert down.line.dash != up.line.dash and down.line.color != up.line.color
    assert down.marker.symbol != up.marker.symbol
    assert (fig.layout.xaxis.type, fig.layout.yaxis.type) == ('log', '-')
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ('time', 'height')
    assert fig.layout.showlegend
    swapped = lines(table, 't', ['up'], '', '', '', log_y=True).layout
    assert (swapped.xaxis.type, swapped.yaxis.type) == ('-', 'log')
    assert not swapped.showlegend


@pytest.mark.parametrize('rows,mode', [(39, 'lines+markers'), (40, 'lines')])
def test_few_points_are_marked(rows, mode):
    table = pd.DataFrame({'x': np.arange(rows), 'y': np.arange(rows)})
    assert lines(table, 'x', ['y'], '', '', '').data[0].mode == mode


def test_histogram_bins_hold_their_left_edge_and_the_last_both():
    fig = histogram({'a': A([0, 1, 1, 2, 4]), 'b': A([3])}, '', '', bins=4)
    a, b = fig.data
    for bar in fig.data: assert values(bar, 'x', 'width') == [[.5, 1.5, 2.5, 3.5], [1, 1, 1, 1]]
    assert values(a, 'y') == [[1, 2, 1, 1]] and values(b, 'y') == [[0, 0, 0, 1]]
    assert fig.layout.yaxis.type == '-' and fig.layout.barmode == 'overlay'
    assert histogram({'a': A([1, 2])}, '', '', log_y=True).layout.yaxis.type == 'log'


def test_histogram_adds_weights():
    weights = {'a': A([.5, 2., -1.]), 'b': A([7.])}
    fig = histogram({'a': A([0, 0, 1]), 'b': A([1])}, '', '', bins=2, weights=weights)
    assert [values(bar, 'y') for bar in fig.data] == [[[2.5, -1]], [[0, 7]]]


def test_histogram_bins_follow_the_scale_of_the_values():
    tiny, = histogram({'': A([0, 1e-12, 3e-12, 4e-12])}, '', '', bins=2).data
    assert values(tiny, 'y') == [[2, 2]] and np.allclose(tiny.x, [1e-12, 3e-12], atol=1e-15)
    constant, = histogram({'': np.full(3, 1e12)}, '', '', bins=5).data
    assert sum(constant.y) == 3 and min(constant.width) > 0


def test_whiskers_end_at_the_interval():
    left, right = Estimate(.5, .25, .625, 9), Estimate(-1., -1.5, -.75, 9)
    fig = estimates({'s': {'left': left, 'right': right}, 't': {'right': left}}, '', 'r')
    s, t = fig.data
    assert values(s, 'x', 'y') == [[.5, -1], ['left', 'right']]
    assert values(s.error_x, 'array', 'arrayminus') == [[.125, .25], [.25, .5]]
    assert s.error_x.symmetric is False and s.error_x.type == 'data'
    assert values(t, 'x', 'y') == [[.5], ['right']]
    assert values(t.error_x, 'array', 'arrayminus') == [[.125], [.25]]
    assert s.offsetgroup != t.offsetgroup and fig.layout.scattermode == 'group'
    assert fig.layout.yaxis.autorange == 'reversed'  # the first row on top


NAN = float('nan')


@pytest.mark.parametrize('draw', [
    lambda: histogram({'a': A([0., 1.]), 'b': A([NAN])}, '', ''),
    lambda: histogram({'a': A([0., np.inf])}, '', ''),
    lambda: histogram({'a': A([0., 1.])}, '', '', weights={'a': A([1., NAN])}),
    lambda: histogram({'a': A([])}, '', ''),
    lambda: estimates({'s': {'row': Estimate(NAN, 0, 1, 2)}}, '', ''),
    lambda: estimates({'s': {'row': Estimate(.5, NAN, 1, 2)}}, '', ''),
    lambda: estimates({'s': {'row': Estimate(.5, 0, np.inf, 2)}}, '', ''),
    lambda: lines(pd.DataFrame({'x': [0, NAN], 'y': [0, 1]}), 'x', ['y'], '', '', ''),
    lambda: lines(pd.DataFrame({'x': [0, 1], 'y': [NAN]*2}), 'x', ['y'], '', '', ''),
    lambda: lines(pd.DataFrame({'x': [0, 1]}), 'x', ['z'], '', '', '')],
    ids=['value', 'infinity', 'weight', 'none', 'estimate', 'low', 'high', 'x', 'line', 'column'])
def test_what_cannot_be_drawn_is_refused(draw):
    with pytest.raises(ValueError, match='got .*; expected .*; .*'): draw()


def fragment(y=2, frames=False):
    "The HTML that a notebook stores of a figure of one line."
    moves = [go.Frame(data=[go.Scatter(y=[y, 0])], name='end')] if frames else None
    fig = go.Figure(go.Scatter(y=[0, y]), frames=moves)
    return StoredFigure().to_mimebundle(fig.to_dict())['text/html']


def test_a_stored_figure_says_what_it_needs():
    html = fragment()
    assert html.count(SENTENCE) == 1 and html.index(SENTENCE) < html.index('<script')
    assert html == fragment() != fragment(3)
    assert html.count('id="fig-') == 1  # one id, the figure's own


@needs_chrome
@pytest.mark.parametrize('frames', [False, True])
@pytest.mark.parametrize('with_plotly', [True, False])
def test_only_a_page_without_plotly_shows_the_sentence(root, tmp_path, with_plotly, frames):
    sync = pytest.importorskip('playwright.sync_api')
    plotly = (root/'nbs/vendor/plotly/plotly-cartesian.min.js').as_uri()
    head = f'<script src="{plotly}"></script>' if with_plotly else ''
    page = tmp_path/'page.html'
    page.write_text(f'<meta charset="utf-8">{head}{fragment(frames=frames)}<p id="below">below',
                    encoding='utf-8')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox', '--disable-gpu'])
        tab = b.new_page()
        tab.goto(page.as_uri(), wait_until='load')
        tab.wait_for_timeout(300)
        text = tab.evaluate('document.querySelector(".plotly-graph-div").innerText')
        drawn = tab.locator('.main-svg .trace').count()
        top = tab.evaluate('document.querySelector("#below").getBoundingClientRect().top')
        b.close()
    assert (SENTENCE in text) != with_plotly and (drawn > 0) == with_plotly
    assert top > 300  # either way the figure keeps its place


def test_a_curve_lies_in_the_band_of_its_intervals():
    points = {1.: Estimate(2., 1., 4., 9), 10.: Estimate(3., 2., 7., 9)}
    fig = curves({'a': points, 'b': points}, 'A title', 'time', 'height', log_x=True)
    band, line = fig.data[:2]
    assert values(band, 'x', 'y') == [[1, 10, 10, 1], [4, 7, 2, 1]]  # out along the upper ends, back along the lower
    assert values(line, 'x', 'y') == [[1, 10], [2, 3]]
    assert (band.fill, band.mode, band.fillcolor) == ('toself', 'lines', faint(line.line.color))
    assert (band.showlegend, line.name, fig.data[3].name) == (False, 'a', 'b')
    assert line.line.dash != fig.data[3].line.dash
    assert (fig.layout.xaxis.type, fig.layout.yaxis.type) == ('log', '-')
    with pytest.raises(ValueError, match="NaN or infinite numbers for .10.0. in 'a'"):
        curves({'a': points | {10.: Estimate(3., np.nan, 7., 9)}}, '', '', '')


def test_arrows_go_from_the_origin_and_sets_share_a_look():
    W = A([[1., 0., -1.], [0., 2., 0.]])
    fig = arrows({str(i): W for i in range(5)}, 'A title', reach=2.5)
    assert [values(t, 'x', 'y') for t in fig.data[:3]] == [[[0, 1], [0, 0]], [[0, 0], [0, 2]], [[0, -1], [0, 0]]]
    assert len({t.line.color for t in fig.data[:3]}) == 3 and {t.line.dash for t in fig.data} == {'solid'}
    assert len([a for a in fig.layout if a.startswith('xaxis')]) == 5  # no empty sixth panel
    assert [a.text for a in fig.layout.annotations] == list('01234') and fig.data[-1].yaxis == 'y5'
    assert fig.layout.xaxis4.range == (-2.5, 2.5) and fig.layout.yaxis4.scaleanchor == 'x4'
    looks = [(t.line.color, t.line.dash, t.marker.symbol) for t in arrows({'a': W}, '', set_size=2).data]
    assert looks[0] == looks[1] and all(a != b for a,b in zip(looks[0], looks[2]))
    with pytest.raises(ValueError, match='shape .3, 2.'): arrows({'a': W.T}, '')
    with pytest.raises(ValueError, match='no panel'): arrows({}, '')


def test_matrices_share_one_scale_around_zero():
    square, oblong = A([[1., -3.], [0., 2.]]), A([[1., 2., .5]])
    fig = matrices({'a': square, 'b': oblong}, 'A title', 'cosine', 'column', 'row')
    scale = fig.layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (-3, 3, 'cosine')
    assert [values(t, 'z')[0] for t in fig.data] == [square.tolist(), oblong.tolist()]
    assert fig.layout.yaxis.scaleanchor == 'x' and fig.layout.yaxis2.scaleanchor is None
    assert fig.layout.yaxis.autorange == 'reversed' and fig.layout.yaxis.title.text == 'row'
    assert matrices({'a': square}, '', '', reach=5.).layout.coloraxis.cmax == 5


def test_bars_and_stacks_hold_lengths_and_shades():
    lengths, shades = A([[1., .5], [0., 2.]]), A([[0., 1.], [.5, 3.]])
    M = A([np.eye(2), -np.eye(2)])
    fig = matrices_over_bars(M, lengths, shades, ['a', 'b'], 'A title')
    assert [t.type for t in fig.data] == ['heatmap', 'bar']*2
    assert values(fig.data[2], 'z')[0] == (-np.eye(2)).tolist() and values(fig.data[3], 'x')[0] == [0, 2]
    assert list(fig.data[3].marker.color) == [.5, 3] and fig.data[3].orientation == 'h'
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis2.cmin) == (-1, 0)
    with pytest.raises(ValueError, match='1 panels of shades and 2 names'):
        matrices_over_bars(M, lengths, shades[:1], ['a', 'b'], '')
    stack = stacked_bars(lengths, shades, ['a', 'b'], 'A title', 'model', 'norms')
    assert [values(t, 'y')[0] for t in stack.data[:2]] == [[1, 0], [.5, 2]]  # a trace per part
    assert stack.data[0].marker.color[0] != stack.data[1].marker.color[0]
    assert stack.layout.barmode == 'stack' and stack.layout.xaxis.title.text == 'model'
    with pytest.raises(ValueError, match='1 names'): stacked_bars(lengths, shades, ['a'], '', '', '')


def test_a_long_title_is_broken_when_a_figure_is_stored():
    bundle = StoredFigure().to_mimebundle(go.Figure(layout_title='word '*30).to_dict())
    text = bundle['application/vnd.plotly.v1+json']['layout']['title']['text']
    assert max(map(len, text.split('<br>'))) <= 72 and text.replace('<br>', ' ') == ('word '*30).strip()
    kept = StoredFigure().to_mimebundle(go.Figure(layout_title='x'*80+'<br>y').to_dict())
    assert kept['application/vnd.plotly.v1+json']['layout']['title']['text'] == 'x'*80+'<br>y'
