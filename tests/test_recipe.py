"Each recipe by hand, killed and gone on with; controls at the L0 they promise; paired differences."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from monosem.checkpoints import Checkpoints
from monosem.controls import (Measure, affine, compare, difference, equal_l0, fixed_controls, ica, mean_l0, neurons, pca,
                              thresholded, train_controls, trimmed)
from monosem.kernels import dense_gradients, plain_update, update
from monosem.planted import planted
from monosem.recipe import (Recipe, Restarter, Scores, aligned, density_clusters, free_norms, frozen_decoder, frozen_encoder,
                            held_out, no_pre_bias, no_projection, no_renormalisation, paired, plot_clusters, recipes, restart_dead,
                            soft_frozen_decoder, student, tied, untrained_parts)
from monosem.resampling import ResampleConfig, Resampler
from monosem.sae import SAE, SAEConfig, sae_loss
from monosem.training import SAETrainConfig, train_sae, train_saes

RULES = [no_pre_bias, tied, no_projection, no_renormalisation, free_norms, aligned, frozen_decoder, soft_frozen_decoder, frozen_encoder]
SHAPE, CFG = SAEConfig(d_in=12, n_feats=30, l1=.1), SAETrainConfig(lr=5e-3, dead_window=500)
OFTEN = ResampleConfig(at=(.3, .6), window=300, pool=256)
ALL = recipes(OFTEN) | untrained_parts()


def _data(n=5120, seed=0): return planted(20, 12, n, seed=seed)[1]+.5


def _stepped(rule, n=30, shape=SHAPE, clip=0.):
    sae = SAE(shape)
    sae.b_dec.data += .3
    opt = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for x in _data(n*64).split(64): rule(sae, opt, dense_gradients(sae, x, .1), clip)
    return sae


# --- recipes ---

@pytest.mark.parametrize('name', ALL)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    "Stopped after step 27, between two resamplings that find dead features; the checkpoint is of step 20."
    kind, batches = ALL[name], _data().split(64)
    def silence(state):
        if state.step == 5: state.sae.b_enc.data[:6] = -50.
    class Stumble:
        fell = False
        def __call__(self, state):
            if state.step == 27 and not self.fell:
                self.fell = True
                raise KeyboardInterrupt
    stumble = Stumble()
    def go(*more, **kw):
        callbacks = [*kind.callbacks(), silence, *more]
        return train_sae(batches, SHAPE, CFG, callbacks, update=kind.update, **kw), callbacks
    whole, seen = go()
    kept = Checkpoints(tmp_path, every_s=None, every_steps=10)
    with pytest.raises(KeyboardInterrupt): go(stumble, checkpoints=kept)
    went_on, again = go(stumble, checkpoints=kept)
    for a, b in zip(whole.sae.parameters(), went_on.sae.parameters()): assert torch.equal(a, b)
    if hasattr(seen[0], 'history'):
        assert seen[0].history == again[0].history and any(v >= 6 for v in seen[0].history[0].values())


@pytest.mark.parametrize('name', [k for k,r in ALL.items() if r.update is not update])
def test_a_run_of_another_recipe_is_not_gone_on_with(name, tmp_path):
    kept, batches = Checkpoints(tmp_path, every_s=None, every_steps=10), _data(640).split(64)
    train_sae(batches, SHAPE, CFG, checkpoints=kept)
    with pytest.raises(ValueError, match='update'): train_sae(batches, SHAPE, CFG, checkpoints=kept, update=ALL[name].update)


def test_another_way_to_restart_is_not_gone_on_with(tmp_path):
    kept, batches = Checkpoints(tmp_path, every_s=None, every_steps=10), _data(640).split(64)
    train_sae(batches, SHAPE, CFG, [Resampler(replace(OFTEN, pool=64))], checkpoints=kept)
    with pytest.raises(ValueError, match='callbacks'):
        train_sae(batches, SHAPE, CFG, [Restarter(replace(OFTEN, pool=64))], checkpoints=kept)


