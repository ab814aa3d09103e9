"Configurations, files and intervals: what goes in comes out, or is refused."
import ast
import dataclasses
import importlib
import json
import pkgutil

import numpy as np
import pandas as pd
import pytest
import torch

import monosem
from monosem.checkpoints import (Checkpoints, differences, load_checkpoint, pack_weights, save_checkpoint,
                                 unpack_weights)
from monosem.core import (Config, Estimate, bootstrap, claim, content_hash, json_ready, load_artefact, make_generator,
                          mean_of, pearson, pick_device, replacing, save_artefact, store, stored, write_json)


def _configs():
    mods = [importlib.import_module(f'monosem.{m.name}') for m in pkgutil.iter_modules(monosem.__path__) if m.name != '__main__']
    found = {v for m in mods for v in vars(m).values() if isinstance(v, type) and issubclass(v, Config) and v is not Config}
    return sorted(found, key=lambda c: c.__qualname__)


def _varied(value):
    "Another value of the same type."
    if isinstance(value, bool) or not isinstance(value, (int, float)): return value
    return value


@pytest.mark.parametrize('cls', _configs(), ids=lambda c: c.__qualname__)
def test_every_configuration_comes_back_from_its_dictionary(cls):
    needed = {f.name: 'x' for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    c = cls(**needed)
    text = json.dumps(c.to_dict())
    back = cls.from_dict(json.loads(text))
    assert back == c and back.hash() == c.hash() and [type(v) for v in vars(back).values()] == [type(v) for v in vars(c).values()]
    with pytest.raises(ValueError, match='nonsense'): cls.from_dict({'nonsense': 1})


def test_scales_come_back_with_every_part():
    from monosem.reproduce import SCALES, Scale
    for s in SCALES.values(): assert Scale.from_dict(json.loads(json.dumps(s.to_dict()))) == s


def test_a_configuration_in_a_configuration_and_tuples_of_tuples():
    @dataclasses.dataclass(frozen=True)
    class Inner(Config):
        at: tuple = ((1, 2), (3,))
    @dataclasses.dataclass(frozen=True)
    class Outer(Config):
        inner: Config = Inner()
        names: tuple = ()
    c = Inner(at=((5,), ()))
    assert Inner.from_dict(c.to_dict()) == c and Inner.from_dict(dict(at=[[5], []])) == c


def test_hashes_tell_values_apart_and_not_their_order():
    assert content_hash(dict(a=1, b=2)) == content_hash(dict(b=2, a=1)) != content_hash(dict(a=1, b=3))
    assert len(content_hash(None)) == 12


def test_what_is_not_a_number_is_written_as_null(tmp_path):
    value = dict(a=float('nan'), b=[1., -float('inf')], c=(2, 'é'), e=Estimate(float('nan'), 0., 1., 3), d=None)
    read = json.loads(write_json(tmp_path/'x.json', value).read_text(encoding='utf-8'), parse_constant=pytest.fail)
    assert read == dict(a=None, b=[1., None], c=[2, 'é'], e=[None, 0., 1., 3], d=None) == json_ready(value)
    e = Estimate.read(read['e'])
    assert np.isnan(e.value) and e[1:] == (0., 1., 3)


def test_half_precision_refuses_what_it_cannot_hold(tmp_path):
    for bad in (torch.tensor([1e5, 1.]), torch.tensor([1e-8, 2e-8]), torch.tensor([float('nan')]), torch.tensor([float('inf')])):
        with pytest.raises(ValueError, match='half=False'): save_artefact(tmp_path/'a', {'w': bad}, {}, half=True)
        assert not (tmp_path/'a').exists()
    good = {'w': torch.tensor([6e4, 1e-3, 0.]), 'z': torch.zeros(3), 'n': torch.tensor([70_000]), 'b': torch.ones(2).bfloat16()}
    back = load_artefact(save_artefact(tmp_path/'a', good, {}, half=True)).tensors
    assert torch.allclose(back['w'], good['w'], rtol=1e-3) and back['n'].item() == 70_000 and back['z'].sum() == 0


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    import os
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'old').write_text('x')
    real, calls = os.replace, []
    def flaky(src, dst):
        calls.append(str(src))
        if len(calls) == 2: raise OSError(28, 'No space left on device')
        return real(src, dst)
    monkeypatch.setattr(os, 'replace', flaky)
    with pytest.raises(OSError, match='No space left'):
        with replacing(tmp_path/'a') as tmp: tmp.mkdir(); (tmp/'new').write_text('y')
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and (tmp_path/'a'/'old').read_text() == 'x'


