"The rendered pages, in a headless Chromium with the network watched. `make test` renders them first."
import functools, http.server, json, os, re, shutil, threading, time

import pytest

from monosem.site import (build_site, check_links, code_of, cut_ties, fold_imports, imports_only, localize,
                          page_markdown, page_name, rename_chapters, show_sources, written_signature)

CHROME = os.environ.get('CHROME') or shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
if os.environ.get('CI') and not CHROME: raise RuntimeError('no Chromium in CI; expected one on the PATH or in $CHROME; .ci/run installs it')
needs_chrome = pytest.mark.skipif(not CHROME, reason='no Chromium on the PATH or in $CHROME: the page tests did not run')
PAGES = ['index', 'toy_models', 'phases', 'geometry', 'dynamics', 'adversaries', 'computation', 'memorisation', 'recovery', 'recipe', 'controls', 'world', 'corpus', 'sources', 'tokens', 'transformer', 'hooked', 'activations', 'sae', 'training', 'resampling', 'evaluation', 'features', 'proxies', 'steering', 'neuron_embeddings', 'one_meaning', 'mnist',
         'active', 'kernels', 'gpu_kernels', 'parallel', 'reproduce', 'cli', 'core', 'checkpoints', 'planted', 'plotting', 'site']


@pytest.fixture(scope='module')
def site(root):
    if not (root/'_docs/index.html').exists():
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
             '_docs/a.html.md': '# A', '_docs/a.css': '',
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
     'a.html -> https://cdn.example/x.js: loaded from another machine'),
    ('_docs/a.css', '', '@import "https://cdn.example/a.css";p{}',
     'a.css -> https://cdn.example/a.css: loaded from another machine'),
    ('_docs/a.css', '', 'p{background:url(//cdn.example/a.png)}',
     'a.css -> //cdn.example/a.png: loaded from another machine')])
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


def exported(source): return cell('code', f'#| exports: true\n{source}')


def documented(name, call=None):
    text = (f'---\n\n[source](https://x.example/blob/main/m/a.py#L3){{target="_blank" style="float:right"}}\n\n### {name}\n\n'
            f'```python\ndef {name}(\n    *args, **kwargs\n):\n```\n\n*What `{name}` is.*')
    return cell('code', f'#| echo: false\n#| output: asis\nshow_doc({call or name})', {'text/markdown': text})


MODULE = """
@decorator
class A(NamedTuple):
    "A."
    x: int # The x
    y: dict[str,
            int] = {} # The y
    def go(self,
        n:int, # Steps
    ) -> int: # Where to
        "Go."
        return n
    def _private(self): pass
class B:
    def __init__(self, z:int): self.z = z # set
def f(a:str='é', # Any
): return a
def g(): "One line."
class C(Exception): pass
"""


@pytest.mark.parametrize('name,text', [
    ('A', '@decorator\nclass A(NamedTuple):\n    x: int # The x\n    y: dict[str,\n            int] = {} # The y\n\n'
          '    def go(self,\n        n:int, # Steps\n    ) -> int: # Where to\n        "Go."'),
    ('A.go', '    def go(self,\n        n:int, # Steps\n    ) -> int: # Where to'),
    ('B', 'class B:\n    def __init__(self, z:int):'), ('f', "def f(a:str='é', # Any\n):"), ('g', 'def g():'),
    ('C', 'class C(Exception):')])
def test_a_signature_is_as_it_was_written(name, text): assert written_signature(MODULE, name) == text


