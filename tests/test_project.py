"The project's own rules: settings, layers, notebooks, README, documentation."
import ast, builtins, configparser, dis, importlib, inspect, json, re, runpy, subprocess, sys, tomllib
from pathlib import Path

import pytest

NBS = sorted(Path(__file__).parents[1].glob('nbs/**/*.ipynb'))
MODULES = sorted(p.stem for p in Path(__file__).parents[1].glob('monosem/*.py') if not p.stem.startswith('_'))


def test_pyproject_follows_from_settings(root):
    text = (root/'pyproject.toml').read_text()
    assert text.split('\n', 1)[1] == runpy.run_path(str(root/'.ci/config.py'))['derive'](root), 'run `make config`'


def test_settings_and_pyproject_agree_field_by_field(root):
    "Independent of the converter: what people edit is what the tools read."
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini')
    s, t = ini['DEFAULT'], tomllib.loads((root/'pyproject.toml').read_text())
    p, n = t['project'], t['tool']['nbdev']
    assert (p['name'], p['description'], p['requires-python']) == (s['lib_name'], s['description'], f">={s['min_python']}")
    assert p['dependencies'] == s['requirements'].split()
    for extra, wanted in p['optional-dependencies'].items(): assert wanted == s[f'{extra}_requirements'].split()
    assert p['urls'] == dict(Repository=s['git_url'], Documentation=s['doc_host']+s['doc_baseurl'])
    assert p['scripts']['monosem'] == 'monosem.cli:main' and n['tst_flags'] == s['tst_flags'] and str(n['custom_sidebar']) == s['custom_sidebar']
    assert importlib.import_module('monosem').__version__ == s['version']
    assert (root/'nbs/_quarto.yml').is_symlink() and (root/s['nbs_path']/s['readme_nb']).exists()


def _chapters() -> dict[str, str]:
    "Module to chapter, in the order of the notebooks' names."
    out = {}
    for p in NBS:
        if m := re.search(r'#\| default_exp (\w+)', p.read_text()): out[m[1]] = p.stem
    return out