def test_a_bootstrap_knows_columns_by_name():
    s = pd.DataFrame(dict(a=[1., 2., 3.], n=[1., 1., 2.]))
    assert bootstrap(s, lambda t: t.a/t.n) == bootstrap(dict(n=s.n, a=s.a), lambda t: t.a/t.n)
    assert bootstrap(dict(a=[1., 2.], n=1), lambda t: t.a/t.n) == mean_of([1, 2])
    e = bootstrap(s, lambda t: t.a/t.n)
    assert e.value == 6/4 and e.low <= e.value <= e.high and e.n == 3
    one = bootstrap(s[:1], lambda t: t.a/t.n)
    assert one == Estimate(1., 1., 1., 1)
    assert np.isnan(bootstrap(s*0, lambda t: t.a/t.n).low)
    with pytest.raises(ValueError, match='at least one document'): bootstrap(s[:0], lambda t: t.a)
    for bad in ({}, dict(n=1), dict(a=np.ones((2, 2)))):
        with pytest.raises(ValueError, match='pass a row per document'): bootstrap(bad, len)


def test_an_interval_is_the_middle_95_per_cent_of_the_draws():
    x = np.zeros(1000); x[:300] = 1
    e = bootstrap(dict(x=x, n=1), lambda s: s.x/s.n, n_draws=4000)
    assert abs((e.high-e.low)-2*1.96*(.3*.7/1000)**.5) < .006 and e.value == .3  # binomial


def test_pearson_is_that_of_numpy_and_undefined_without_variance():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    y += x
    def r(x, y): return pearson(len(x), x.sum(), y.sum(), (x*x).sum(), (y*y).sum(), (x*y).sum())
    assert np.isclose(r(x, y), np.corrcoef(x, y)[0, 1]) and np.isclose(r(x, -x), -1)
    assert np.isnan(r(np.ones(5), y[:5]))


def test_a_claim_row_holds_its_estimate():
    row = claim('F1', .7, Estimate(.5, .4, .6, 9), 100, 'r', 'small', 'x')
    assert (row['ours'], row['low'], row['high'], row['n']) == (.5, .4, .6, 100) and claim('a', None, 3, 1, '', '')['high'] == 3.


def test_the_device_is_the_argument_then_the_variable(monkeypatch):
    monkeypatch.setenv('MONOSEM_DEVICE', 'meta')
    assert pick_device('cpu').type == 'cpu' and pick_device().type == 'meta'
    monkeypatch.delenv('MONOSEM_DEVICE')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert pick_device().type == 'mps'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert pick_device().type == 'cuda'
    assert torch.equal(torch.rand(3, generator=make_generator(5)), torch.rand(3, generator=make_generator(5)))
    assert not torch.equal(torch.rand(3, generator=make_generator(5)), torch.rand(3, generator=make_generator(6)))


# checkpoints

def test_checkpoints_keep_the_newest_and_read_back(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, dict(w=torch.full((2,), float(step))), dict(s=step, x=float('nan')), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-000000010', 'step-000000100']
    got = load_checkpoint(tmp_path)
    assert (got.step, got.meta, got.tensors['w'].tolist()) == (100, dict(s=100, x=None), [100., 100.])


@pytest.mark.parametrize('field', ['meta', 'step', 'digest'])
def test_altered_heads_are_noticed(tmp_path, field):
    save_checkpoint(tmp_path, 1, dict(w=torch.ones(2)), dict(lr=.1))
    path = tmp_path/'step-000000001'/'state.json'
    head = json.loads(path.read_text())
    head[field] = dict(meta=dict(lr=.2), digest='0'*64).get(field)
    path.write_text(json.dumps(head))
    if field == 'step': return  # the folder's name says the step
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='1 damaged'): load_checkpoint(tmp_path)


def test_when_a_checkpoint_is_due(monkeypatch, tmp_path):
    import monosem.checkpoints as c
    now = [0.]
    monkeypatch.setattr(c.time, 'monotonic', lambda: now[0])
    k = Checkpoints(tmp_path, every_s=10., every_steps=4)
    assert [s for s in range(1, 10) if k.due(s)] == [4, 8]
    now[0] = 10.
    assert k.due(1)
    k.save(1, dict(w=torch.ones(1)), {}, {})
    assert not k.due(1) and Checkpoints(tmp_path, every_s=None).due(3) is False