def test_a_symbol_is_explained_once(tmp_path):
    (tmp_path/'a.py').write_text(MODULE, encoding='utf-8')
    source = 'class A: pass\n\ndef g(): pass\n\ndef _h(): pass'
    cells = [cell('markdown', '## A'), documented('g'), exported(source), documented('A'), cell('markdown', '## Records'),
             documented('A', 'm.a.A'), cell('markdown', '## F'), documented('f'), cell('code', 'f()'), documented('f', 'm.a.f')]
    got = [''.join(c['source']) for c in show_sources(cells, tmp_path)]
    link = '[source](https://x.example/blob/main/m/a.py#L3){.api-source}'
    assert got == ['## A {#on-a}', f'{link}[]{{id="g"}}\n\n### A · g {{#a .api}}', source, '## F {#on-f}',
                   f"{link}\n\n### f {{#f .api}}\n\n```python\ndef f(a:str='é', # Any\n):\n```\n\n*What `f` is.*", 'f()']


def test_links_are_renamed_and_code_is_not(tmp_path):
    names, text = ('06_sae.ipynb', 'index.ipynb'), '[a](06_sae.ipynb#x) 06_sae.ipynb [b](index.ipynb)'
    new = text.replace('(06_sae', '(sae')
    for name in names:
        cells = [cell('markdown', text), cell('code', text, {'text/markdown': [text], 'text/plain': text})]
        (tmp_path/name).write_text(json.dumps(dict(cells=cells)), encoding='utf-8')
    (tmp_path/'_quarto.yml').write_text('a: [index.ipynb, 06_sae.ipynb]', encoding='utf-8')
    rename_chapters(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'sae.ipynb', 'index.ipynb', '_quarto.yml'}
    assert (tmp_path/'_quarto.yml').read_text(encoding='utf-8') == 'a: [index.ipynb, sae.ipynb]'
    prose, code = json.loads((tmp_path/'sae.ipynb').read_text(encoding='utf-8'))['cells']
    assert prose['source'] == new and ''.join(code['source']) == text
    assert code['outputs'][0]['data'] == {'text/markdown': new, 'text/plain': text}


def test_only_imports_are_folded():
    kept = ['x = 1', 'import a\nx = a.b()', 'plotting.use()', 'print(1)', '%matplotlib inline\nimport a', '']
    cells = [cell('code', s) for s in kept] + [cell('markdown', 'import a')]
    assert fold_imports(cells) == cells
    setting = ['import a', 'from a import b; a.use()', 'import pandas as pd\npd.set_option("x", 1)\n', '#| exports\nimport re']
    folded = fold_imports([cell('code', s) for s in setting] + cells)
    assert code_of(folded[0]).splitlines() == [l for s in setting for l in s.splitlines() if l[0] != '#']
    assert folded[1:] == cells and folded[0]['source'].startswith('#| code-fold: true')


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


MEASURE = """() => {
    const all = s => [...document.querySelectorAll(s)], style = e => getComputedStyle(e);
    all('main details').forEach(d => d.open = true);
    const wide = all('main pre, main .katex-display, main table').filter(e => e.scrollWidth > e.clientWidth+1);
    const main = document.querySelector('main');
    return {page: document.documentElement.scrollWidth-window.innerWidth, main: main.scrollWidth-main.clientWidth,
            wide: wide.map(e => `${e.tagName} +${e.scrollWidth-e.clientWidth}: ${e.textContent.trim().slice(0, 70)}`),
            unmarked: wide.filter(e => !/auto|scroll/.test(style(e).overflowX) || !/local/.test(style(e).backgroundAttachment)
                                       || !/gradient/.test(style(e).backgroundImage)).length}}"""