def test_the_published_recipe_is_the_trainer_as_it_is():
    batches = _data().split(64)
    plain = train_sae(batches, SHAPE, CFG, [Resampler(OFTEN)])
    kind = ALL['published']
    same = train_sae(batches, SHAPE, CFG, kind.callbacks(), update=kind.update)
    assert all(torch.equal(a, b) for a,b in zip(plain.sae.parameters(), same.sae.parameters()))


@pytest.mark.parametrize('rule', RULES)
def test_several_dictionaries_do_not_share_a_start(rule):
    "A rule holds nothing of a dictionary: on one stream, two are as alone."
    shapes, batches = [SHAPE, replace(SHAPE, seed=1, n_feats=25)], _data(1280).split(64)
    together = train_saes(batches, shapes, CFG, update=rule)
    for shape, done in zip(shapes, together):
        alone = train_sae(batches, shape, CFG, update=rule)
        assert all(torch.equal(a, b) for a,b in zip(alone.sae.parameters(), done.sae.parameters()))


@pytest.mark.parametrize('rule', [no_projection, no_renormalisation, free_norms])
def test_a_step_without_projection_or_norm_by_hand(rule):
    "Plain stochastic descent with rate 1 in place of Adam: what is subtracted is the gradient as the rule leaves it."
    sae, before = SAE(SHAPE), SAE(SHAPE)
    opt = torch.optim.SGD(sae.parameters(), lr=1.)
    out = dense_gradients(sae, _data(64), .1)
    g, rows = out.W_dec.clone(), before.W_dec.detach()
    rule(sae, opt, out)
    want = rows-g
    if rule is no_projection: want = F.normalize(want, dim=-1)
    if rule is no_renormalisation: want = rows-(g-(g*rows).sum(-1, keepdim=True)*rows)
    assert torch.allclose(sae.W_dec, want, atol=1e-6)
    assert torch.allclose(sae.W_enc, before.W_enc-out.W_enc, atol=1e-6) and torch.allclose(sae.b_enc, before.b_enc-out.b_enc, atol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_a_long_gradient_is_clipped_in_every_recipe(rule):
    "With descent of rate 1 the whole step is no longer than the clip; what is done after the step is left out of the weights looked at."
    sae, before = SAE(SHAPE), SAE(SHAPE)
    opt = torch.optim.SGD(sae.parameters(), lr=1.)
    opt.state[sae.b_enc] = dict(step=1)  # not the first batch
    rule(sae, opt, dense_gradients(sae, 50*_data(64), .1), clip=.01)
    moved = (sae.b_dec-before.b_dec).norm()
    assert 0 < moved <= .01*(1+1e-4)


@pytest.mark.parametrize('rule', [tied, no_pre_bias])
def test_the_first_batch_sets_the_start_and_trains_nothing(rule):
    sae, before = SAE(SHAPE), SAE(SHAPE)
    for s in (sae, before): s.b_dec.data += .3
    opt = torch.optim.Adam(sae.parameters(), lr=5e-3)
    rule(sae, opt, dense_gradients(sae, _data(64), .1))
    assert torch.allclose(sae.W_dec, before.W_dec, atol=1e-6) and torch.equal(sae.b_dec, before.b_dec)
    own = sae.b_enc-sae.b_dec@sae.W_enc
    if rule is tied: assert torch.equal(sae.W_enc, sae.W_dec.T) and torch.equal(sae.b_enc, before.b_enc)
    else: assert torch.equal(sae.W_enc, before.W_enc) and own.abs().max() < 1e-6


def test_without_a_pre_bias_a_moving_decoder_bias_moves_no_activation():
    "Only W_enc and the bias itself do: here their gradients are 0, and that of b_dec is not."
    sae = _stepped(no_pre_bias, 3)
    opt = torch.optim.Adam(sae.parameters(), lr=.1)
    opt.state[sae.b_enc] = dict(step=torch.tensor(1.), exp_avg=torch.zeros(30), exp_avg_sq=torch.zeros(30))
    x = _data(64)
    out = dense_gradients(sae, x, .1)
    still = out._replace(W_enc=-torch.outer(sae.b_dec, torch.zeros(30)), b_enc=torch.zeros(30), W_dec=torch.zeros_like(out.W_dec))
    f, b_dec = sae.encode(x), sae.b_dec.clone()
    no_pre_bias(sae, opt, still)
    assert (sae.b_dec-b_dec).abs().min() > .05 and torch.allclose(sae.encode(x), f, atol=1e-5)


def test_soft_frozen_rows_are_turned_back_in_their_plane():
    "30, 60 and 180 degrees away from the start: kept; to the limit, on the same side; to the start itself."
    sae = SAE(SAEConfig(d_in=3, n_feats=3))
    start = sae.W_dec.detach().clone()
    aside = F.normalize(torch.linalg.cross(start, torch.randn(3, 3)), dim=-1)
    cos = torch.tensor([3**.5/2, .5, -1.])[:, None]
    turned = cos*start+(1-cos**2).clamp_min(0).sqrt()*aside
    sae.W_dec.data.copy_(turned)
    opt = torch.optim.SGD(sae.parameters(), lr=0.)
    soft_frozen_decoder(sae, opt, dense_gradients(sae, torch.randn(8, 3), .1))
    assert torch.allclose(sae.W_dec[0], turned[0], atol=1e-5)
    assert torch.allclose(sae.W_dec[1], .8*start[1]+.6*aside[1], atol=1e-5)
    assert (sae.W_dec[2]@start[2]) > .79


def test_a_frozen_encoder_keeps_directions_and_learns_lengths_that_stay_positive():
    sae, began = _stepped(frozen_encoder, 60), SAE(SHAPE)
    length = sae.W_enc.norm(dim=0)
    alive = length > 0
    assert alive.float().mean() > .5 and (length/began.W_enc.norm(dim=0)).std() > .05
    assert torch.allclose(F.cosine_similarity(sae.W_enc, began.W_enc, dim=0)[alive], torch.ones(int(alive.sum())), atol=1e-5)
    pulled = SAE(SHAPE)
    opt = torch.optim.SGD(pulled.parameters(), lr=1.)
    out = dense_gradients(pulled, _data(64), .1)
    frozen_encoder(pulled, opt, out._replace(W_enc=100*began.W_enc.detach()))
    assert (pulled.W_enc == 0).all()


def test_frozen_rows_come_back_after_a_resampling():
    def overwrite(state): state.sae.W_dec.data[3] = F.normalize(torch.ones(12), dim=0)
    done = train_sae(_data(640).split(64), SHAPE, CFG, [lambda s: s.step < 9 and overwrite(s)], update=frozen_decoder)
    assert torch.equal(done.sae.W_dec, SAE(SHAPE).W_dec)


def test_restarting_draws_anew_each_time_and_forgets():
    sae = _stepped(update, 5)
    opt = torch.optim.Adam(sae.parameters(), lr=5e-3)
    update(sae, opt, dense_gradients(sae, _data(64), .1))
    before, dead = [p.detach().clone() for p in sae.parameters()], torch.arange(30) % 3 == 0
    assert restart_dead(sae, opt, dead, 5) == 10
    for p, old, columns in zip(sae.parameters(), before, (True, False, False, None)):
        if columns is None: assert torch.equal(p, old); continue
        p, old = (p.T, old.T) if columns else (p, old)
        assert torch.equal(p[~dead], old[~dead]) and not torch.equal(p[dead], old[dead])
    for p in (sae.W_enc.T, sae.W_dec): assert p[dead].norm(dim=-1).min() > 0
    assert (opt.state[sae.W_enc]['exp_avg'][:, dead] == 0).all() and (opt.state[sae.b_dec]['exp_avg'] != 0).any()


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.integers(0, 9))
def test_held_out_scores_do_not_depend_on_norms(power, seed):
    "Rows k times as long, activations a k-th: the same reconstruction, L0, and L1 in the unit of norm 1."
    sae, x = SAE(replace(SHAPE, seed=seed)), _data(500, seed)
    other, k = SAE(SHAPE), 10**(power*torch.rand(30, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        other.W_enc.copy_(sae.W_enc/k); other.b_enc.copy_(sae.b_enc/k); other.W_dec.copy_(sae.W_dec*k[:, None]); other.b_dec.copy_(sae.b_dec)
    a, b, was = held_out(sae, x), held_out(other, x), other.W_dec.detach().clone()
    assert np.allclose(a[:3], b[:3], rtol=1e-4) and abs(a.l0-b.l0) < .05
    assert torch.equal(other.W_dec, was)  # measured in a copy


def test_held_out_scores_by_hand():
    sae, x = SAE(SHAPE), _data(9000)
    sae.requires_grad_(False)
    f = sae.encode(x)
    want, s = sae_loss(x, sae.decode(f), f, SHAPE.l1), held_out(sae, x)
    assert np.allclose([s.loss, s.mse, s.l1, s.l0], [float(v) for v in want], rtol=1e-4)
    assert s.fvu == pytest.approx(float(((x-sae.decode(f))**2).sum()/((x-x.mean(0))**2).sum()), rel=1e-3)
    assert s.alive == pytest.approx(float((f > 0).any(0).float().mean())) and isinstance(s, Scores)
    with pytest.raises(ValueError, match='at least 2'): held_out(sae, x[:1])


def test_students_interval_by_hand():
    e = student([1., 2., 3.])
    assert e.value == 2 and e.high-2 == pytest.approx(4.302653*1/3**.5, rel=1e-5) and e.low == pytest.approx(4-e.high) and e.n == 3


def test_pairs_are_within_a_seed():
    rows = pd.DataFrame([dict(recipe=r, seed=s, loss=10*s+d) for s in range(3) for r,d in (('published', 0), ('b', 1), ('a', -2))])
    d = paired(rows, 'loss')
    assert list(d) == ['b', 'a'] and d['b'][:3] == (1, 1, 1) and d['a'].value == -2
    with pytest.raises(ValueError, match="no recipe 'c'"): paired(rows, 'loss', 'c')


def test_recipes_make_new_callbacks_for_every_run():
    a, b = (ALL['published'].callbacks() for _ in range(2))
    assert a[0] is not b[0] and Recipe().callbacks() == []


def _densities(n_low, apart=2.):
    gen = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=12, n_feats=300)).requires_grad_(False)
    low = torch.arange(300) < n_low
    log = torch.where(low, -5-apart, -5.)+.4*torch.randn(300, generator=gen)
    sae.b_enc.copy_(-.5*low+.1*torch.randn(300, generator=gen))
    return sae, 10**log.double().numpy(), low.numpy()