def test_imports_point_only_to_lower_chapters(root):
    number, bad, seen = _chapters(), [], 0
    assert set(number) == set(MODULES)
    for m in MODULES:
        for node in ast.walk(ast.parse((root/f'monosem/{m}.py').read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module: continue
            other = node.module.removeprefix('monosem.').split('.')[0]  # nbdev writes `from .core import`
            if (node.level == 1 or node.module.startswith('monosem.')) and other in number:
                seen += 1
                if number[other] >= number[m]: bad.append(f'{m} ({number[m]}) imports {other} ({number[other]})')
    assert not bad and seen > 30


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.name)
def test_notebook_is_small_and_clean(path):
    nb = json.loads(path.read_text())
    assert path.stat().st_size <= 1_000_000
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    shown = json.dumps(outputs)
    assert 'widgets' not in nb['metadata'] and 'widget-view+json' not in shown and 'plotly.js v' not in shown
    assert all(o['output_type'] != 'error' and o.get('name') != 'stderr' for o in outputs)
    assert not re.search(r'(?<!\\)(?:\\\\)*\\r', shown) and not re.search(r'"[^"]*/(home|root|work|tmp)/', shown), 'an output holds a progress bar or a path of this machine'
    assert all(c['execution_count'] is None for c in nb['cells'] if c['cell_type'] == 'code')


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.name)
def test_notebook_has_its_outputs(path):
    "A cell that ends on a value shows it: the stored outputs are part of the source."
    for c in json.loads(path.read_text())['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.search(r'#\| (export|hide|default_exp|eval: false|slow|gpu)', src) or not src.strip(): continue
        last = ast.parse(re.sub(r'^#\|.*$', '', src, flags=re.M)).body[-1:]
        if last and isinstance(last[0], ast.Expr) and not (isinstance(last[0].value, ast.Call) and re.match(r'(print|use|plotting\.use|pd\.set_option)\b', ast.unparse(last[0].value))):
            assert c['outputs'], f'no stored output: {src[:80]!r}'


def test_readme_follows_from_the_index(root):
    from monosem.site import readme
    assert (root/'README.md').read_text() == readme(root), 'run `python -m monosem readme`'


@pytest.mark.parametrize('name', MODULES)
def test_public_names_are_documented(name):
    "A docstring for each public object; a comment for each parameter of a public function."
    mod = importlib.import_module(f'monosem.{name}')
    tree = {n.name: n for n in ast.parse(inspect.getsource(mod)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    lines = inspect.getsource(mod).splitlines()
    for public in mod.__all__:
        node = tree.get(public)
        if node is None: continue
        assert ast.get_docstring(node), f'{name}.{public} has no docstring'
        if isinstance(node, ast.FunctionDef):
            for a in [*node.args.args, *node.args.kwonlyargs]:
                assert '#' in lines[a.lineno-1], f'{name}.{public}: parameter {a.arg} has no comment'


def test_import_is_light():
    "`import monosem` costs next to nothing; a chapter does not pull in transformer-lens until a model is built."
    code = 'import sys, monosem, monosem.sae, monosem.transformer; assert "transformer_lens" not in sys.modules and "plotly" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def _global_names(code) -> set[str]:
    inner = [c for c in code.co_consts if hasattr(c, 'co_code')]
    return {i.argval for i in dis.get_instructions(code) if i.opname == 'LOAD_GLOBAL'}.union(*map(_global_names, inner))


@pytest.mark.parametrize('name', MODULES)
def test_functions_use_only_names_their_module_has(name):
    "A notebook's own imports hide a name that the exported module lacks."
    mod = importlib.import_module(f'monosem.{name}')
    used = _global_names(compile(inspect.getsource(mod), name, 'exec'))
    assert not [n for n in used if not hasattr(mod, n) and not hasattr(builtins, n)]


def _recipes(root) -> list[str]: return re.findall(r'```python\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)


@pytest.mark.parametrize('i', [0, 1])
def test_recipes_of_the_readme_run(root, tmp_path, monkeypatch, i):
    "As they stand, on a small model and few vectors."
    import torch
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my').mkdir()
    (tmp_path/'my/tokenizer.json').write_bytes((root/'monosem/assets/tokenizer.json').read_bytes())
    texts = [dict(text=f'{n} times {n} is {n*n}, and so on. '*30) for n in range(100)]
    (tmp_path/'my/text.jsonl').write_text('\n'.join(map(json.dumps, texts)), encoding='utf-8')
    shape = dict(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=24, n_ctx=128, d_vocab=8192, act_fn='gelu', seed=0)
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape), device='cpu')
    names = dict(x=torch.randn(3000, 12), model=model)
    assert len(_recipes(root)) == 2
    code = _recipes(root)[i]
    for budget in ('2_000_000', '100_000'): code = code.replace(budget, '20_000')
    exec(code.replace('4096', '32'), names)
    assert names['sae'].cfg.n_feats == 32


def _title(path) -> str: return ''.join(json.loads(path.read_text())['cells'][0]['source']).splitlines()[0][2:]


def test_a_chapter_has_one_name(root):
    "Links to the previous and the next chapter, and the table of chapters, call each by its title."
    titles, named = {p.name: _title(p) for p in NBS}, []
    for p in NBS:
        text = ' '.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'markdown')
        named += re.findall(r'\*\*(?:Previous|Next)\*\*\s+\[([^\]]+)\]\((\w+\.ipynb)\)', text)
        rows = re.findall(r'^\|.*\|$', text, re.M) if p.name == 'index.ipynb' else []
        named += re.findall(r'\[([^\]]+)\]\((\w+\.ipynb)\)', ' '.join(rows))
    assert len(named) > 80 and not [(name, p) for name, p in named if ' '.join(name.split()) != titles[p]]


def test_lines_leave_room_to_read():
    "A page has room for 88 characters of code."
    lines = [line for p in NBS for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code'
             for line in ''.join(c['source']).splitlines() if line.strip()]
    assert len(lines) > 10_000 and not [line for line in lines if len(line) > 88]


@pytest.mark.parametrize('path', [p for p in NBS if p.name not in ('index.ipynb', '03a_sources.ipynb')], ids=lambda p: p.name)
def test_a_chapter_has_exercises_with_solutions(path):
    text = ' '.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    assert re.search(r'\*\*Exercise|## Exercise', text) and '<details><summary>Solution</summary>' in text
