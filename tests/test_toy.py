"Toy models: shapes, independence of instances, determinism, bad input; the chapters' stored claims."
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from monosem.core import make_generator
from monosem.geometry import dimensionality_scatter
from monosem.phases import PHASES, phase_maps
from monosem.planted import matched_cosine
from monosem.toy import (Anticorrelated, Correlated, Points, Signed, Sparse, ToyConfig, ToyModel, ToyTrainConfig, best_of, evaluate_toy, explore, explorer,
                         importance, interference, linear_loss, superposition_bars, toy_loss, train_toy)

SHORT = ToyTrainConfig(steps=20, batch=16)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), m=st.integers(1, 7), k=st.integers(1, 4), batch=st.integers(1, 5), hidden=st.sampled_from(['identity', 'relu']),
       output=st.sampled_from(['identity', 'relu']), tied=st.booleans(), density=st.floats(0, 1))
def test_shapes_and_independence_of_instances(n, m, k, batch, hidden, output, tied, density):
    "Each instance answers as it would alone, and its gradient knows nothing of the others."
    if hidden == 'identity': m = min(m, n)
    cfg = ToyConfig(n, m, k, hidden, output, tied)
    model, x = ToyModel(cfg), Sparse([density]*k, n).sample(batch, make_generator(0))
    assert x.shape == (k, batch, n) and model.encode(x).shape == (k, batch, m)
    loss = toy_loss(model(x), x, importance(1., n))
    loss.sum().backward()
    for i in range(k):
        alone = model.select([i]).requires_grad_(True)
        one = toy_loss(alone(x[i:i+1]), x[i:i+1], importance(1., n))
        one.sum().backward()
        assert torch.allclose(one[0], loss[i], atol=1e-5)
        for a,b in zip(alone.parameters(), model.parameters()): assert torch.allclose(a.grad[0], b.grad[i], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 4), density=st.floats(.05, 1), seed=st.integers(0, 99))
def test_linear_closed_form_is_the_expected_loss(n, m, density, seed):
    "400,000 draws: a relative standard error under 1 %."
    model = ToyModel(ToyConfig(n, min(m, n), output='identity', seed=seed)).requires_grad_(False)
    model.b.copy_(density/2*(1-(model.W.mT@model.W).sum(-1)))
    weights = torch.rand(n, generator=make_generator(seed))+.1
    assert torch.allclose(evaluate_toy(model, Sparse(density, n), weights, n=400_000), linear_loss(model.W, weights, density), rtol=.05, atol=1e-7)


def test_densities_zero_and_one_are_worlds_too():
    x = Sparse([[0., 1.]], 2).sample(1000, make_generator(0))
    assert (x[..., 0] == 0).all() and (x[..., 1] > 0).all() and x.isfinite().all()


@pytest.mark.parametrize('inputs', [Sparse([.3]*2, 6), Correlated([.3]*2, 6, 3), Anticorrelated([.3]*2, 6, 2), Signed(Sparse([.3]*2, 6)),
                                    Points(torch.rand(2, 9, 6, generator=make_generator(0)))], ids=lambda i: type(i).__name__)
def test_training_is_deterministic(inputs):
    a, b = (train_toy(ToyConfig(6, 2, 2), inputs, train=SHORT) for _ in range(2))
    assert torch.equal(a.W, b.W) and torch.equal(a.loss, b.loss) and a.W.shape == (2, 2, 2, 6)


def test_anticorrelated_sets_have_one_active_member():
    x = Anticorrelated([.5], 8, 4).sample(500, make_generator(0)).view(500, 2, 4)
    assert set((x > 0).sum(-1).flatten().tolist()) == {0, 1}


def test_a_diverged_instance_is_dropped_from_its_block():
    inputs = Sparse([.3]*6, 4)
    start = ToyModel(ToyConfig(4, 2, 6))
    start.W.data[1] = torch.inf
    with pytest.warns(UserWarning, match=r'1 of 6 .*\[1\]'): done = train_toy(start.cfg, inputs, train=SHORT, start=start)
    assert done.instances.tolist() == [0, 2, 3, 4, 5] and done.loss.isfinite().all()
    best = best_of(done, 2)
    assert best.cfg.n_inst == 3 and torch.equal(best.W[0], done.model.W[0])
    start.W.data[0] = torch.nan
    with pytest.warns(UserWarning): done = train_toy(start.cfg, inputs, train=SHORT, start=start)
    with pytest.raises(FloatingPointError, match='all 2 instances'): best_of(done, 2)


@pytest.mark.parametrize('last', [False, True])
def test_a_whole_setting_that_diverged_is_an_error(last):
    start, gone = ToyModel(ToyConfig(4, 2, 4)), slice(2, 4) if last else slice(0, 2)
    start.W.data[gone] = torch.nan
    with pytest.warns(UserWarning): done = train_toy(start.cfg, Sparse([.3]*4, 4), train=SHORT, start=start)
    with pytest.raises(FloatingPointError): best_of(done, 2)


