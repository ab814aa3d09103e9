"A world of planted features, the scores of a dictionary, and the study."
import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse import csr_array

from monosem.planted import (World, WorldConfig, at_partners, cosines, firing_f1, known_firings, known_support, matched_cosine,
                             matched_f1, partners)
from monosem.resampling import ResampleConfig
from monosem.sae import SAE, SAEConfig
from monosem.training import SAETrainConfig
from monosem.world import (CEILING, RECIPES, StudyConfig, absorption, baselines, by_frequency, compare, mean_curve, over_seeds,
                           recovery, shuffled, study)

TINY = WorldConfig(d_in=16, n_roots=20, n_parents=4, n_topics=2, boost=1.5, active=2., shift=4.)
QUICK = StudyConfig(world=TINY, training=SAETrainConfig(lr=5e-3), resampling=ResampleConfig(window=5_000, pool=4_096, at=(.5,)),
                    n_train=20_480, n_test=4_000, batch=512, l1=.2, l1_perfect=.2, l1_frozen=.4, seeds=(0, 1), n_bins=4)


def some_firings(n, width, seed, density=.3):
    rng = np.random.default_rng(seed)
    return csr_array(rng.random((n, width))*(rng.random((n, width)) < density))


def brute(scores):
    "The best sum over all ways to give rows and columns to one another."
    a = scores if scores.shape[0] <= scores.shape[1] else scores.T
    return max(sum(a[i, j] for i, j in enumerate(p)) for p in permutations(range(a.shape[1]), a.shape[0]))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_partners_are_the_best_of_all_ways_to_match(n_true, n_feats, seed):
    scores = np.random.default_rng(seed).standard_normal((n_true, n_feats))
    of = partners(scores)
    chosen = of[of >= 0]
    assert len(set(chosen)) == len(chosen) == min(n_true, n_feats)
    assert at_partners(scores, of).sum() == pytest.approx(brute(scores))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_f1_by_loops_and_its_matching_by_brute_force(n_true, n_feats, seed):
    on, fires = some_firings(30, n_true, seed), some_firings(30, n_feats, seed+1)
    t, f = on.toarray() > 0, fires.toarray() > 0
    for i in range(n_true):
        for j in range(n_feats):
            hit, both = (t[:, i] & f[:, j]).sum(), t[:, i].sum()+f[:, j].sum()
            assert firing_f1(on, fires)[i, j] == pytest.approx(2*hit/both if both else 0)
    assert np.nansum(matched_f1(on, fires)) == pytest.approx(brute(firing_f1(on, fires)))


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_scores_do_not_depend_on_order_or_scale(seed):
    gen = torch.Generator().manual_seed(seed)
    truth, found = torch.randn(6, 4, generator=gen), torch.randn(8, 4, generator=gen)
    order, scale = torch.randperm(8, generator=gen), torch.rand(8, 1, generator=gen)+.1
    assert torch.allclose(matched_cosine(truth, found), matched_cosine(truth, (scale*found)[order]), atol=1e-5)
    on, fires = some_firings(50, 6, seed), some_firings(50, 8, seed+1)
    other = csr_array((fires.toarray()*scale.numpy().T)[:, order.numpy()])
    assert np.nansum(matched_f1(on, fires)) == pytest.approx(np.nansum(matched_f1(on, other)))


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_signs_of_axes_do_not_matter_and_the_sign_of_a_feature_does(seed):
    "Both dictionaries may be mirrored or rotated; a feature's opposite is another feature, for features are never negative."
    gen = torch.Generator().manual_seed(seed)
    truth, found = torch.randn(5, 6, generator=gen), torch.randn(7, 6, generator=gen)
    mirror = torch.randint(2, (6,), generator=gen)*2.-1
    turn = torch.linalg.qr(torch.randn(6, 6, generator=gen))[0]
    for T in (mirror.diag(), turn): assert torch.allclose(matched_cosine(truth, found), matched_cosine(truth@T, found@T), atol=1e-4)
    ours = matched_cosine(truth, truth)
    assert torch.allclose(ours, torch.ones(5), atol=1e-5)
    flipped = truth*torch.tensor([-1., 1, 1, 1, 1])[:, None]
    assert matched_cosine(truth, flipped).mean() < 1-1e-3


