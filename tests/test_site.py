"The rendered pages, in a headless Chromium with the network watched. `make test` renders them first."
import http.server, os, re, shutil, threading

import pytest

from monosem.site import check_links, page_markdown

CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
if os.environ.get('CI') and not CHROME: raise RuntimeError('no Chromium in CI; expected one on the PATH or in $CHROME; .ci/run installs it')
needs_chrome = pytest.mark.skipif(not CHROME, reason='no Chromium on the PATH or in $CHROME: the page tests did not run')
PAGES = ['index', 'toy_models', 'phases', 'geometry', 'dynamics', 'adversaries', 'computation', 'memorisation', 'recovery', 'corpus', 'sources', 'tokens', 'transformer', 'hooked', 'activations', 'sae', 'training', 'resampling', 'evaluation', 'features', 'proxies', 'steering', 'neuron_embeddings', 'mnist',
         'kernels', 'gpu_kernels', 'parallel', 'reproduce', 'cli', 'core', 'checkpoints', 'planted', 'plotting', 'site']


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


def test_every_page_is_there_and_every_link_holds(site, root):
    assert not [p for p in PAGES if not (site/f'{p}.html').exists()]
    assert not check_links(site, root)


@pytest.mark.parametrize('page', PAGES)
def test_view_source_leads_to_a_notebook_of_the_checkout(site, root, page):
    html = (site/f'{page}.html').read_text(encoding='utf-8')
    source, = re.findall(r'"https://github.com/[^"]*/blob/main/(nbs/[^"]*[.]ipynb)"', html)
    assert (root/source).is_file()


def test_every_module_names_a_page_that_exists(site, root):
    modules = [p for p in (root/'monosem').glob('*.py') if p.name[0] != '_']
    assert len(modules) > 25
    for p in modules:
        name = re.search(r'^Docs: https://monosem.github.io/monosem/(\S+?)"*$',
                         p.read_text(encoding='utf-8'), re.M)[1]
        assert name.endswith('.html.md')
        text = (site/name).read_text(encoding='utf-8')
        assert text.startswith('# ') and f'monosem/{p.name}' in text  # its own API


def test_markdown_pages_link_to_one_another(site):
    for page in PAGES:
        text = (site/f'{page}.html.md').read_text(encoding='utf-8')
        assert '.ipynb)' not in text and 'data:image' not in text
        links = re.findall(r'\]\((\w+\.html\.md)', text)
        assert all((site/link).is_file() for link in links)


def checkout(folder):
    "A made-up checkout with a site of one page that lacks nothing."
    files = {'_quarto.yml': 'website: {site-url: https://x.example/y, repo-url: '
                            'https://github.com/x/y, repo-branch: main}',
             'nbs/01_a.ipynb': '{}',
             'monosem/a.py': '"""A.\n\nDocs: https://x.example/y/a.html.md"""',
             '_docs/a.html.md': '# A',
             '_docs/a.html':
                 '<p id="top"><a href="#top">t</a><a href="a.html#top">t</a>'
                 '<a href="https://elsewhere.example/a.ipynb">out</a>'
                 '<a href="https://github.com/x/y/blob/main/nbs/01_a.ipynb">s</a>'
                 '<a href="https://github.com/x/y/blob/main/monosem/a.py#L1">s</a>'}
    for name,text in files.items():
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text(text, encoding='utf-8')
    return folder/'_docs'


def test_a_whole_site_has_no_problem(tmp_path):
    assert check_links(checkout(tmp_path), tmp_path) == []


REPO = 'https://github.com/x/y'


@pytest.mark.parametrize('file,old,new,problem', [
    ('_docs/a.html', 'nbs/01_a.ipynb', 'nbs/a.ipynb',
     f'a.html -> {REPO}/blob/main/nbs/a.ipynb: no such file in the repository'),
    ('_docs/a.html', 'blob/main/monosem/a.py', 'edit/main/monosem/b.py',
     f'a.html -> {REPO}/edit/main/monosem/b.py#L1: no such file in the repository'),
    ('monosem/a.py', 'a.html.md', 'b.html.md',
     'monosem/a.py -> https://x.example/y/b.html.md: no such page'),
    ('monosem/a.py', 'x.example/y', 'x.example/z',
     'monosem/a.py -> https://x.example/z/a.html.md: no such page'),
    ('_docs/a.html', 'a.html#top', 'b.html', 'a.html -> b.html: no such file'),
    ('_docs/a.html', 'a.html#top', 'a.html#end', 'a.html -> a.html#end: no such anchor'),
    ('_docs/a.html', '"#top"', '"#end"', 'a.html -> #end: no such anchor'),
    ('_docs/a.html', '<p', '<script src="https://cdn.example/x.js"></script><p',
     'a.html -> https://cdn.example/x.js: loaded from another machine')])
def test_one_broken_link_is_one_problem(tmp_path, file, old, new, problem):
    site, path = checkout(tmp_path), tmp_path/file
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace(old, new), encoding='utf-8')
    assert check_links(site, tmp_path) == [problem]


def test_links_are_checked_against_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match='without _quarto.yml'):
        check_links(tmp_path, tmp_path)


def cell(kind, source, *outputs):
    outputs = [dict(output_type='display_data', data=d) for d in outputs]
    return dict(cell_type=kind, source=source.splitlines(keepends=True), outputs=outputs)


def test_markdown_page_is_prose_code_and_what_it_printed():
    head = '---\ntitle: Sums\ndescription: "Small: one."\noutput-file: sums.html\n---\n'
    printed = cell('code', '#| slow: true\nf(1)\n"""```"""', {},
                   {'text/plain': ['1\n', '2'], 'text/html': ['<b>']},
                   {'text/html': ['<div>'], 'application/json': {}})
    printed['outputs'].insert(0, dict(output_type='stream', text=['a\n', 'b\n']))
    api = cell('code', '#| echo: false\n#| output: asis\nshow_doc(f)',
               {'text/markdown': ['### f'], 'text/plain': ['f']})
    prose = 'See [b](06a_b.ipynb#x), [c](https://x.example/c.ipynb).\n\n    kept'
    nb = dict(cells=[cell('raw', head), cell('markdown', '<!-- WARNING: a program -->'),
                     cell('markdown', prose), printed, api])
    assert page_markdown(nb) == """# Sums

> Small: one.

See [b](b.html.md#x), [c](https://x.example/c.ipynb).

    kept

````python
f(1)
\"\"\"```\"\"\"
````

    a
    b

    1
    2

*A figure is left out here; [sums.html](sums.html) shows it.*

### f
"""


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
        missing: document.querySelectorAll('.plotly-graph-div > p').length,
        failed: document.querySelectorAll('.katex-error').length, title: document.title,
        dark: getComputedStyle(document.body).backgroundColor})''')
    ctx.close()
    assert not outside and not errors
    assert got['wide'] <= 0, f'sideways scroll of {got["wide"]} px at 390 px'
    assert got['drawn'] == got['figures'] and got['failed'] == 0 and got['raw'] == 0
    assert got['missing'] == 0  # no figure says that it needs plotly.js
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
