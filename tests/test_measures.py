"Exact small cases of what is measured of a dictionary: counts, shares, boundaries."
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array

from monosem.core import Estimate
from monosem.evaluation import _evaluation, reconstruct
from monosem.features import FeatureStats, Tally, colored_text, logit_weights, restrict, top_tokens
from monosem.active import ActiveSet, active_set
from monosem.proxies import (CONTEXTS, FLOOR, Sums, alphabet_proxy, in_kinds, n_carrying,
                             neuron_correlations, proxy, rivalry, script_share, unigram)
from monosem.sae import SAE, SAEConfig
from monosem.steering import (PATTERNS, PROMPT, dose_response, pin, push,
                              share_matching, shuffled_rows, write)


def _sums(**other):
    "Two windows of 100 tokens."
    s = dict(n=[100, 100], on=[300, 500], err=[1., 3.], var=[10., 10.], size=[50., 50.], n_pred=[99, 99],
             clean=[99., 198.], spliced=[198., 198.], zero=[396., 396.], mean=[297., 495.])
    return pd.DataFrame(s | other)


def test_an_evaluation_is_made_of_sums():
    e = _evaluation(_sums(), np.array([0, 50, 150, 600]))
    assert e.n_tokens == 200 and e.l0.value == 4 and e.fvu.value == .2 and e.l0.n == 2
    assert (e.ce_clean, e.ce_spliced, e.ce_zero, e.ce_mean) == (1.5, 2., 4., 4.)
    assert e.recovered.value == pytest.approx((4-2)/(4-1.5)) and e.recovered_mean.value == pytest.approx((4-2)/(4-1.5))
    assert e.density.tolist() == [0, .25, .75, 3.] and e.n_dead == 1 and e.n_ultralow is None
    assert e.l0.low == 3 and e.l0.high == 5
    assert not _sums().equals(_sums(mean=[1., 1.])) and _evaluation(_sums(mean=[594., 594.]), np.ones(1)).recovered_mean.value == pytest.approx(4/4.5)


def test_ultralow_features_are_counted_where_they_could_be_seen():
    "More than a million tokens; density above 0 and below one in a million."
    million = _sums(n=[1_000_000, 1_000_000])
    assert _evaluation(million, np.array([0, 1, 2, 3])).n_ultralow == 1
    assert _evaluation(_sums(n=[500_000, 500_000]), np.array([0, 1])).n_ultralow is None
    assert _evaluation(_sums(n=[500_000, 500_001]), np.array([0, 1])).n_ultralow == 1


def test_fvu_is_undefined_where_nothing_varies():
    assert np.isnan(_evaluation(_sums(var=[0., 1e-10]), np.ones(1)).fvu.value)
    assert _evaluation(_sums(var=[0., 1e-7]), np.ones(1)).fvu.value == pytest.approx(4e7)


def test_the_table_of_an_evaluation_says_every_number():
    t = _evaluation(_sums(), np.array([0, 50])).table()
    assert t.index.name == 'number' and list(t.columns) == ['value', 'unit'] and t.value['CE clean'] == '1.500'
    assert list(t.index) == ['L0', 'FVU', 'CE clean', 'CE spliced', 'CE zero-ablated', 'CE mean-ablated', 'loss recovered (zero)', 'loss recovered (mean)', 'dead', 'ultralow']
    assert t.value['dead'] == 1 and t.unit['dead'] == 'of 2 features' and t.value['ultralow'] == 'not visible' and t.value['L0'].startswith('4 [3')
    assert t.value[['CE spliced', 'CE zero-ablated', 'CE mean-ablated']].tolist() == ['2.000', '4.000', '4.000']
    d = _evaluation(_sums(n=[10**6, 10**6]), np.array([1, 50])).to_dict()
    assert 'density' not in d and d['n_ultralow'] == 1 and Estimate(*d['l0']).value == 800/2e6


