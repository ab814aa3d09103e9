"The chain on texts of other people: whatever is absent, it ends well, or refuses before anything long begins."
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from monosem.activations import StreamConfig
from monosem.cli import main
from monosem.core import load_artefact
from monosem.corpus import Corpus, Document, is_validation
from monosem.tokens import Mixture, load_tokenizer, token_windows
from monosem.hooked import at_hook, fitting
from monosem import proxies
from monosem.proxies import CONTEXTS, Context, halves, level_curve, proxy, script_proxy, spectrum
from monosem.reproduce import SCALES, Dictionary, Scale, Stages, claims, read_tests, report, reproduce, ship
from monosem.resampling import ResampleConfig
from monosem.sae import load_sae
from monosem.transformer import TransformerConfig, load_transformer

MICRO = replace(SCALES['tiny'], name='micro', mixture=Mixture(budget=40_000), d_vocab=512, tokenizer_bytes=100_000,
                model=TransformerConfig(d_vocab=512, d_model=16, d_mlp=32, n_heads=2, n_ctx=32),
                sae=replace(SCALES['tiny'].sae, d_in=32, n_feats=48), lm_validation=4000, eval_tokens=4000, test_tokens=8000,
                stream=StreamConfig(batch=128, block=8192, per_window=16),
                resample=ResampleConfig(window=4000, pool=1024))


def _text(tmp_path, make, n=60, seed=0, kind='text'):
    rng = random.Random(seed)
    path = tmp_path/'text.jsonl'
    path.write_text('\n'.join(json.dumps(dict(text=make(rng), kind=kind)) for _ in range(n)), encoding='utf-8')
    return path


def _words(rng): return ' '.join(rng.choice('the cat sat on a mat and looked at one more dog'.split()) for _ in range(300))


def _dna(rng): return ''.join(rng.choice('ACGT') for _ in range(1500))


def _arabic(rng): return ' '.join(''.join(rng.choice('ابتثجحخدذرزسشصضطظعغفقكلمنهوي') for _ in range(5)) for _ in range(200))


@pytest.mark.parametrize('make,missing', [(_dna, {'arabic', 'hebrew', 'cyrillic'}), (_words, {'arabic', 'hebrew', 'cyrillic'}), (_arabic, {'hebrew', 'cyrillic'})])
def test_contexts_that_a_text_lacks_drop_out_and_the_run_ends_well(tmp_path, make, missing):
    lines = []
    scale = replace(MICRO, corpus=str(_text(tmp_path, make)))
    r = reproduce(scale, tmp_path/'out', 'cpu', lines.append)
    tested = {t['context'] for t in r['features']}
    assert not tested & missing and set(r['samples']) == tested
    for name in missing: assert any(f'{name} is not tested' in l for l in lines), name
    json.loads((tmp_path/'out/micro/results.json').read_text(encoding='utf-8'), parse_constant=pytest.fail)
    assert (tmp_path/'out/micro/results.md').read_text(encoding='utf-8') == report(r)
    assert ('No context could be tested' in report(r)) == (not tested)
    assert {row['context'] for row in claims(r)['proxies']} == tested and len(read_tests(r['features'])) == len(tested)
    vocab = load_tokenizer(str(tmp_path/'out/micro/tokenizer.json')).get_vocab_size()
    assert r['scale']['model']['d_vocab'] == vocab == load_artefact(tmp_path/'out/micro/A').config['d_vocab']
    assert next(s for s in r['stages'] if s['stage'] == 'tokenizer.json')['tokens'] == vocab


def test_a_text_in_which_nothing_can_be_tested(tmp_path):
    r = reproduce(replace(MICRO, corpus=str(_text(tmp_path, lambda rng: '? ! '*(100+rng.randrange(200))))), tmp_path/'out', 'cpu', lambda line: None)
    vocab = load_tokenizer(str(tmp_path/'out/micro/tokenizer.json')).get_vocab_size()
    assert vocab < 512  # so monotonous a text has fewer tokens than asked for; model and log follow
    assert vocab == r['scale']['model']['d_vocab'] == r['stages'][0]['tokens']
    assert r['features'] == [] and r['samples'] == {} and 'No context could be tested' in report(r) and len(proxies.tests_table([])) == 0