@pytest.mark.parametrize('n_low', [20, 150, 280])
def test_clusters_of_any_size_are_told_apart(n_low):
    sae, density, low = _densities(n_low)
    found = density_clusters(sae, density)
    assert ((found.table.cluster == 'ultralow') == low).mean() > .97 and found.distance > 2 and found.gain > 0


def test_one_cluster_is_high_and_what_never_fires_is_in_none():
    sae, density, _ = _densities(0)
    density[5:9] = 0
    found = density_clusters(sae, density)
    assert (found.table.cluster == 'high').all() and len(found.table) == 296 and not {5, 8} & set(found.table.feature)
    assert len(plot_clusters(found, 'one').data) == 2 and len(plot_clusters(density_clusters(*_densities(90)[:2]), 'two').data) == 4


# --- controls ---

def test_an_affine_dictionary_is_the_formula():
    gen = torch.Generator().manual_seed(0)
    read, write, bias, b_dec, x = (torch.randn(*s, generator=gen) for s in ((7, 4), (4, 7), (4,), (7,), (50, 7)))
    sae, f = affine(read, bias, write, b_dec), (x@read+bias).relu()
    assert torch.allclose(sae.encode(x), f, atol=1e-5) and torch.allclose(sae(x), f@write+b_dec, atol=1e-5) and not sae.W_enc.requires_grad


