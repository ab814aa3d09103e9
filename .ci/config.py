"Derive pyproject.toml from settings.ini: nbdev's converter, then what it cannot carry."
import configparser, re, tempfile
from pathlib import Path

from nbdev.migrate import _nbdev_migrate_config, set_version

# Tables that have no place in settings.ini.
EXTRA = '''
update_pyproject = false
cell_timeout = 300

[tool.setuptools.package-data]
monosem = ["assets/*", "assets/*/*", "py.typed"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "--jaxtyping-packages=monosem,beartype.beartype -m 'not slow and not lessons' --strict-markers"
markers = ["slow: minutes on two cores", "lessons: cells that nbdev-test runs too, for `make mutants`"]
filterwarnings = ["ignore::DeprecationWarning"]
'''


def settings(root: Path) -> dict:
    "What settings.ini says."
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini')
    return dict(ini['DEFAULT'])


def derive(root: Path) -> str:
    "The text of pyproject.toml that follows from settings.ini."
    d = settings(root)
    with tempfile.TemporaryDirectory() as tmp:  # the converter also rewrites the version and the workflows
        (Path(tmp)/d['lib_path']).mkdir()
        (Path(tmp)/d['lib_path']/'__init__.py').write_text('')
        text = _nbdev_migrate_config(d, Path(tmp))
    more = ''.join(f'{k.removesuffix("_requirements")} = {v.split()}\n' for k,v in d.items()
                   if k.endswith('_requirements') and k not in ('dev_requirements', 'pip_requirements'))
    text = re.sub(r'^(dev = \[.*\]\n)', lambda m: m[1]+more, text, flags=re.M)
    text = re.sub(r'^include = \["monosem"\]', 'include = ["monosem*"]', text, flags=re.M)
    return text.rstrip()+'\n'+EXTRA.lstrip()


if __name__ == '__main__':
    root = Path(__file__).parents[1]
    (root/'pyproject.toml').write_text('# Derived from settings.ini by `make config`; edit that file.\n'+derive(root))
    set_version(root/settings(root)['lib_path'], settings(root)['version'])