def _two():
    sae = SAE(SAEConfig(2, 3, l1=.7, start='random'))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1., 0., -1.], [0., 1., 0.]]))
        sae.W_dec.copy_(torch.tensor([[1., 0.], [0., 1.], [-1., 0.]]))
        sae.b_enc.copy_(torch.tensor([0., -.5, 0.])); sae.b_dec.copy_(torch.tensor([.25, 0.]))
    return sae


def test_a_pin_holds_one_feature_and_leaves_the_rest():
    sae, x = _two(), torch.tensor([[1.25, 2.], [-.75, 0.]])
    assert torch.equal(pin(sae, 0, 3.)(x), torch.tensor([[3.25, 2.], [2.25, 0.]]))  # f is 1 and 0
    assert torch.equal(pin(sae, 1, 0.)(x), torch.tensor([[1.25, .5], [-.75, 0.]]))  # f is 1.5 and 0
    assert torch.equal(pin(sae, 2, 0.)(x), torch.tensor([[1.25, 2.], [.25, 0.]]))    # f is 0 and 1
    assert not pin(sae, 0, 1.)(x).requires_grad
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=f'feature {bad}'): pin(sae, bad, 1.)
    for bad in (-.1, float('inf'), float('nan')):
        with pytest.raises(ValueError, match='value='): pin(sae, 0, bad)
    assert PROMPT == '1,2,3,4,5,6,7,8,9,10'  # the paper's


def test_steering_writes_once_without_and_once_with_the_pin(tok):
    from monosem.hooked import sample
    from monosem.steering import steer
    from monosem.transformer import TransformerConfig, build_transformer
    model, sae = build_transformer(TransformerConfig(d_model=16, d_mlp=24, n_heads=2, n_ctx=32), 'cpu'), SAE(SAEConfig(24, 8))
    s = steer(model, sae, tok, 2, 500., n_tokens=8, temperature=.9, seed=3)
    assert s.before == sample(model, tok, PROMPT, 8, .9, 3) != s.after == sample(model, tok, PROMPT, 8, .9, 3, pin(sae, 2, 500.))
    assert (s.feature, s.value) == (2, 500.) and steer(model, sae, tok, 2, 500., 'abc', 8, .9, 3).before == sample(model, tok, 'abc', 8, .9, 3)


def _small():
    from monosem.transformer import TransformerConfig, build_transformer
    cfg = TransformerConfig(d_model=16, d_mlp=24, n_heads=2, n_ctx=32)
    return build_transformer(cfg, 'cpu'), SAE(SAEConfig(24, 8))


def test_a_push_is_a_pin_along_another_direction_for_each_text():
    sae, x = _two(), torch.tensor([[[1.25, 2.]], [[-.75, 0.]]])
    along = torch.tensor([[0., 1.], [1., 1.]])
    assert torch.equal(push(sae, 0, 3., along)(x), torch.tensor([[[1.25, 4.]], [[2.25, 3.]]]))  # f is 1 and 0
    with pytest.raises(ValueError, match='value='): push(sae, 0, -1., along)
    with pytest.raises(ValueError, match='feature 3'): push(sae, 3, 1., along)


def test_shuffled_rows_hold_the_numbers_of_the_row():
    sae = SAE(SAEConfig(24, 8))
    rows = shuffled_rows(sae, 3, 5, seed=1)
    assert rows.shape == (5, 24) and not rows.requires_grad
    assert all(torch.equal(r.sort().values, sae.W_dec[3].detach().sort().values) for r in rows)
    assert len({tuple(r.tolist()) for r in rows}) == 5 and torch.equal(rows, shuffled_rows(sae, 3, 5, seed=1))
    assert not torch.equal(rows, shuffled_rows(sae, 3, 5, seed=2))