@pytest.mark.parametrize('change,what', [
    (dict(resample=ResampleConfig(window=4000, pool=1024, at=(.001, .5))), 'steps'),
    (dict(resample=ResampleConfig(window=4000, pool=10**6)), 'to be considered'),
    (dict(stream=StreamConfig(batch=128, block=8192, per_window=33)), 'per_window=33'),
    (dict(stream=StreamConfig(batch=10**6, block=10**6, per_window=16)), 'batches of 1,000,000'),
    (dict(more=(Dictionary('A/0', MICRO.sae, vectors=1000),)), 'to be considered'),
    (dict(more=(Dictionary('C/0', MICRO.sae, 'C'),)), "of the model 'C'"),
    (dict(sae=SCALES['tiny'].sae), 'a dictionary of width 64 for 32 neurons')])
def test_what_a_later_stage_would_refuse_is_refused_before_the_first_long_one(tmp_path, change, what):
    lines = []
    with pytest.raises(ValueError, match=what): reproduce(replace(MICRO, corpus=str(_text(tmp_path, _words)), **change), tmp_path/'out', 'cpu', lines.append)
    assert not (tmp_path/'out/micro/A').exists() and not list((tmp_path/'out/micro').glob('*.checkpoints*'))


def test_too_little_validation_text_is_refused_before_training(tmp_path):
    path = tmp_path/'text.jsonl'
    rng, train = random.Random(0), []
    while len(train) < 20:
        if not is_validation(t := _words(rng)): train.append(t)
    path.write_text('\n'.join(json.dumps(dict(text=t)) for t in train), encoding='utf-8')
    with pytest.raises(ValueError, match='no validation document'): reproduce(replace(MICRO, corpus=str(path)), tmp_path/'out', 'cpu', lambda l: None)
    assert not (tmp_path/'out/micro/A').exists()


def test_no_room_on_the_disk_is_said_before_training(tmp_path, monkeypatch):
    import monosem.reproduce as r
    from types import SimpleNamespace
    monkeypatch.setattr(r.shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match='free some space'): reproduce(replace(MICRO, corpus=str(_text(tmp_path, _words))), tmp_path/'out', 'cpu', lambda l: None)
    assert not (tmp_path/'out/micro/A').exists()


@pytest.fixture(scope='module')
def micro(tmp_path_factory):
    out = tmp_path_factory.mktemp('micro')
    reproduce(replace(MICRO, corpus='mini'), out, 'cpu', lambda l: None)
    return out/'micro'


def test_a_run_knows_what_belongs_together(micro, tmp_path, tok):
    model, sae = load_transformer(micro/'A', 'cpu'), load_sae(micro/'A-1', 'cpu')
    mine = load_tokenizer(str(micro/'tokenizer.json'))
    assert sae.origin == at_hook(model).origin and fitting(model, sae, tok=mine)
    with pytest.raises(ValueError, match='tokenizer of 8192'): fitting(model, sae, tok=tok)
    ship(micro, tmp_path/'assets')
    half, small = load_transformer(tmp_path/'assets/A', 'cpu'), load_sae(tmp_path/'assets/A-1', 'cpu')
    assert fitting(half, small, tok=mine).hash == at_hook(model).hash  # what is shipped is what the dictionary was trained on
    assert fitting(half, sae) and fitting(model, small)
    with torch.no_grad(): next(iter(half.parameters()))[0, 0] += 1
    half.rounded_from = None
    with pytest.raises(ValueError, match='a dictionary of the model'): fitting(half, small)
    assert not ship(micro, tmp_path/'assets')


def test_further_dictionaries_of_other_models_are_made_once_and_change_nothing_before_them(micro, tmp_path):
    from shutil import copytree
    copytree(micro, tmp_path/'micro')
    small, lines = replace(MICRO.sae, n_feats=16), []
    more = Dictionary('A/0', small), Dictionary('A/1b', replace(MICRO.sae, seed=1), vectors=8000), Dictionary('B/1', small, 'B'), Dictionary('random/1', small, 'random')
    scale = replace(MICRO, corpus='mini', more=more)
    assert Scale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale
    reproduce(scale, tmp_path, 'cpu', lines.append)
    done = [l.split(']')[0][1:] for l in lines if 'done in' in l]
    assert done == ['random', 'B', *(f'{name}{end}' for name in ('A-0', 'A-1b', 'B-1', 'random-1') for end in ('', '.evaluation.json'))]
    of = {name: load_sae(tmp_path/'micro'/name, 'cpu').origin['model'] for name in ('A-0', 'A-1b', 'B-1', 'random-1')}
    assert of['A-0'] == of['A-1b'] and len(set(of.values())) == 3
    a, b, shuffled = (load_artefact(tmp_path/'micro'/name) for name in ('A', 'B', 'random'))
    assert a.run['data'] != b.run['data'] and load_artefact(tmp_path/'micro/A-1b').run['vectors'] in range(8000-128, 8000+128)
    for k, t in a.tensors.items(): assert torch.equal(t.flatten().sort()[0], shuffled.tensors[k].flatten().sort()[0]) and (t.ndim < 2 or not torch.equal(t, shuffled.tensors[k]))
    again = []
    reproduce(scale, tmp_path, 'cpu', again.append)
    assert all('reused' in l for l in again)


