import os
from pathlib import Path

import pytest

os.environ.setdefault('MONOSEM_DEVICE', 'cpu')
os.environ.setdefault('IN_TEST', '1')


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory):
    "Tokenised texts of the tests, apart from the user's; subprocesses inherit it."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MONOSEM_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session')
def root() -> Path: return Path(__file__).parents[1]


@pytest.fixture(scope='session')
def mini():
    from monosem.corpus import load_corpus
    return load_corpus('mini')


@pytest.fixture(scope='session')
def tok():
    from monosem.tokens import load_tokenizer
    return load_tokenizer()
