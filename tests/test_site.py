"The rendered pages, in a headless Chromium with the network watched. `make test` renders them first."
import http.server, os, shutil, threading

import pytest

from monosem.site import check_links

CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
if os.environ.get('CI') and not CHROME: raise RuntimeError('no Chromium in CI; expected one on the PATH or in $CHROME; .ci/run installs it')
needs_chrome = pytest.mark.skipif(not CHROME, reason='no Chromium on the PATH or in $CHROME: the page tests did not run')
PAGES = ['index', 'toy_models', 'phases', 'geometry', 'dynamics', 'adversaries', 'computation', 'memorisation', 'recovery', 'corpus', 'sources', 'transformer', 'activations', 'sae', 'training', 'resampling', 'evaluation', 'features', 'proxies', 'steering', 'neuron_embeddings', 'mnist',
         'kernels', 'gpu_kernels', 'parallel', 'reproduce', 'cli', 'core', 'checkpoints', 'plotting', 'site']


@pytest.fixture(scope='module')
def site(root):
    if not (root/'_docs/index.html').exists():
        from monosem.site import build_site
        build_site(root)
    return root/'_docs'


@pytest.fixture(scope='module')
def browser(site):
    "A Chromium and the address of the site on this machine."
    sync = pytest.importorskip('playwright.sync_api')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(site))
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                              '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield b, f'http://127.0.0.1:{server.server_port}'
        b.close()
    server.shutdown()


def test_every_page_is_there_and_every_link_holds(site):
    assert not [p for p in PAGES if not (site/f'{p}.html').exists()]
    assert not check_links(site)


@needs_chrome
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', PAGES)
def test_page_is_whole_and_local(browser, page, scheme):
    b, base = browser
    ctx = b.new_context(viewport=dict(width=390, height=844), color_scheme=scheme)
    tab, outside, errors = ctx.new_page(), [], []
    def guard(route):
        if route.request.url.startswith((base, 'data:', 'blob:')): return route.continue_()
        outside.append(route.request.url)
        return route.abort()
    ctx.route('**/*', guard)
    tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.on('response', lambda r: errors.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    tab.goto(f'{base}/{page}.html', wait_until='load')
    tab.wait_for_timeout(300)
    got = tab.evaluate('''() => ({
        wide: document.documentElement.scrollWidth - window.innerWidth,
        figures: document.querySelectorAll('.plotly-graph-div').length,
        drawn: [...document.querySelectorAll('.plotly-graph-div')].filter(d => d.querySelector('.main-svg .plot, .main-svg .traces, .main-svg .trace, .heatmaplayer image, .gl-container canvas')).length,
        math: document.querySelectorAll('.math').length, typeset: document.querySelectorAll('.math .katex, .katex').length,
        raw: [...document.querySelectorAll('main p')].filter(p => /\\$\\$|\\\\(frac|mathbb|texttt)/.test(p.childElementCount ? '' : p.textContent)).length,
        failed: document.querySelectorAll('.katex-error').length, title: document.title,
        dark: getComputedStyle(document.body).backgroundColor})''')
    ctx.close()
    assert not outside and not errors
    assert got['wide'] <= 0, f'sideways scroll of {got["wide"]} px at 390 px'
    assert got['drawn'] == got['figures'] and got['failed'] == 0 and got['raw'] == 0
    assert got['typeset'] >= got['math']
    red = int(got['dark'].split('(')[1].split(',')[0])
    assert (red < 100) == (scheme == 'dark'), got['dark']


@needs_chrome
def test_figures_formulas_and_search_exist_where_they_should(browser):
    b, base = browser
    tab = b.new_page()
    tab.goto(f'{base}/sae.html', wait_until='load')
    tab.wait_for_selector('.katex')
    assert tab.locator('.plotly-graph-div .main-svg').count() > 0
    tab.goto(f'{base}/proxies.html', wait_until='load')
    assert tab.locator('.plotly-graph-div .main-svg').count() >= 3
    assert tab.get_by_text('test_contexts').count() > 0  # the API table
    hit = tab.evaluate('async () => (await (await fetch("search.json")).json()).some(e => /alphabet_proxy/.test(JSON.stringify(e)))')
    assert hit


@needs_chrome
@pytest.mark.parametrize('page', ['toy_models', 'dynamics'])
def test_slider_works_with_no_kernel(browser, page):
    "A click on a slider's other end draws another frame."
    b, base = browser
    tab = b.new_page(viewport=dict(width=1280, height=900))
    tab.goto(f'{base}/{page}.html', wait_until='load')
    figure = tab.locator('.plotly-graph-div', has=tab.locator('.slider-container')).first
    figure.scroll_into_view_if_needed()
    state = lambda: figure.evaluate('d => JSON.stringify(d._fullData.map(t => [t.x, t.y, t.z].map(v => v && Array.from(v, r => r && r.length && typeof r !== "string" ? Array.from(r) : r))))')
    before = state()
    box = figure.locator('.slider-rail-touch-rect').first.bounding_box()
    tab.mouse.click(box['x']+.7*box['width'], box['y']+box['height']/2)
    tab.wait_for_timeout(1000)
    assert state() != before