LOOK = """() => {
    const all = s => [...document.querySelectorAll(s)];
    const solid = d => (d.data || []).some(t => /3d$|^(surface|cone|volume|isosurface|streamtube)$/.test(t.type));
    const flat = '.main-svg .plot, .main-svg .traces, .main-svg .trace, .heatmaplayer image';
    return {figures: all('.plotly-graph-div').length,
            drawn: all('.plotly-graph-div').filter(d => d.querySelector(solid(d) ? '.gl-container canvas' : flat)).length,
            math: all('.math').length, typeset: all('.math .katex, .katex').length,
            raw: all('main p').filter(p => /\\$\\$|\\\\(frac|mathbb|texttt)/.test(p.childElementCount ? '' : p.textContent)).length,
            missing: all('.plotly-graph-div > p').length, failed: all('.katex-error').length,
            codes: all('main pre.sourceCode').map(e => e.textContent.trim()),
            open: all('main .cell pre.sourceCode').filter(e => !e.closest('details:not([open])')).map(e => e.textContent.trim()),
            folded: all('main details:not([open]) > summary').filter(e => e.textContent.trim() == 'Imports').length,
            symbols: all('main .api > h3').map(e => e.textContent.trim()),
            empty: all('main section.level2').filter(s => s.children.length < 2).map(s => s.id),
            placeholders: all('main svg text').filter(e => /Click to enter/.test(e.textContent)).length,
            covered: all('.plotly-graph-div').filter(d => {
                const boxes = s => [...d.querySelectorAll(s)].map(e => e.getBoundingClientRect());
                return boxes('.legend').some(a => boxes('.xtitle').some(b => b.width && a.top < b.bottom-2 && b.top < a.bottom-2
                                                                              && a.left < b.right && b.left < a.right));
            }).map(d => d.id),
            background: getComputedStyle(document.body).backgroundColor}}"""


@pytest.fixture(scope='module')
def visit(browser):
    "What a page looks like: on a phone, and in the light at 1280 px too. Each page is opened once a scheme."
    b, base = browser
    @functools.cache
    def look(page, scheme):
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
        tab.goto(f'{base}/{page}.html', wait_until='load', timeout=120_000)
        tab.wait_for_timeout(300)
        wait = time.time()+60  # 3-D figures are drawn in software
        while (got := tab.evaluate(LOOK))['drawn'] < got['figures'] and time.time() < wait: tab.wait_for_timeout(500)
        got |= dict(outside=outside, errors=errors, phone=tab.evaluate(MEASURE))
        if scheme == 'light':
            tab.set_viewport_size(dict(width=1280, height=900))
            tab.wait_for_timeout(100)
            got['desk'] = tab.evaluate(MEASURE)
        ctx.close()
        return got
    return look


@needs_chrome
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', PAGES)
def test_page_is_whole_and_local(visit, page, scheme):
    got = visit(page, scheme)
    assert not got['outside'] and not got['errors']
    assert got['drawn'] == got['figures'] and got['failed'] == 0 and got['raw'] == 0
    assert got['missing'] == 0  # no figure says that it needs plotly.js
    assert got['typeset'] >= got['math']
    red = int(got['background'].split('(')[1].split(',')[0])
    assert (red < 100) == (scheme == 'dark'), got['background']


@needs_chrome
@pytest.mark.parametrize('page', PAGES)
def test_nothing_is_cut_beside_the_sidebar(visit, page):
    "At 1280 px every line of code, formula and table is seen whole."
    desk = visit(page, 'light')['desk']
    assert not desk['wide'] and desk['main'] <= 1 and desk['page'] <= 0


@needs_chrome
@pytest.mark.parametrize('page', PAGES)
def test_what_is_wide_scrolls_in_its_box_and_says_so(visit, page):
    "At 390 px the page never moves sideways; a box that does has a shade at its edge; no legend covers an axis title."
    got = visit(page, 'light')
    phone = got['phone']
    assert phone['page'] <= 0 and phone['main'] <= 1 and phone['unmarked'] == 0
    assert not got['covered'] and got['placeholders'] == 0


def notebook_of(root, page):
    path, = [p for p in (root/'nbs').glob('*.ipynb') if page_name(p.name) == f'{page}.ipynb']
    return json.loads(path.read_text(encoding='utf-8'))