def test_another_tokenizer_of_the_same_size_is_refused(micro, tmp_path):
    from monosem.corpus import load_corpus
    from monosem.tokens import train_tokenizer
    from monosem.evaluation import evaluate
    other = train_tokenizer(load_corpus('mini'), Mixture(seed=5), 512, 50_000)
    model, sae = load_transformer(micro/'A', 'cpu'), load_sae(micro/'A-1', 'cpu')
    w = token_windows(load_corpus('mini'), other, Mixture(budget=3000), validation=True, n_ctx=32)
    assert other.get_vocab_size() == model.cfg.d_vocab
    with pytest.raises(ValueError, match='tokenizer'): evaluate(model, sae, w)


def _train(*args, out): return main(['train', '--tokens', '30000', '--features', '32', '--batch', '64', '--resample-at', '--per-window', '8', '--out', str(out), *map(str, args)])


def test_dictionaries_of_a_run_use_the_tokenizer_beside_its_model(micro, tmp_path, capsys):
    assert _train('--model', micro/'A', '--l1', '.2', '.2000001', '--device', 'cpu', out=tmp_path) == 0
    folders = sorted(p.name for p in tmp_path.iterdir() if p.name != 'checkpoints')
    assert folders == ['32-l1-0.2', '32-l1-0.2000001']
    a, b = (load_sae(tmp_path/f, 'cpu') for f in folders)
    assert (a.cfg.l1, b.cfg.l1) == (.2, .2000001) and a.cfg.d_in == 32
    assert a.origin == at_hook(load_transformer(micro/'A', 'cpu')).origin
    assert _train('--model', micro/'A', '--tokenizer', 'monosem/assets/tokenizer.json', out=tmp_path/'x') == 2
    assert '8192 tokens for a model of 512' in capsys.readouterr().err


def test_what_the_command_is_not_told_is_the_default_of_the_configurations(micro, tmp_path):
    from monosem.resampling import ResampleConfig
    from monosem.sae import SAEConfig
    from monosem.training import SAETrainConfig
    assert _train('--model', micro/'A', '--skip-mark', out=tmp_path) == 0
    run = load_artefact(tmp_path/f'32-l1-{SAEConfig.l1!r}')
    assert run.run['config'] == SAETrainConfig().to_dict() and run.config['start'] == SAEConfig.start
    assert run.run['stream'] == StreamConfig(batch=64, per_window=8, skip_tokens=(0,)).to_dict()
    small = SCALES['small']
    assert (small.sae, small.stream, small.train, small.resample) == (SAEConfig(), StreamConfig(), SAETrainConfig(), ResampleConfig())


# proxies

def test_halves_never_divide_a_document(mini, tok):
    w = token_windows(mini, tok, Mixture(budget=60_000), validation=True, n_ctx=64)
    half = halves(w)
    for d in np.unique(w.doc): assert len(set(half[w.doc == d])) == 1, 'a document on both sides'
    assert .3 < half.mean() < .7 and not np.array_equal(half, halves(w, seed=1)) and np.array_equal(half, halves(w))


def test_the_script_proxy_is_the_log_ratio_and_never_positive_without_the_script():
    share, tokens = np.array([0., 1., .5]), np.array([[0, 1, 2, 0]])
    assert np.allclose(script_proxy(tokens, share)[0, 1:3], np.log([1/.375, .5/.375]), atol=1e-6)
    for n in (3, 7, 999): assert (script_proxy(np.zeros((1, n), int), share) <= 0).all()
    assert (script_proxy(tokens, np.zeros(3)) == -np.inf).all()


@pytest.mark.parametrize('n', [50, 257, 1000])
def test_latin_text_is_in_no_script(tok, n):
    docs = [Document('text', '-', '-', 'abc def '*n)]
    from monosem.tokens import windows_from_ids
    w = windows_from_ids(np.array([tok.encode('abc def '*n).ids[:2*n]]), tok)
    for script in ('arabic', 'hebrew', 'cyrillic'): assert not (proxy(script, w, tok) > 0).any()