@pytest.mark.parametrize('call,says', [
    (lambda: ToyConfig(n_feats=0), 'n_feats=0'), (lambda: ToyConfig(d_hidden=0), 'd_hidden=0'), (lambda: ToyConfig(3, 4), 'd_hidden=4'),
    (lambda: ToyConfig(hidden='gelu'), 'gelu'), (lambda: Sparse(1.5, 3), '1.5'), (lambda: Sparse(-.1, 3), '-0.1'), (lambda: Sparse(float('nan'), 3), 'nan'),
    (lambda: Sparse([[.1, .2]], 3), r'\(1, 2\)'), (lambda: Sparse(.1, 0), 'n_feats=0'), (lambda: Correlated(.1, 7, 2), 'sets of 2'), (lambda: Anticorrelated(.1, 7, 9), 'sets of 9'),
    (lambda: importance([1., -1.], 2), '-1'), (lambda: importance([1., 2., 3.], 2), r'\(3,\)'), (lambda: importance(float('nan'), 2), 'nan'),
    (lambda: ToyTrainConfig(steps=0), 'steps=0'), (lambda: ToyTrainConfig(lr=-1.), 'lr=-1'), (lambda: ToyTrainConfig(snapshots=1), 'snapshots=1'),
    (lambda: train_toy(ToyConfig(4, 2), Sparse(.1, 5)), '1 instances x 4'), (lambda: train_toy(ToyConfig(4, 2, 3), Sparse([.1]*3, 4), torch.ones(2, 4)), 'importances for 2'),
    (lambda: Points(torch.full((1, 2, 3), torch.nan)), 'NaN'), (lambda: explore([], .5), '0 densities'), (lambda: explore([.1], 0.), 'decay=0')])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says) as e: call()
    assert '; expected ' in str(e.value)


def test_interference_of_a_dropped_feature_is_finite():
    assert torch.equal(interference(torch.tensor([[1., 0.], [0., 0.]])), torch.zeros(2))


def test_matched_cosine_counts_each_learned_feature_once():
    truth = torch.eye(4)
    assert matched_cosine(truth, torch.eye(4)[[2, 2]]).sum() == 1  # two copies find one direction
    assert matched_cosine(truth, torch.eye(4)[[3, 0, 1, 2]]).tolist() == [1]*4


def _rows(root, *chapters): return [r for c in chapters for r in json.loads((root/f'nbs/results/{c}.json').read_text())]


def test_every_toy_claim_is_in_the_ledger(root):
    rows = _rows(root, 'toy', 'phases', 'geometry', 'dynamics', 'adversaries', 'computation', 'memorisation', 'recovery')
    assert {f'T{i}' for i in range(1, 14)} | {'S1'} <= {r['id'] for r in rows}
    assert all(r['low'] <= r['ours'] <= r['high'] and r['n'] >= 1 and r['run'] and r['note'] for r in rows)


def test_benchmark_of_the_batched_sweep(root):
    sweeps = json.loads((root/'benchmarks/toy.json').read_text())['sweeps'].values()
    assert any(s['speedup_median'] >= 5 for s in sweeps) and all(.9 < s['best_loss_ratio'][0] < 1.1 for s in sweeps)


def test_stored_claims_agree_with_closed_forms(root):
    "Agreement with closed forms, dimensions that add up, directions recovered."
    find = lambda chapter, what: next(r for r in _rows(root, chapter) if what in r['note'])
    for size in ('n=2, m=1: cells more than one', 'n=3, m=2: cells more than one'): assert find('phases', size)['ours'] >= .95
    assert abs(find('geometry', 'all features, all densities')['ours']-1) <= .02
    assert find('recovery', 'dictionary of 80')['low'] >= .95 and find('recovery', 'paired difference')['low'] > 0


def test_a_map_calls_its_phases_what_its_legend_calls_them():
    ratios, densities = torch.logspace(-1, 1, 4), torch.logspace(-2, 0, 4)
    rows = torch.arange(4)[:, None].expand(4, 4)  # a phase for each importance
    fig = phase_maps({'map': rows}, ratios, densities, 'title', n_feats=(3,))
    words = {a.text.replace('<br>', ' '): (a.x, a.y) for a in fig.layout.annotations}
    assert list(words)[1:] == list(PHASES[:4]) == [t.name for t in fig.data[2:]]
    at = torch.tensor(list(words.values())[1:])
    assert torch.allclose(at, torch.stack([torch.full((4,), -1.), ratios.log10()], 1), atol=1e-6)


def test_knobs_train_once_and_refuse_what_is_no_model():
    shown = []
    box = explorer(show=shown.append)
    n_feats, note = box.children[0].children[2], box.children[1].children[2]
    n_feats.value = 12
    assert len(shown) == 2 and len(shown[1].data[0].z) == 12
    n_feats.value = 3
    assert len(shown) == 2 and 'at most as many dimensions as features' in note.value


def test_a_quantity_has_one_name_on_every_axis():
    model = ToyModel(ToyConfig(3, 2, 1)).requires_grad_(False)
    bars = superposition_bars(model, ['.1'], 'title')
    slider = explore([.5, .1], n_feats=3, d_hidden=2).layout.sliders[0]
    assert bars.layout.xaxis.title.text == 'density p'
    assert slider.currentvalue.prefix == 'density p: '
    scatter = dimensionality_scatter([2.], [.5], [[.5, .5]], 'title')
    assert scatter.layout.xaxis.title.text == 'rarity 1/p'
    maps = phase_maps({'': torch.zeros(2, 2).long()}, torch.tensor([.1, 1.]),
                      torch.tensor([.1, 1.]), 'title')
    assert maps.layout.xaxis.title.text == 'density p'