def test_a_failed_periodic_write_warns_and_one_that_must_succeed_raises(tmp_path, monkeypatch):
    import monosem.checkpoints as c
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(c, 'save_file', full)
    k = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match='no checkpoint at step 3'): k.save(3, {}, {}, {})
    with pytest.raises(OSError, match='No space'): k.save(3, {}, {}, {}, must=True)


def test_differences_name_every_place():
    assert differences(dict(a=[1, dict(b=2)], c=3), dict(a=[1, dict(b=4)], d=5)) == ['a[1].b: 2, not 4', 'c: 3, not None', 'd: None, not 5']
    assert differences([1], [1, 2]) == [': [1], not [1, 2]'] and differences(1, 1) == []


def test_weights_and_moments_come_back_under_their_names():
    def made():
        ps = [torch.nn.Parameter(torch.ones(2, 3).T), torch.nn.Parameter(torch.zeros(4))]
        opt = torch.optim.Adam(ps, lr=.1)
        return ps, opt
    (a, b), opt = made()
    ((a.sum()+(b-1).square().sum())).backward(); opt.step()
    packed = pack_weights([('a', a), ('b', b)], opt)
    assert sorted(packed) == sorted(f'{k}/{n}{s}' for n in 'ab' for k,s in [('weights', ''), *(('optimiser', '/'+m) for m in ('step', 'exp_avg', 'exp_avg_sq'))])
    (c, d), other = made()
    unpack_weights([('a', c), ('b', d)], other, packed)
    assert torch.equal(a, c) and torch.equal(b, d) and c.stride() == a.stride()
    for p,q in ((a, c), (b, d)):
        for k,v in opt.state[p].items(): assert torch.equal(v, other.state[q][k])
        assert other.state[q]['exp_avg'].stride() == q.stride() and other.state[q]['exp_avg'].data_ptr() != opt.state[p]['exp_avg'].data_ptr()


# the sources

def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
            yield node, name


def _modules(root): return {p.name: ast.parse(p.read_text(encoding='utf-8')) for p in (root/'monosem').glob('*.py')}


def test_text_files_are_opened_with_their_encoding(root):
    "Windows has another default."
    bad = []
    for name, tree in _modules(root).items():
        for node, call in _calls(tree):
            mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), 'r') if call == 'open' else ''
            if call in ('read_text', 'write_text') or (call == 'open' and 'b' not in str(mode)):
                if not any(k.arg == 'encoding' for k in node.keywords): bad.append(f'{name}:{node.lineno} {call}')
    assert not bad


def test_no_generator_switches_gradients_around_its_yields(root):
    "A switch around a `yield` leaks to the caller, and decorators of generators do not compose."
    bad = []
    for name, tree in _modules(root).items():
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                inner = {n for g in ast.walk(f) if isinstance(g, (ast.FunctionDef, ast.Lambda)) and g is not f for n in ast.walk(g)}
                yields = [n for n in ast.walk(f) if isinstance(n, (ast.Yield, ast.YieldFrom)) and n not in inner]
                decorated = any('grad' in ast.unparse(d) for d in f.decorator_list)
                within = any(isinstance(w, ast.With) and 'grad' in ast.unparse(w.items[0]) and any(y in set(ast.walk(w)) for y in yields) for w in ast.walk(f))
                if yields and (decorated or within): bad.append(f'{name}:{f.lineno} {f.name}')
    assert not bad


def test_modules_of_one_system_only_are_not_imported_at_the_top(root):
    for name, tree in _modules(root).items():
        top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names} | {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not top & {'resource', 'fcntl', 'pwd', 'termios', 'msvcrt', 'winreg'}, name


def test_sections_of_a_stored_result_are_written_one_at_a_time(tmp_path):
    store('r', [1], 'a', tmp_path)
    store('r', dict(n=2), 'b', tmp_path)
    store('r', [3], 'a', tmp_path)
    assert stored('r', folder=tmp_path) == dict(a=[3], b=dict(n=2)) and stored('r', 'a', tmp_path) == [3]
    store('r', [4], folder=tmp_path)
    assert stored('r', folder=tmp_path) == [4]


def test_a_result_that_is_not_stored_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='make results'): stored('none', folder=tmp_path)
    store('r', 1, 'a', tmp_path)
    with pytest.raises(KeyError, match="no section 'b'.*'a'"): stored('r', 'b', tmp_path)