def test_a_planted_feature_is_selected_and_measured_on_the_other_half(tok):
    "A dictionary one of whose features is the context itself: r = 1, specificity 1; its rival among the neurons is known too."
    from monosem.hooked import HookedModel
    from monosem.sae import SAE, SAEConfig
    rng = np.random.default_rng(0)
    from monosem.tokens import TokenWindows
    arabic = tok.encode('ال').ids[0]
    tokens = np.where(rng.random((40, 16)) < .2, arabic, rng.integers(300, 600, (40, 16))).astype(np.uint16)
    tokens[(tokens != arabic) & np.isin(tokens, np.flatnonzero([not (tok.id_to_token(i) or '').isascii() for i in range(8192)]))] = tok.encode('cat').ids[0]
    docs = [Document('lang_ar' if i % 2 else 'en', '-', '-', 'x') for i in range(40)]
    w = TokenWindows(tokens, np.repeat(np.arange(40, dtype=np.int32), 16).reshape(40, 16), docs, {})
    class World(HookedModel):
        def __init__(self): self.model, self.hook, self.d_in, self.d_vocab, self.n_ctx, self.device = None, 'x', 3, 8192, 99, torch.device('cpu')
        def __call__(self, t):
            y = (t == arabic).float()
            return torch.stack([y, 1-y, y+.5*(t % 2)], -1)
        def readout(self): raise ValueError('no way to the logits')
    sae = SAE(SAEConfig(3, 4, start='random'))
    with torch.no_grad():
        sae.W_enc.zero_(); sae.b_enc.zero_(); sae.b_dec.zero_()
        sae.W_enc[0, 2], sae.W_enc[2, 1] = 2., 1.
    (t,), tables = proxies.test_contexts(World(), sae, tok, w, [Context('arabic', ('lang_ar',))])
    table = tables['arabic']
    y, kind = table.inside.to_numpy(float), table.of_kind.to_numpy(float)
    rival = table.neuron.to_numpy()
    assert (t.feature, t.neuron) == (2, 0) and t.r.value == pytest.approx(1) and t.r_neuron.value == pytest.approx(1) and t.difference.value == pytest.approx(0, abs=1e-9)
    assert t.specificity.value == t.specificity_half.value == 1 and t.max_act == 2 and t.top_tokens == []
    assert t.n_tokens == len(table) == int((~halves(w)).sum()) and t.base_rate == pytest.approx(y.mean()) and t.density == pytest.approx(y.mean())
    assert t.specificity_kind.value == pytest.approx((y*kind).sum()/y.sum())
    assert t.n_docs == table.doc[table.inside & table.of_kind].nunique()
    (u,), tables = proxies.test_contexts(World(), sae, tok, w, [Context('arabic', ('lang_ar',))], chosen={'arabic': (1, 2)})
    a, b, y = (tables['arabic'][k].to_numpy(float) for k in ('act', 'neuron', 'inside'))
    assert (u.feature, u.neuron) == (1, 2) and u.r.value == pytest.approx(np.corrcoef(a, y)[0, 1]) and u.r_neuron.value == pytest.approx(np.corrcoef(b, y)[0, 1])
    assert u.difference.value == pytest.approx(u.r.value-u.r_neuron.value) and u.specificity.value == pytest.approx(y[a > 0].mean()) and u.specificity_half.value == pytest.approx(y[a > a.max()/2].mean())
    curve = level_curve(tables['arabic'], 4)
    assert curve.tokens.sum() == (a > 0).sum() and np.allclose(curve.level, [(np.floor(v)+.5)/4*a.max()*(1+1e-6) for v in np.unique(np.floor(a[a > 0]/(a.max()*(1+1e-6))*4))])
    with pytest.raises(ValueError, match='on none of which'): level_curve(tables['arabic'].assign(act=0.))
    with pytest.raises(ValueError, match='on none of which'): spectrum(tables['arabic'].assign(act=0.), 'x')
    with pytest.warns(UserWarning, match='hebrew is not tested'): assert proxies.test_contexts(World(), sae, tok, w, CONTEXTS[1:2]) == ([], {})


def test_stages_are_reused_by_their_key_and_that_of_those_before(tmp_path):
    made = []
    def make(name): return lambda p: made.append(name) or {'bytes': p.write_text(name)}
    def run(*configs):
        st, made[:] = Stages(tmp_path, lambda l: None), []
        for name, c in zip('ab', configs): st.run(name, c, make(name))
        return list(made)
    assert run(1, 1) == ['a', 'b'] and run(1, 1) == [] and run(1, 2) == ['b'] and run(2, 2) == ['a', 'b']
    (tmp_path/'b').unlink()
    assert run(2, 2) == ['b']