def test_many_texts_are_those_that_one_would_write_scored_without_the_edit(tok):
    from monosem.hooked import at_hook, sample, text_ids
    model, sae = _small()
    edit = pin(sae, 2, 500.)
    w = write(model, tok, edit, n=3, n_tokens=6, seed=4, prompt='abc')
    assert w.ids.shape == w.nats.shape == (3, 6)
    assert tok.decode(write(model, tok, edit, 1, 6, 4, 'abc').ids[0]) == sample(model, tok, 'abc', 6, seed=4, edit=edit)
    whole = torch.tensor([[*text_ids(tok, 'abc'), *w.ids[1]]])
    assert np.allclose(at_hook(model).losses(whole)[0, -6:], w.nats[1], atol=1e-4)
    assert not np.allclose(at_hook(model).losses(whole, edit)[0, -6:], w.nats[1], atol=.1)
    room = 32-len(text_ids(tok, 'abc'))
    assert write(model, tok, n=1, n_tokens=room, prompt='abc').ids.shape == (1, room)
    for n, n_tokens in ((0, 3), (1, 0), (1, room+1)):
        with pytest.raises(ValueError, match=f'{n} texts of {n_tokens} tokens'):
            write(model, tok, n=n, n_tokens=n_tokens, prompt='abc')


def test_doses_are_multiples_of_the_maximum(tok):
    model, sae = _small()
    d = dose_response(model, sae, tok, 2, 250., '.', (0, 2), n=3, n_tokens=6, seed=4, prompt='abc')
    two = write(model, tok, pin(sae, 2, 500.), 3, 6, 4, 'abc')
    assert list(d) == [0, 2] and d[2].text == tok.decode(two.ids[0]) and d[2].share.value == 1
    assert d[2].nats.value == pytest.approx(two.nats.mean()) and d[2].nats.n == 3
    rows = shuffled_rows(sae, 2, 3)
    other = dose_response(model, sae, tok, 2, 250., '.', (2,), rows, n=3, n_tokens=6, seed=4, prompt='abc')
    assert other[2].text == tok.decode(write(model, tok, push(sae, 2, 500., rows), 3, 6, 4, 'abc').ids[0])
    with pytest.raises(ValueError, match='doses='): dose_response(model, sae, tok, 2, 1., '.', (1, -1))


def test_shares_of_a_pattern_count_what_it_matches():
    assert share_matching('acgt acx', PATTERNS['dna']).tolist() == [0, 7]  # a space ends a run
    assert share_matching('acgtac acx\n', PATTERNS['dna']).tolist() == [6, 9]  # and is not counted
    assert share_matching('a1 b\n2\t', '.*').tolist() == [4, 4]
    assert share_matching('ACGTac', PATTERNS['dna']).tolist() == [0, 6]    # one case at a time
    assert share_matching('', '.').tolist() == [0, 0]
    assert share_matching('0123456789abcdef', PATTERNS['base64']).tolist() == [16, 16]
    assert share_matching('0123456789abcde', PATTERNS['base64']).tolist() == [0, 15]
    for name, letter in (('arabic', 'ب'), ('hebrew', 'ש'), ('cyrillic', 'Ж')):
        assert share_matching(f'a{letter}', PATTERNS[name]).tolist() == [1, 2]
    assert set(PATTERNS) == {c.name for c in CONTEXTS}


def test_colored_text_escapes_scales_and_keeps_each_script_in_its_direction():
    view = colored_text(['<b>', 'سلام', '␣\\xd9', 'x'], [1., 2., 4., 0.], 'A & B')
    page = view._repr_html_()
    assert 'A &amp; B, darkest at 4' in page and '<p dir="auto"' in page and '<b>' not in page
    assert '<span title="1.00" style="background:rgba(213,94,0,0.19)">&lt;b&gt;</span>' in page
    assert '<bdi title="4.00" style="background:rgba(213,94,0,0.75)">␣\\xd9</bdi>' in page
    assert 'rgba(213,94,0,0.00)">x' in page and page.index('سلام') < page.index('xd9')
    assert 'rgba(213,94,0,0.75)">a' in colored_text(['a'], [5.], top=2.)._repr_html_()
    assert colored_text(['a'], [0.]).top == 1. and colored_text([], []).tokens == []
    for acts in ([1.], [1., -1.], [1., float('nan')], [[1., 2.]]):
        with pytest.raises(ValueError, match='got'): colored_text(['a', 'b'], acts)