@pytest.mark.parametrize('l0', [.5, 2., 5.])
def test_fixed_controls_have_the_l0_asked_for(l0):
    "Chosen on one half, within 5 % on the other; rows of norm 1; no mean error."
    x = _data(20_000)
    for name, sae in fixed_controls(x[:10_000], l0, 40).items():
        assert mean_l0(sae, x[10_000:]) == pytest.approx(l0, rel=.06), name
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(sae.cfg.n_feats), atol=1e-5), name
        assert (x-sae(x)).mean(0).abs().max() < .05, name


def test_gains_are_least_squares():
    "With the best bias, no common factor does better; along an axis of PCA or a neuron, none of a single feature either."
    x = _data(8000)
    for name, sae in fixed_controls(x, 3., 40).items():
        x = _data(8000)[4000 if name in ('PCA', 'ICA') else 0:]
        f = sae.encode(x)
        def error(k): return (x-(f*k)@sae.W_dec).var(0).sum()
        assert error(1.) <= min(error(.97), error(1.03)), name
        if name in ('PCA', 'neurons'):
            one = torch.ones(sae.cfg.n_feats)
            for j in f.sum(0).topk(3).indices: assert error(1.) <= 1.002*min(error(one.index_fill(0, j, k)) for k in (.9, 1.1)), name


