"""The lessons of each chapter against the exported module. A notebook defines its
module again as it runs; here every definition comes from the package, so that
`make mutants` can plant faults in it."""
import importlib, json, linecache, re
from pathlib import Path

import pytest
from IPython.display import DisplayHandle

NBS = {m[1]: p for p in sorted(Path(__file__).parents[1].glob('nbs/*.ipynb'))
       if (m := re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8')))}
FLAGS = 'export|default_exp|slow|gpu|eval: *false'
LEFT_OUT = re.compile(rf'^#\| *({FLAGS})|nbdev_export\(', re.M)


def lessons(path:Path) -> dict[str, str]:
    "Cell name to source: what runs unflagged and is not exported."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    cells = {c['id']: ''.join(c['source']) for c in cells if c['cell_type'] == 'code'}
    return {f'{path.name}#{id}': s for id,s in cells.items() if not LEFT_OUT.search(s)}


def shown(*what, display_id=None) -> DisplayHandle: return DisplayHandle(display_id)


@pytest.mark.lessons
@pytest.mark.parametrize('module', NBS)
def test_lessons(module, monkeypatch):
    "Every lesson cell of a chapter, in order, in one namespace."
    monkeypatch.chdir(NBS[module].parent)
    monkeypatch.setattr('IPython.display.display', shown)
    names = vars(importlib.import_module(f'monosem.{module}'))
    space = {k: v for k,v in names.items() if not k.startswith('__')}
    space['__name__'] = '__main__'
    for name, src in lessons(NBS[module]).items():
        linecache.cache[name] = len(src), None, src.splitlines(keepends=True), name
        exec(compile(src, name, 'exec'), space)
