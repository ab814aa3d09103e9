"Figures: exact values in every chart form, NaN refused, and what a page without plotly.js shows."
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from monosem.core import Estimate
from monosem.plotting import StoredFigure, estimates, histogram, lines
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