def test_a_restricted_dictionary_has_the_features_asked_for_in_their_order():
    sae, x = _two(), torch.tensor([[1.25, 2.], [-.75, 0.]])
    sae.origin = {'model': 'm'}
    small = restrict(sae, [2, 0])
    assert torch.equal(small.encode(x), sae.encode(x)[:, [2, 0]]) and torch.equal(small.W_dec, sae.W_dec[[2, 0]])
    assert torch.equal(small.b_dec, sae.b_dec) and small.cfg.n_feats == 2 and small.cfg.l1 == .7 and small.origin == {'model': 'm'}


def test_statistics_as_a_table():
    s = FeatureStats(10, np.array([.1, 0.]), np.array([3., 0.]), np.array([2., 0.]), np.zeros((2, 1), int), np.zeros((2, 1)))
    t = s.table()
    assert t.index.name == 'feature' and t.freq.tolist() == [.1, 0.] and t.max_act.tolist() == [3., 0.] and t.mean_act.tolist() == [2., 0.]


def test_top_tokens_are_the_largest_and_spare_ids_have_none(tok):
    logits = torch.zeros(8192+5)
    a, b = tok.encode('the').ids[0], tok.encode(' of').ids[0]
    logits[a], logits[b], logits[8193] = 2., 1., 9.
    assert top_tokens(logits, tok, 2) == ['the', '␣of'] and len(top_tokens(logits, tok)) == 10


def test_logit_weights_of_ours_by_hand():
    from monosem.hooked import at_hook
    from monosem.transformer import TransformerConfig, build_transformer, weights
    model = build_transformer(TransformerConfig(d_vocab=5, d_model=4, d_mlp=3, n_heads=2, n_ctx=8), 'cpu')
    w = weights(model)
    with torch.no_grad():
        w['layers.0.mlp.fc_out.weight'].copy_(torch.arange(12.).view(4, 3))
        w['ln_out.weight'].copy_(torch.tensor([1., 2., 0., 1.]))
        w['head.weight'].copy_(torch.eye(5)[:, :4])
    got = logit_weights(at_hook(model), torch.tensor([[1., 0., 0.]]))
    # W_out d = (0, 3, 6, 9), centred (-4.5, -1.5, 1.5, 4.5), scaled (-4.5, -3, 0, 4.5), logits with a 0 for the fifth token: their median is 0
    assert torch.allclose(got, torch.tensor([[-4.5, -3., 0., 4.5, 0.]]))


# proxies

def test_unigram_adds_one_to_each_count():
    from monosem.tokens import windows_from_ids
    assert np.allclose(np.exp(unigram(windows_from_ids([[0, 0, 2]]), 4)), np.array([3, 1, 2, 1])/7)


def test_a_string_needs_as_many_tokens_as_its_context_asks_for():
    names, log_p = [b'A', b'xx'], np.log([.5, .5])
    one, two = (alphabet_proxy(np.array([[0, 0, 1, 0]]), names, log_p, 'ACGT', n)[0] for n in (1, 2))
    a, x = np.log(1/4/.5), 2*np.log(FLOOR)-np.log(.5)
    assert np.allclose(one, [a, a, x+0*a, a]) and np.allclose(two, [-np.inf, 2*a, x+a, a+x])


def test_each_context_has_its_kinds_and_its_proxy(mini, tok):
    from monosem.tokens import Mixture, token_bytes, token_windows
    w = token_windows(mini, tok, Mixture(budget=60_000), validation=True, spread=True, n_ctx=64)
    kinds = {c.name: set(c.kinds) for c in CONTEXTS}
    assert kinds['arabic'] == {'lang_ar', 'lang_fa', 'lang_ur'} and kinds['hebrew'] == {'lang_he'} and kinds['dna'] == {'dna'} and kinds['base64'] == {'base64'}
    assert kinds['cyrillic'] == {'lang_ru', 'lang_uk', 'lang_sr', 'lang_bg', 'lang_mn'}
    for c in CONTEXTS:
        inside = proxy(c.name, w, tok) > 0
        of_kind = np.isin(w.kind, [w.kinds.index(k) for k in c.kinds if k in w.kinds])
        assert inside[of_kind].mean() > 3*inside[~of_kind].mean(), c.name
    names = token_bytes(tok)
    for script, letter, foreign in (('arabic', 'ب', 'ש'), ('hebrew', 'ש', 'Ж'), ('cyrillic', 'Ж', 'ب')):
        share = script_share(w, names, script)
        whole = {names[i].decode(): share[i] for i in range(len(names)) if len(names[i]) == 2 and names[i].decode(errors='replace').isalpha()}
        assert whole.get(letter, 1.) == 1. and whole.get(foreign, 0.) == 0. and share[names.index(b'the')] == 0.
    with pytest.raises(ValueError, match='klingon'): proxy('klingon', w, tok)
    with pytest.raises(ValueError, match='script'): script_share(w, names, 'runes')