def test_the_truth_scores_one_and_copies_score_once():
    world = World(TINY)
    s = world.sample(4000)
    assert matched_cosine(world.truth, world.truth).numpy() == pytest.approx(1)
    assert np.nanmin(matched_f1(s.on, s.on)) == 1
    doubled = csr_array(s.on[:, [0, 0, 0]])
    assert np.sort(matched_f1(s.on[:, :3], doubled))[:2].max() < 1


def test_what_never_fires_is_not_judged():
    on = csr_array(np.array([[1., 0], [1, 0]]))
    assert np.isnan(matched_f1(on, on)).tolist() == [False, True]
    assert firing_f1(on, on)[1].tolist() == [0, 0]


worlds = st.builds(lambda seed, parents, children, topics, share: WorldConfig(
    d_in=8, n_roots=24, n_parents=parents, n_children=children, child_share=share/max(children, 1), n_topics=topics,
    boost=1+.5*(topics > 1), active=3., shift=6., seed=seed),
    st.integers(0, 10_000), st.integers(0, 24), st.integers(0, 4), st.integers(1, 6), st.sampled_from([.1, .5, 1.]))


@given(worlds, st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_hierarchy_holds_in_every_sample(cfg, seed):
    world = World(cfg)
    s = world.sample(300, seed)
    on = s.on.toarray()
    assert on.shape == (300, cfg.n_true) == (300, len(world.freq)) and s.x.shape == (300, 8)
    kids = np.flatnonzero(world.parent >= 0)
    assert len(kids) == cfg.n_parents*cfg.n_children
    assert not (on[:, kids] > 0)[on[:, world.parent[kids]] == 0].any()
    for p in world.parents: assert (on[:, kids[world.parent[kids] == p]] > 0).sum(1).max(initial=0) <= 1
    values = on[on > 0]
    assert values.min() >= cfg.low and values.max() <= cfg.high and len(s.on.data) == len(values)
    noise = s.x.numpy()-on@world.truth.numpy()
    assert abs(noise.std()/cfg.noise-1) < .1


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('topics', [1, 5])
def test_frequencies_are_as_stated(seed, topics):
    "48 features, 20,000 vectors: a count beyond 5 standard deviations has a chance below 1e-4 in all."
    cfg = WorldConfig(d_in=8, n_roots=24, n_parents=8, n_topics=topics, boost=topics**.5, active=3., shift=6., seed=seed)
    world, n = World(cfg), 20_000
    counts = (world.sample(n, seed).on > 0).sum(0)
    assert world.freq[:24].sum() == pytest.approx(cfg.active)
    assert np.all(np.abs(counts-n*world.freq) < 5*np.sqrt(n*world.freq*(1-world.freq))+1)


def test_equal_seeds_equal_world():
    for a, b, same in ((World(TINY), World(TINY), True), (World(TINY), World(replace(TINY, seed=1)), False)):
        assert torch.equal(a.truth, b.truth) == same
        assert torch.equal(a.sample(100, 3).x, b.sample(100, 3).x) == same
    s, other = World(TINY).sample(5000, 0), World(TINY).sample(5000, 1)
    assert not torch.equal(s.x, other.x)
    assert World(TINY).sample(5000, 0).on.toarray().tolist() == s.on.toarray().tolist()


@pytest.mark.parametrize('bad, said', [
    (dict(n_roots=0), 'n_roots'), (dict(n_parents=30), 'up to n_roots=20'), (dict(n_children=-1), 'negative'),
    (dict(n_children=6), 'add up to 1'), (dict(child_share=0.), 'change child_share'), (dict(low=0.), '0 < low'),
    (dict(low=2.), 'low=2.0'), (dict(noise=-1.), 'noise'), (dict(boost=3.), 'n_topics=2'), (dict(boost=.5), 'between 1'),
    (dict(active=19.), 'at most 1'), (dict(active=0.), 'active > 0'), (dict(shift=-1.), 'shift > -1'), (dict(seed=-1), 'seed >= 0')])
def test_impossible_worlds_are_refused(bad, said):
    with pytest.raises(ValueError, match='got .*; expected .*; ') as e: replace(TINY, **bad)
    assert said in str(e.value)


def test_bad_samples_and_studies_are_refused():
    with pytest.raises(ValueError, match='n > 0'): World(TINY).sample(0)
    with pytest.raises(ValueError, match='seed'): World(TINY).sample(5, -1)
    for bad in (dict(seeds=()), dict(seeds=(1, 1)), dict(n_train=0), dict(batch=0)):
        with pytest.raises(ValueError, match='; expected '): replace(QUICK, **bad)
    with pytest.raises(ValueError, match='2 vectors; expected the same vectors'): firing_f1(some_firings(3, 2, 0), some_firings(2, 2, 0))


def exact(world, absorbing=False):
    "A dictionary that reads every activation; with `absorbing`, parents are silent beside their children."
    sae = SAE(SAEConfig(world.cfg.d_in, world.cfg.n_true)).requires_grad_(False)
    reads = torch.linalg.pinv(world.truth)
    for kid in np.flatnonzero(world.parent >= 0) if absorbing else (): reads[:, world.parent[kid]] -= 4*reads[:, kid]
    sae.W_dec.copy_(world.truth), sae.W_enc.copy_(reads), sae.b_enc.fill_(-1e-3)
    return sae


@pytest.fixture(scope='module')
def plain():
    "More dimensions than features and no noise, so that a dictionary can be exact."
    world = World(replace(TINY, d_in=40, noise=0.))
    return world, world.sample(6000)


def test_an_exact_dictionary_has_perfect_scores(plain):
    world, test = plain
    r = recovery(world, exact(world), test)
    assert r.cosine == pytest.approx(1, abs=1e-4) and np.nanmin(r.f1) == np.nanmin(r.f1_there) == 1
    assert r.partner.tolist() == list(range(world.cfg.n_true))
    assert (r.alike, r.copies, r.summary()['never']) == (1, 0, 0) and r.fvu < 1e-4
    assert r.l0 == pytest.approx(len(test.on.data)/len(test.x))


def test_directions_without_firings_and_firings_without_directions(plain):
    "Each score sees what the other cannot."
    world, test = plain
    order = torch.randperm(world.cfg.n_true, generator=torch.Generator().manual_seed(0))
    swapped, mixed = exact(world), exact(world)
    swapped.W_enc.copy_(swapped.W_enc[:, order])
    mixed.W_dec.copy_(torch.nn.functional.normalize(torch.randn(mixed.W_dec.shape, generator=torch.Generator().manual_seed(1)), dim=-1))
    a, b = recovery(world, swapped, test).summary(), recovery(world, mixed, test).summary()
    assert a['mcc'] == pytest.approx(1, abs=1e-4) and a['f1'] == 1 and a['f1_there'] < .4 and a['alike'] < .3
    assert b['mcc'] < .6 and b['f1'] == 1 and b['f1_there'] < .4


def test_copies_and_dead_features_are_counted(plain):
    world, test = plain
    sae = exact(world)
    sae.W_dec[1:4], sae.b_enc[5] = sae.W_dec[0].clone(), -100.
    r = recovery(world, sae, test)
    assert r.copies == 3 and r.dead == pytest.approx(1/world.cfg.n_true)
    assert (r.cosine > .9).sum() == world.cfg.n_true-3 and r.f1_there[5] == 0


def test_absorption_of_dictionaries_that_do_and_do_not(plain):
    world, test = plain
    a, b = (absorption(world, sae, test, recovery(world, sae, test)) for sae in (exact(world), exact(world, True)))
    assert a.own.max() == a.other.max() == 0
    assert b.own.min() == 1 and b.other.max() == 0
    mine = {k: v for k, v in b.summary().items() if 'lean' not in k}
    assert mine == dict(silent_own=1, silent_other=0, absorbed=1, parents=4, children=12)
    cos = (world.truth@world.truth.T).numpy()
    kids = np.arange(world.cfg.n_roots, world.cfg.n_true)
    assert b.lean == pytest.approx(cos[kids, world.parent[kids]], abs=1e-5)
    assert b.lean_other == pytest.approx(cos[kids, np.roll(world.parent[kids], 3)], abs=1e-5)
    nothing = recovery(world, exact(world), test)._replace(cosine=np.zeros(world.cfg.n_true))
    assert absorption(world, exact(world), test, nothing).summary()['parents'] == 0


def test_absorption_by_loops():
    world = World(replace(TINY, d_in=12))
    test = world.sample(1500)
    sae = SAE(SAEConfig(12, world.cfg.n_true, seed=3)).requires_grad_(False)
    r = recovery(world, sae, test)
    got, on, f = absorption(world, sae, test, r, least=-1.), test.on.toarray() > 0, sae.encode(test.x).numpy() > 0
    kids = np.arange(world.cfg.n_roots, world.cfg.n_true)
    for g, p in enumerate(world.parents):
        mine = kids[world.parent[kids] == p]
        own, others = on[:, mine].any(1), on[:, np.setdiff1d(kids, mine)].sum(1)
        fires, alone = f[:, r.partner[p]], on[:, p] & ~own
        assert got.own[g] == pytest.approx((~fires)[own].mean())
        assert got.other[g] == pytest.approx((others*alone*~fires).sum()/(others*alone).sum())


def test_a_hierarchy_is_needed_for_absorption():
    world = World(replace(TINY, n_parents=1))
    test, sae = world.sample(100), SAE(SAEConfig(16, world.cfg.n_true)).requires_grad_(False)
    with pytest.raises(ValueError, match='1 parents .*; expected at least 2'): absorption(world, sae, test, recovery(world, sae, test))


def test_ceilings_are_exact_where_nothing_is_in_the_way():
    world = World(replace(TINY, noise=0., low=1., high=1.))
    s = world.sample(4000)
    assert known_firings(world, s) == pytest.approx(1, abs=1e-4)
    assert known_support(world, s, 500) < 1e-10
    noisy = World(replace(TINY, noise=.5))
    short, long = (known_firings(noisy, noisy.sample(n)).mean() for n in (500, 20_000))
    assert short < long < 1 and known_support(noisy, noisy.sample(500)) > .1
    never = world.sample(3)
    silent = (never.on > 0).sum(0) == 0
    assert silent.any() and np.all(known_firings(world, never)[silent] == 0)


def test_means_by_frequency():
    freq, score = np.array([.001, .001, .01, .1]), np.array([1., 3, np.nan, 5])
    curve = by_frequency(freq, score, 3)
    assert curve.tolist() == [2, 5] and list(curve.index) == pytest.approx([.001, .1])
    for n in (1, 2, 7):
        every = by_frequency(np.geomspace(1e-4, .3, 50), np.ones(50), n)
        assert len(every) == n and (every == 1).all()


@pytest.fixture(scope='module')
def small():
    cfg = StudyConfig(world=WorldConfig(d_in=32, n_roots=64, n_parents=16, n_topics=4, active=2.5, shift=5., boost=2.),
                      training=SAETrainConfig(lr=5e-3), resampling=ResampleConfig(window=20_000, pool=10_240),
                      n_train=200_000, n_test=40_000, batch=512, l1=.5, l1_perfect=.35, l1_frozen=1.)
    return cfg, compare(cfg)


@pytest.mark.parametrize('score', ['mcc', 'f1', 'f1_there'])
def test_a_score_puts_perfect_before_trained_before_frozen_before_shuffled(small, score):
    "Frozen and shuffled have random directions both: those alone cannot tell them apart, firings can."
    _, c = small
    perfect, trained, frozen, mixed = (c.recovered[k].summary()[score] for k in RECIPES)
    assert perfect > trained+.02 and trained > frozen+.1
    assert abs(frozen-mixed) < .02 if score == 'mcc' else frozen > mixed+.02


def test_decoders_that_are_given_stay(small):
    cfg, c = small
    assert torch.allclose(c.saes['perfect'].W_dec, c.world.truth, atol=1e-5)
    frozen = c.saes['frozen']
    assert torch.allclose(frozen.W_dec, SAE(frozen.cfg).W_dec, atol=1e-5) and not torch.allclose(frozen.W_enc, SAE(frozen.cfg).W_enc, atol=.1)
    assert c.recovered['perfect'].cosine == pytest.approx(1, abs=1e-4)


def test_shuffling_keeps_each_features_numbers(small):
    sae = small[1].saes['trained']
    x = small[1].test.x[:3000]
    mixed = shuffled(sae, x, 4)
    for a, b in ((sae.W_dec, mixed.W_dec), (sae.W_enc.T, mixed.W_enc.T)): assert torch.equal(a.sort(1).values, b.sort(1).values)
    assert torch.allclose((mixed.b_enc-sae.b_enc).std(), torch.tensor(0.), atol=1e-5) and torch.equal(shuffled(sae, x, 4).W_dec, mixed.W_dec)
    assert not torch.equal(shuffled(sae, x, 5).W_dec, mixed.W_dec)
    before, after = ((s.encode(x) > 0).sum().item() for s in (sae, mixed))
    assert after == pytest.approx(before, rel=.01)


def test_a_study_goes_on_where_it_stopped(tmp_path):
    called = []
    def other(batches, seed):
        called.append(seed)
        return baselines(World(replace(QUICK.world, seed=seed)), QUICK)['frozen'](batches, seed)
    def broken(batches, seed): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): study(replace(QUICK, seeds=(0,)), dict(broken=broken), folder=tmp_path)
    first = json.loads((tmp_path/'planted.json').read_text())
    assert [r['recipe'] for r in first['rows']] == [CEILING, *RECIPES]
    out = study(QUICK, dict(other=other), folder=tmp_path)
    assert out['rows'][:5] == first['rows'] and called == [0, 1]
    assert {(r['seed'], r['recipe']) for r in out['rows']} == {(s, k) for s in (0, 1) for k in (CEILING, *RECIPES, 'other')}
    assert study(QUICK, dict(other=other), folder=tmp_path) == out and called == [0, 1]
    frozen, same = ([{k: v for k, v in r.items() if k not in ('recipe', 'seconds')} for r in out['rows'] if r['recipe'] == k] for k in ('frozen', 'other'))
    assert frozen == same  # a recipe is a function of batches and seed
    assert StudyConfig.from_dict(out['config']) == QUICK and out['run']['vectors'] == dict(train=20_480, test=4_000)
    value, low, high, n = out['intervals']['trained']['mcc']
    assert low <= value <= high and n == 2
    with pytest.raises(ValueError, match='l1: 0.1, not 0.2'): study(replace(QUICK, l1=.1), folder=tmp_path)