@needs_chrome
@pytest.mark.parametrize('page', PAGES)
def test_exported_source_is_on_the_page_once_and_imports_are_folded(visit, root, page):
    got, cells = visit(page, 'light'), notebook_of(root, page)['cells']
    for c in cells:
        if re.match(r'#\|\s*exports\b', ''.join(c['source'])):
            assert sum(code_of(c) in code for code in got['codes']) == 1, code_of(c)[:200]
    assert not [code for code in got['open'] if imports_only(code)]
    hidden = [c for c in cells if re.match(r'#\|\s*(export|exporti|hide|default_exp)\b', ''.join(c['source']))]
    assert (got['folded'] > 0) == any(imports_only(code_of(c)) for c in cells if c not in hidden)
    assert len(set(got['symbols'])) == len(got['symbols']) and not got['empty']


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


# The head of a page as Quarto 1.10 writes it, shortened; two themes' fonts come with its style sheets.
QUARTO = """<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en" xml:lang="en"><head>
<meta charset="utf-8">
<meta name="generator" content="quarto-1.10.1">
<meta name="viewport" content="width=device-width, initial-scale=1.0, user-scalable=yes">
<title>Sums – y</title>
<script src="site_libs/quarto-nav/quarto-nav.js"></script>
<script src="site_libs/quarto-search/fuse.min.js"></script>
<meta name="quarto:offset" content="./">
<link href="site_libs/bootstrap/bootstrap-1f2e.min.css" rel="stylesheet" class="quarto-color-scheme" id="quarto-bootstrap" data-mode="light">
<link href="site_libs/bootstrap/bootstrap-dark-3c4d.min.css" rel="stylesheet" class="quarto-color-scheme quarto-color-alternate" id="quarto-bootstrap" data-mode="dark">
<script id="quarto-search-options" type="application/json">{"location": "navbar", "type": "overlay"}</script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-c3Nl8+7g==" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" integrity="sha512-bLT0Qm9V==" crossorigin="anonymous" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="vendor/plotly/plotly-cartesian.min.js"></script>
<script src="vendor/katex/katex.min.js" defer=""></script>
<script>document.addEventListener("DOMContentLoaded", function () { define = 1 });</script>
<link rel="stylesheet" href="vendor/katex/katex.min.css">
<link rel="stylesheet" href="styles.css">
</head>
<body class="nav-sidebar floating nav-fixed">
<a href="https://x.example/y/">home</a> <a href="https://github.com/x/y/blob/main/nbs/01_sums.ipynb">source</a>
<main class="content" id="quarto-document-content">BODY</main></body></html>
"""
FIGURE = '<div id="fig-1" class="plotly-graph-div"></div><script>Plotly.newPlot("fig-1", [{"type":"TYPE"}])</script>'


def quarto_site(folder, body):
    "A staged notebook, and the one page that Quarto made of it."
    proc, made = folder/'_proc', folder/'_proc/_docs'
    head = '---\ntitle: Sums\ndescription: Small.\noutput-file: sums.html\n---'
    css = ':root{--bs-blue:#2780e3}.a{background:url("data:image/svg+xml,%3csvg xmlns=\'http://www.w3.org/2000/svg\'/%3e")}'
    files = {'_proc/01_sums.ipynb': json.dumps(dict(cells=[cell('raw', head)])), 'nbs/01_sums.ipynb': '{}',
             '_quarto.yml': 'website: {site-url: https://x.example/y, repo-url: https://github.com/x/y, repo-branch: main}',
             'monosem/sums.py': '"""Sums.\n\nDocs: https://x.example/y/sums.html.md"""',
             '_proc/_docs/sums.html': QUARTO.replace('BODY', body), '_proc/_docs/index.html': '<p>', '_proc/_docs/styles.css': '',
             '_proc/_docs/site_libs/bootstrap/bootstrap-1f2e.min.css':
                 '@import"https://fonts.googleapis.com/css2?family=Source+Sans+Pro:wght@300;400;700&display=swap";'+css,
             '_proc/_docs/site_libs/bootstrap/bootstrap-dark-3c4d.min.css':
                 '@import url(https://fonts.googleapis.com/css2?family=Lato:ital,wght@0,400;0,700;1,400&display=swap);'+css,
             '_proc/_docs/site_libs/quarto-nav/quarto-nav.js': '', '_proc/_docs/site_libs/quarto-search/fuse.min.js': ''}
    files['_proc/_quarto.yml'] = files['_quarto.yml']
    for name in ('plotly/plotly-cartesian.min.js', 'katex/katex.min.js', 'katex/katex.min.css'): files[f'_proc/vendor/{name}'] = '/**/'
    for name,text in files.items():
        (folder/name).parent.mkdir(exist_ok=True, parents=True)
        (folder/name).write_text(text, encoding='utf-8')
    return proc, made