def test_the_share_of_a_partial_token_is_that_of_its_occurrences(tok):
    "A byte that begins Arabic letters in two places of three."
    from monosem.tokens import token_bytes, windows_from_ids
    names = [b'\xd8', b'\xd9', b'\xa8', b'a', b' \xd8', b'\xbf']
    rows = [[0, 2, 3, 3], [1, 2, 0, 2], [4, 2, 3, 3]]  # \xd8\xa8 and \xd9\xa8 are Arabic
    share = script_share(windows_from_ids(rows), names, 'arabic')
    assert share[0] == share[1] == share[2] == share[4] == 1. and share[3] == 0. and share[5] == 0.
    mixed = script_share(windows_from_ids([[0, 2, 3, 0], [0, 3, 3, 3]]), names, 'arabic')
    assert mixed[0] == pytest.approx(1/3)  # alone, before `a` and at the end, it is no letter


def test_a_neuron_is_correlated_with_a_feature_on_the_masked_tokens():
    from monosem.features import feature_pass
    from monosem.tokens import windows_from_ids
    model, sae = _small()
    rng = np.random.default_rng(0)
    w, mask = windows_from_ids(rng.integers(0, 8192, (6, 32)).tolist()), rng.random((6, 32)) < .5
    s = next(feature_pass(model, sae, w))
    got = neuron_correlations(model, sae, w, [5, 1], mask)
    f, x = sae.encode(s.acts).detach().numpy()[mask], s.acts.numpy()[mask]
    assert got.shape == (2, 24)
    assert np.allclose(got[1], np.corrcoef(f[:, 1], x.T)[0, 1:], atol=1e-5, equal_nan=True)