def test_the_neurons_are_the_strongest_of_each():
    x = _data(6000).relu()
    sae = neurons(x, 3.)
    f, theta = sae.encode(x), np.partition(x.numpy().ravel(), x.numel()-18_000-1)[x.numel()-18_000-1]
    assert torch.equal(f > 0, x > theta) or ((f > 0) != (x > theta)).float().mean() < 1e-4


def test_pca_is_that_of_numpy_and_signs_come_in_pairs():
    x = _data(6000)
    sae = pca(x, 3.)
    _, axes = np.linalg.eigh(np.cov(x[:3000].double().numpy().T))
    assert np.allclose(np.abs(sae.W_dec[:12].numpy()@axes), np.eye(12), atol=1e-3) and torch.equal(sae.W_dec[:12], -sae.W_dec[12:])


def test_ica_passes_over_dimensions_in_which_nothing_varies():
    x = torch.cat([_data(6000), torch.full((6000, 2), 3.)], 1)
    assert ica(x, 3.).cfg.n_feats == 24


def test_settings_that_cannot_be_met_are_refused():
    x = _data(100)
    for l0 in (0., 24.):
        with pytest.raises(ValueError, match='more than 0 and less than all'): pca(x, l0)
    with pytest.raises(ValueError, match='at least four times'): fixed_controls(x[:20], 2.)
    with pytest.raises(ValueError, match='positive numbers'): equal_l0(lambda l1: 1., 0., 1.)


@settings(max_examples=60, deadline=None)
@given(st.floats(.3, 3), st.floats(-2, 2), st.floats(.02, 20), st.floats(2, 60))
def test_a_power_law_is_met(power, log_scale, first, target):
    "Whatever its exponent and wherever the search begins; an exact power law on the third try unless a move is cut."
    law = lambda l1: 10**log_scale/l1**power
    match = equal_l0(law, target, first, most=12)
    assert abs(law(match.l1)/target-1) < .031 or len(match.tried) == 12 and abs(np.log(target/law(first))/power) > 8*np.log(4)


def test_a_search_that_meets_dictionaries_of_nothing_comes_back():
    tried = equal_l0(lambda l1: 0. if l1 > .5 else 4/l1, 10., 3., most=8)
    assert tried.tried[3.] == 0 and abs((4/tried.l1)/10-1) < .5


def test_a_search_gives_up_and_keeps_the_nearest():
    match = equal_l0(lambda l1: 5., 10., 1., most=4)
    assert len(match.tried) == 4 and match.l1 in match.tried


@pytest.mark.parametrize('l0', [1., 4., 9.])
def test_trimming_meets_an_l0_and_changes_biases_alone(l0):
    sae, x = _stepped(update), _data(8000)
    out = trimmed(sae, x[:4000], l0)
    assert mean_l0(out, x[4000:]) == pytest.approx(l0, rel=.06)
    assert all(torch.equal(getattr(out, k), getattr(sae, k)) for k in ('W_enc', 'W_dec', 'b_dec'))