def test_means_and_differences_over_seeds():
    rows = [dict(seed=s, recipe=r, mcc=.5*s+.1*(r == 'a'), cosine_by_frequency=[[.1, s], [.2, 1.]]) for s in (0, 1) for r in 'ab']
    assert over_seeds(rows)['a']['mcc'].value == pytest.approx(.35)
    gap = over_seeds(rows, less='b')['a']['mcc']
    assert gap[:3] == pytest.approx([.1]*3) and gap.n == 2
    curve = mean_curve(rows, 'a')
    assert list(curve) == [.1, .2] and curve[.1].value == .5 and curve[.2].low == 1


def test_the_stored_study_ranks(root):
    path = root/'nbs/results/planted.json'
    if not path.is_file(): pytest.skip('the long study has not been stored')
    d = json.loads(path.read_text())
    cfg = StudyConfig.from_dict(d['config'])
    assert cfg.world.n_true >= 2000 and 128 <= cfg.world.d_in <= 256 and len(cfg.seeds) >= 5
    for better, worse in zip(RECIPES[:2], RECIPES[1:]):
        gap = over_seeds(d['rows'], less=worse)[better]
        assert all(gap[m].low > 0 and gap[m].n >= 5 for m in ('mcc', 'f1', 'f1_there')), worse
    assert over_seeds(d['rows'], less='shuffled')['frozen']['f1_there'].low > 0