def test_what_remains_of_a_feature_when_a_neuron_is_known():
    rng = np.random.default_rng(0)
    neuron = rng.random(500)
    table = pd.DataFrame(dict(act=neuron+.1*rng.random(500), neuron=neuron, inside=neuron > .7,
                              of_kind=True, doc=np.arange(500)//10))
    v = rivalry(table)
    assert v.r.value == pytest.approx(np.corrcoef(table.act, table.inside)[0, 1])
    assert v.r_neuron.value == pytest.approx(np.corrcoef(neuron, table.inside)[0, 1])
    assert v.r_between.value == pytest.approx(np.corrcoef(neuron, table.act)[0, 1])
    assert abs(v.rest.value) < .15 and v.rest.n == 50  # the feature is the neuron and noise
    swapped = rivalry(table.assign(act=rng.random(500)+table.inside))
    assert swapped.rest.value > .5


def test_half_of_a_direction_is_carried_by_few_or_many():
    assert n_carrying(torch.tensor([0., -3., 0.])) == 1 and n_carrying(torch.ones(10)) == 5
    assert n_carrying(torch.tensor([2., 1., 1., 1., 1.]), .5) == 1 and n_carrying(torch.tensor([2., 1., 1., 1., 1.]), .6) == 2


def test_kinds_that_a_text_lacks_are_ignored(mini, tok):
    from monosem.tokens import Mixture, token_windows
    w = token_windows(mini, tok, Mixture(budget=60_000), validation=True, spread=True, n_ctx=64)
    assert np.array_equal(in_kinds(w, ('dna', 'klingon')), w.kind == w.kinds.index('dna'))
    assert not in_kinds(w, ('klingon',)).any()


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_statistics_added_up_are_those_of_the_dense_array(dtype, seed):
    "Dead features, vectors on which nothing fires, ties, parts of any length, one vector, none."
    rng = np.random.default_rng(seed)
    n, n_feats, k = int(rng.integers(1, 300)), 7, int(rng.integers(1, 6))
    f = (rng.integers(1, 40, (n, n_feats))/8*(rng.random((n, n_feats)) < .3)).astype(dtype)
    f[:, 2], f[rng.random(n) < .2] = 0, 0
    tally = Tally(n_feats, k)
    for part in np.split(f, np.sort(rng.integers(0, n+1, 9))):
        m = csr_array(part)
        tally.add(ActiveSet(m.indptr.astype(np.int64), m.indices.astype(np.int32), m.data))
    s = tally.stats()
    order = np.lexsort((np.arange(n)[:, None]+0*f, -f), axis=0)[:k].T  # the first of equal ones first
    want = np.take_along_axis(f.T, order, 1)
    want, order = (np.pad(a, ((0, 0), (0, k-a.shape[1]))) for a in (want, order))
    assert np.array_equal(s.top_act, want) and np.array_equal(s.top, np.where(want > 0, order, -1))
    assert np.array_equal(s.max_act, f.max(0)) and np.allclose(s.freq, (f > 0).mean(0)) and s.n_tokens == n
    assert np.allclose(s.mean_act, f.sum(0)/np.maximum((f > 0).sum(0), 1)) and s.top_act.dtype == dtype
    assert np.allclose(tally.stats(2*n).freq, s.freq/2)


def test_strongest_are_kept_while_the_rest_is_forgotten():
    "Ten thousand entries of two features: no more than a few are held at a time."
    rng, tally, values = np.random.default_rng(0), Tally(2, 3), []
    for _ in range(100):
        v = rng.random(100).astype(np.float32)
        tally.add(ActiveSet(np.arange(101), np.arange(100, dtype=np.int32) % 2, v))
        values.append(v)
        assert sum(len(p[0]) for p in tally.strong) <= 12+100
    v = np.concatenate(values)
    assert all(np.array_equal(tally.stats().top_act[j], np.sort(v[j::2])[:-4:-1]) for j in (0, 1))
    assert np.array_equal(v[tally.stats().top], tally.stats().top_act)


@pytest.mark.parametrize('seed', range(4))
def test_sums_give_the_correlations_of_numpy(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 200))
    x, y = rng.random((n, 6))*(rng.random((n, 6)) < .4), 1e4+rng.normal(size=(n, 3))
    x[:, 1], y[:, 2] = 0, 5.
    cuts, sparse, dense = np.sort(rng.integers(0, n+1, 4)), Sums(6, 3), Sums(6, 3)
    for a, b in zip(np.split(x, cuts), np.split(y, cuts)):
        sparse.add(csr_array(a.astype(np.float32).astype(float)), b)
        dense.add(a.astype(np.float32), b)
    with np.errstate(invalid='ignore', divide='ignore'): want = np.corrcoef(x.T, y.T)[:6, 6:]
    want[1] = want[:, 2] = np.nan
    for got in (sparse.r(), dense.r()): assert np.allclose(got, want, atol=1e-5, equal_nan=True)
    assert np.isnan(Sums(6, 3).r()).all() and Sums(6, 3).r().shape == (6, 3)


@pytest.mark.parametrize('shift', [0, -30, 30])
def test_what_fired_reconstructs(shift):
    "Also where nothing fires, or everything."
    sae, x = SAE(SAEConfig(6, 40, start='random')), 3*torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc += shift
        sae.b_dec += .5
        x[4] = sae.b_dec
    active = active_set(sae, x)
    assert len(active.index) == {0: len(active.index), -30: 0, 30: 360}[shift]
    atol = 1e-6*len(active.index)+1e-5  # of sums of up to 40 activations of 30
    assert torch.allclose(reconstruct(sae, active), sae(x), atol=atol)
    assert torch.allclose(reconstruct(sae.double(), active), sae(x.double()), atol=atol)