def test_trained_controls_have_the_l0_and_are_what_they_are_called(tmp_path):
    x, names = _data(12_800), []
    def kept(name):
        names.append(name)
        return Checkpoints(tmp_path/name, every_s=None, every_steps=50)
    trained = train_sae(x.split(64), SHAPE, CFG).sae
    l0 = mean_l0(trained, x)
    made = train_controls(x.split(64), x[:3200].split(64), x, SHAPE, CFG, l0, kept=kept)
    assert list(made) == list(dict.fromkeys(n.rsplit(" ", 1)[0] for n in names)) == ['frozen decoder', 'soft-frozen decoder', 'frozen encoder']
    start = SAE(SHAPE)
    for c in made.values(): assert mean_l0(c.sae, x) == pytest.approx(l0, rel=.03) and c.l1 in c.tried and 0 < len(c.tried) <= 4
    cosine = lambda a, b: F.cosine_similarity(a, b, dim=-1)
    assert torch.equal(made['frozen decoder'].sae.W_dec, start.W_dec)
    assert cosine(made['soft-frozen decoder'].sae.W_dec, start.W_dec).min() > .8-1e-5
    assert cosine(made['frozen encoder'].sae.W_enc.T, start.W_enc.T).min() > 1-1e-4


def _measure(values, of=lambda s: s.a/s.b): return Measure(pd.DataFrame(dict(a=values, b=1.)), of)


def test_a_difference_is_paired():
    "Documents differ much, the two dictionaries by one everywhere: no width."
    gen = np.random.default_rng(0)
    v = 100*gen.normal(size=50)
    gap = difference(_measure(v+1), _measure(v))
    assert gap.value == pytest.approx(1) and gap.high-gap.low < 1e-9 and _measure(v).estimate().high-_measure(v).estimate().low > 20


def test_rows_with_equal_names_are_not_multiplied():
    m = Measure(pd.DataFrame(dict(a=[1., 2., 3., 4.], b=1.), index=[0, 1, 0, 1]), lambda s: s.a/s.b)
    assert difference(m, m) == (0, 0, 0, 4)
    with pytest.raises(ValueError, match='same documents'): difference(m, m._replace(sums=m.sums[:2]))


def test_a_comparison_has_every_measure_that_the_reference_has():
    x, y = SAE(SHAPE), SAE(SHAPE)
    found = {x: dict(r=_measure([1., 2.]), more=_measure([1., 1.])), y: dict(r=_measure([0., 1.]))}
    table = compare(dict(x=x, y=y), lambda sae: found[sae], 'y')
    assert list(table.dictionary) == ['x', 'y'] and table.difference[0].value == -1 and table.difference[1] is None
    with pytest.raises(ValueError, match="no dictionary 'z'"): compare(dict(x=x), lambda sae: found[sae], 'z')


def test_claims_are_those_of_the_chapters(mini, tok):
    from monosem.evaluation import evaluate
    from monosem.proxies import CONTEXTS, claim_measures, test_contexts as tested
    from monosem.sae import load_sae
    from monosem.tokens import Mixture, token_windows
    from monosem.transformer import load_transformer
    A, sae = load_transformer('A', 'cpu'), load_sae('A/1', 'cpu')
    windows = token_windows(mini, tok, Mixture(budget=30_000), validation=True, spread=True)
    m = claim_measures(A, tok, windows, CONTEXTS[:1])(sae)
    e, (t,) = evaluate(A, sae, windows), tested(A, sae, tok, windows, CONTEXTS[:1])[0]
    assert m['FVU'].estimate() == e.fvu and m['L0'].estimate() == e.l0 and m['loss recovered'].estimate() == e.recovered
    assert m['arabic: r'].estimate() == t.r and m['arabic: r less best neuron'].estimate() == t.difference
    assert m['arabic: specificity'].estimate() == t.specificity