def test_what_quarto_takes_from_elsewhere_is_seen(tmp_path):
    proc, made = quarto_site(tmp_path, FIGURE)
    problems = check_links(made, tmp_path)
    away = [p.split(' -> ')[1].split('/')[2] for p in problems if p.endswith('loaded from another machine')]
    assert sorted(away) == ['cdnjs.cloudflare.com']*2 + ['fonts.googleapis.com']*2


@pytest.mark.parametrize('kind,loads', [('scatter', 'plotly-cartesian.min.js'), ('mesh3d', 'plotly.min.js'),
                                        ('surface', 'plotly.min.js'), (None, None)])
def test_quartos_page_is_made_local(tmp_path, kind, loads):
    proc, made = quarto_site(tmp_path, FIGURE.replace('TYPE', kind) if kind else '<p>No figure.</p>')
    localize(made, proc)
    assert check_links(made, tmp_path) == []
    html = (made/'sums.html').read_text(encoding='utf-8')
    assert 'require' not in html and 'jquery' not in html and 'define = 1' in html
    assert re.findall(r'vendor/plotly/([\w.-]+)"', html) == ([loads] if loads else [])
    assert 'quarto-nav.js' in html and 'quarto-search-options' in html and 'vendor/katex/katex.min.js' in html
    assert '<a href="index.html">home</a>' in html and 'blob/main/nbs/01_sums.ipynb' in html
    for css in made.glob('site_libs/bootstrap/*.css'): assert css.read_text(encoding='utf-8').startswith(':root{--bs-blue:#2780e3}.a{')


@pytest.mark.parametrize('text,left', [
    ('@import url("https://a.example/b?c;d");p{}', 'p{}'), ("@import url('//a.example/b');p{}", 'p{}'),
    ('@import "https://a.example/b;c" print;p{}', 'p{}'), ('@import"http://a.example/b";@import"c.css";', '@import"c.css";'),
    ('@import url(theme.css);', '@import url(theme.css);'), ('<script src="vendor/require.js"></script>',)*2,
    ('<script src="https://a.example/b.js"></script>',)*2,  # unknown: check_links tells of it
    ('<script>\ndefine(\'jquery\', [], f)</script>\n<script>x</script>', '<script>x</script>')])
def test_ties_are_cut_and_nothing_else(text, left): assert cut_ties(text) == left


@needs_chrome
@pytest.mark.parametrize('first', [True, False])
def test_a_page_with_require_js_still_typesets(browser, root, first):
    "The line in `_quarto.yml` that pins `define`, before and after a loader that defines it: KaTeX is on the window."
    import yaml
    header = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['format']['html']['include-in-header']
    pin = header[0]['text'].removeprefix('<script>').removesuffix('</script>')
    loader = ('var requirejs, require, define; (() => { define = function(name, needs, make) { window.caught = true };'
              ' define.amd = {jQuery: true} })()')
    tab, errors = browser[0].new_page(), []
    tab.on('pageerror', lambda e: errors.append(str(e)))
    scripts = [pin, loader] if first else [loader, pin]
    glue = "define('jquery', [], function() { return window.jQuery })"
    for s in [*scripts, glue, (root/'nbs/vendor/katex/katex.min.js').read_text(encoding='utf-8')]: tab.add_script_tag(content=s)
    assert tab.evaluate('typeof katex.renderToString') == 'function' and not errors
    tab.close()


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
