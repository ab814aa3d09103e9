"The dictionary, its gradients and its resampling: exact small cases, weights of others, the newest pool, a cache that cannot be written."
import json, os, shutil, subprocess, sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import monosem
from monosem import resampling
from monosem.core import load_artefact, make_generator, save_artefact
from monosem.active import active_set
from monosem.kernels import DensitySwitch, dense_gradients, exact_loss, sparse_gradients
from monosem.resampling import ResampleConfig, Resampler, resample_dead
from monosem.sae import (SAE, SAEConfig, fold_decoder_norms, geometric_median, l1_from_mean_mse,
                         load_sae, normalize_decoder, remove_parallel_gradient, sae_loss, save_sae)
from monosem.training import SAETrainConfig, TrainState, pack_state, train_sae, unpack_state

NAMES = 'W_enc', 'b_enc', 'W_dec', 'b_dec'


def _random(*shape, seed=0): return torch.randn(*shape, generator=make_generator(seed))


def _sae(W_enc, b_enc, W_dec, b_dec, l1=1.):
    "A dictionary of given weights."
    sae = SAE(SAEConfig(d_in=len(b_dec), n_feats=len(b_enc), l1=l1))
    weights = (torch.as_tensor(w, dtype=torch.float32) for w in (W_enc, b_enc, W_dec, b_dec))
    sae.load_state_dict(dict(zip(NAMES, weights)))
    return sae


def _by_hand():
    "Two vectors in two dimensions, three features; one pre-activation is exactly 0, so it does not fire."
    sae = _sae([[1, -1, 0], [0, 1, 2]], [0, 0, -1], [[1, 0], [0, 1], [-1, 0]], [1, 0])
    return sae, torch.tensor([[3., 1.], [1., 2.]])


F_BY_HAND, X_HAT_BY_HAND = [[2, 0, 1], [0, 2, 3]], [[2, 0], [-2, 2]]
LOSS_BY_HAND = [7.5, 5.5, 4., 2.]  # total at a coefficient of 1/2, mse, l1, l0
GRADIENTS_BY_HAND = dict(W_enc=[[-1.5, 0, 2.5], [-.75, .5, 7.75]], b_enc=[-.75, .25, 4.5],
                         W_dec=[[-2, -2], [-6, 0], [-10, -1]], b_dec=[-3, -10.25])


# The dictionary

def test_encode_and_decode_by_hand():
    sae, x = _by_hand()
    assert sae.encode(x).tolist() == F_BY_HAND and sae(x).tolist() == X_HAT_BY_HAND
    assert sae.decode(sae.encode(x)).tolist() == X_HAT_BY_HAND


@pytest.mark.parametrize('shape', [(), (5,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_kept(shape):
    sae = SAE(SAEConfig(d_in=4, n_feats=6))
    x = _random(*shape, 4)
    assert sae.encode(x).shape == (*shape, 6) and sae(x).shape == x.shape
    assert torch.allclose(sae.encode(x).reshape(-1, 6), sae.encode(x.reshape(-1, 4)), atol=1e-6)


def test_the_start_is_uniform_within_the_bound_with_unit_rows():
    sae = SAE(SAEConfig(d_in=16, n_feats=4000, start='random'))
    assert .249 < sae.W_enc.max() <= .25 and -.25 <= sae.W_enc.min() < -.249 and abs(sae.W_enc.mean()) < .003
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(4000)) and abs(sae.W_dec.mean()) < .005
    assert sae.b_enc.abs().max() == sae.b_dec.abs().max() == 0 and sae.W_enc.T.is_contiguous()
    assert torch.equal(sae.W_enc, SAE(sae.cfg).W_enc)
    assert not torch.equal(sae.W_enc, SAE(SAEConfig(d_in=16, n_feats=4000, start='random', seed=1)).W_enc)


def test_settings_at_their_limits():
    assert repr(SAE(SAEConfig(d_in=1, n_feats=2, l1=0.))) == 'SAE(1 -> 2 features, l1=0)'
    for bad in (dict(d_in=0), dict(n_feats=0), dict(l1=-1e-9), dict(start='tied')):
        with pytest.raises(ValueError, match=f'{[*bad][0]}='): SAEConfig(**bad)


def test_loss_by_hand():
    x, x_hat = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[0., 2.], [3., 1.]])
    f = torch.tensor([[1., 0., 2.], [0., 0., 3.]])
    out = sae_loss(x, x_hat, f, .5)
    assert (out.total, out.mse, out.l1, out.l0) == (6.5, 5., 3., 1.5)


def test_a_coefficient_beside_the_mean_error_is_the_same_tradeoff():
    sae, x = SAE(SAEConfig(d_in=12, n_feats=9)), _random(20, 12)
    f = sae.encode(x)
    mean_form = (x-sae(x)).square().mean()+.03*f.sum(-1).mean()
    assert torch.isclose(sae_loss(x, sae(x), f, l1_from_mean_mse(.03, 12)).total, 12*mean_form)
    assert l1_from_mean_mse(.004, 512) == 2.048


def test_the_gradient_along_a_row_is_removed():
    sae = _sae(torch.zeros(2, 2), [0, 0], [[1, 0], [.6, .8]], [0, 0])
    sae.W_dec.grad = torch.tensor([[3., 4.], [5., 0.]])
    remove_parallel_gradient(sae)
    assert torch.allclose(sae.W_dec.grad, torch.tensor([[0., 4.], [3.2, -2.4]]), atol=1e-6)
    assert torch.equal(sae.W_dec, torch.tensor([[1, 0], [.6, .8]]))


def test_rows_are_scaled_to_norm_one_and_a_zero_row_stays():
    sae = _sae(torch.ones(2, 3), [1, 1, 1], [[3, 4], [0, 0], [0, -1e-3]], [1, 1])
    normalize_decoder(sae)
    assert torch.allclose(sae.W_dec, torch.tensor([[.6, .8], [0, 0], [0, -1]]))
    assert sae.W_enc.eq(1).all() and sae.b_enc.eq(1).all() and sae.b_dec.eq(1).all()


# The geometric median

DIRECTIONS = torch.tensor([[1., 0.], [-.5, .75**.5], [-.5, -.75**.5]])  # 120 degrees apart
MEDIANS = {
    'one point': ([[3., -2.]], [3., -2.]),
    'one number': ([[7.]], [7.]),
    'equal points': ([[.1, .7]]*5, [.1, .7]),
    'the middle of a line': ([[0.], [1.], [2.], [50.], [-9.]], [1.]),
    'the mean is a wrong point': ([[-6.], [0.], [1.], [2.], [3.]], [1.]),
    'the same on a slope': ([[-6., 6.], [0., 0.], [1., -1.], [2., -2.], [3., -3.]], [1., -1.]),
    'a corner of more than 120 degrees': ([[0., 0.], [1., .1], [-1., .1]], [0., 0.]),
    'most points in one place': ([[2., 2.]]*4+[[9., 0.], [0., 5.], [-3., -3.]], [2., 2.]),
    'the mean is a point that the others cannot move': ([[0., 0.], [3., 0.], [-1., 1.], [-2., -1.]], [0., 0.]),
    'a pair around the mean': ([[-1., 0.], [1., 0.]], [0., 0.]),
    'rays at 120 degrees': ((DIRECTIONS*torch.tensor([[1.], [2.], [5.]])+3).tolist(), [3., 3.]),
}

@pytest.mark.parametrize('points,median', MEDIANS.values(), ids=MEDIANS.keys())
def test_geometric_medians_that_are_known(points, median):
    points, median = torch.tensor(points), torch.tensor(median)
    for scale in (1., 1e-6, 1e6):
        got = geometric_median(scale*points)
        assert (got-scale*median).norm() <= 2e-3*scale*max(1., points.std().item() if points.numel() > 1 else 1.)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 4), whole=st.booleans(), seed=st.integers(0, 999))
def test_no_point_has_a_smaller_sum_of_distances(n, d, whole, seed):
    "Against all points, the mean and near ones; whole numbers make points coincide."
    x = _random(n, d, seed=seed)
    x = (x.round() if whole else x).double()
    total = lambda m: (x-m).norm(dim=-1).sum()
    m = geometric_median(x)
    others = [*x, x.mean(0), *(m+.05*_random(20, d, seed=1).double())]
    assert total(m) <= min(map(total, others))*(1+1e-3)+1e-9


def test_weiszfeld_steps_from_the_mean():
    x = torch.tensor([[0.], [1.], [5.]])
    assert geometric_median(x, max_steps=0) == 2 and geometric_median(x, tol=1e3) == 2
    assert torch.isclose(geometric_median(x, max_steps=1), torch.tensor(16/11))
    with pytest.raises(ValueError, match='no point'): geometric_median(torch.zeros(0, 3))


# Weights of others, saved and loaded

def _foreign(norms, d=7, seed=0):
    "A dictionary with decoder rows of the given norms; half of its features fire."
    sae = SAE(SAEConfig(d_in=d, n_feats=len(norms), seed=seed, start='random'))
    with torch.no_grad():
        sae.W_dec *= torch.as_tensor(norms)[:, None]
        for p in (sae.b_enc, sae.b_dec): p.copy_(.5*_random(len(p), seed=seed+1))
    return sae


@settings(max_examples=20, deadline=None)
@given(powers=st.lists(st.floats(-3, 3), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_a_loaded_dictionary_reconstructs_what_the_saved_one_did(powers, seed, tmp_path_factory):
    norms = 10**torch.tensor(powers)
    sae, x = _foreign(norms, seed=seed), _random(30, 7, seed=seed+2)
    again = load_sae(save_sae(sae, tmp_path_factory.mktemp('sae')/'s'), 'cpu')
    f, x_hat = sae.encode(x).detach(), sae(x).detach()
    size = (f@sae.W_dec.abs()+sae.b_dec.abs()).max().item()  # of the terms that float32 adds up
    assert (again(x)-x_hat).abs().max() <= 1e-5*size
    assert ((again.encode(x)-f*norms).abs().amax(0) <= 1e-5*norms).all()
    assert torch.allclose(again.W_dec.norm(dim=-1), torch.ones(len(norms)), atol=1e-6)


def test_a_dictionary_in_half_precision_reconstructs_what_is_in_the_file(tmp_path):
    sae, x = _foreign([.5, 1., 1., 3.]), _random(9, 7)
    again = load_sae(save_sae(sae, tmp_path/'s', half=True), 'cpu')
    sae.half().float()  # what the file holds
    assert torch.allclose(again(x), sae(x), atol=1e-5)


def test_folding_by_hand():
    sae = _sae([[1, 2, 3], [4, 5, 6]], [1, -1, 9], [[0, 2], [-.5, 0], [0, 0]], [7, 8])
    kept = dict(sae.named_parameters())
    fold_decoder_norms(sae)
    assert sae.W_dec[:2].tolist() == [[0, 1], [-1, 0]] and sae.W_dec[2].norm() == 1
    assert sae.W_enc.tolist() == [[2, 1, 0], [8, 2.5, 0]] and sae.b_enc.tolist() == [2, -.5, 0]
    assert sae.b_dec.tolist() == [7, 8] and not sae.encode(_random(50, 2))[:, 2].any()
    assert all(kept[k] is p and p.requires_grad for k,p in sae.named_parameters())


@pytest.mark.parametrize('d', [1, 7])
def test_a_row_of_zeros_contributes_nothing_after_loading(d, tmp_path):
    sae, x = _foreign([1., 0., 2., 0.], d), _random(40, d)
    sae.b_enc.data[1] = 5.
    again = load_sae(save_sae(sae, tmp_path/'s'), 'cpu')
    assert torch.allclose(again(x), sae(x), atol=1e-5) and again.encode(x)[:, [1, 3]].eq(0).all()
    assert torch.allclose(again.W_dec.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize('name,value', product(NAMES, [torch.nan, torch.inf, -torch.inf]))
def test_weights_that_are_not_finite_are_named(name, value, tmp_path):
    sae = _foreign([1., 2.])
    before = {k: p.clone() for k,p in sae.named_parameters()}
    getattr(sae, name).data[-1] = value
    with pytest.raises(ValueError, match=f'got {name} with NaN'): load_sae(save_sae(sae, tmp_path/'s'), 'cpu')
    with pytest.raises(ValueError, match=f'got {name} with NaN'): fold_decoder_norms(sae)
    assert all(torch.equal(p, before[k]) for k,p in sae.named_parameters() if k != name)


def test_rows_too_long_for_their_norm_are_refused():
    with pytest.raises(ValueError, match="W_dec's norms"): fold_decoder_norms(_foreign([1e30, 1.]))


def test_where_a_dictionary_comes_from_stays_with_it(tmp_path):
    sae, other = SAE(SAEConfig(2, 3)), SAE(SAEConfig(2, 3))
    sae.origin['hook'] = 'a.hook'
    assert other.origin == {}  # each has its own
    sae.origin['model'] = 'abc'
    again = load_sae(save_sae(sae, tmp_path/'a'), 'cpu')
    assert again.origin == dict(hook='a.hook', model='abc') and 'versions' in load_artefact(tmp_path/'a').run
    save_sae(again, tmp_path/'b', dict(hook='another', tokenizer='t', steps=3))
    assert load_artefact(tmp_path/'b').run == dict(model='abc', hook='another', tokenizer='t', steps=3)
    assert load_sae(tmp_path/'b', 'cpu').origin == dict(model='abc', hook='another', tokenizer='t')


def test_artefacts_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='A/9'): load_sae('A/9', 'cpu')
    weights = dict(SAE(SAEConfig(2, 3)).named_parameters())
    for spoil in (dict(b_enc=torch.zeros(4)), dict(W_dec=torch.zeros(2, 3))):
        save_artefact(tmp_path/'s', weights | spoil, SAEConfig(2, 3).to_dict())
        with pytest.raises(ValueError, match=rf"lacks or misshapes \['{[*spoil][0]}'\]"): load_sae(tmp_path/'s', 'cpu')
    save_artefact(tmp_path/'s', {k: weights[k] for k in ('W_enc', 'W_dec', 'b_dec')}, SAEConfig(2, 3).to_dict())
    with pytest.raises(ValueError, match=r"\['b_enc'\]"): load_sae(tmp_path/'s', 'cpu')


# Exact gradients

WAYS = {'dense': dense_gradients, 'sparse': sparse_gradients}
TILED = {f'{name}, tiles of {tile}': (lambda s, x, l1, way=way, tile=tile: way(s, x, l1, tile=tile))
         for name,way in WAYS.items() for tile in (1, 3, 512)} | WAYS


@pytest.mark.parametrize('way', TILED.values(), ids=TILED.keys())
def test_gradients_by_hand(way):
    sae, x = _by_hand()
    out = way(sae, x, .5)
    assert [v.item() for v in out.loss] == LOSS_BY_HAND and out.fired.tolist() == [1, 1, 2]
    assert {k: getattr(out, k).tolist() for k in NAMES} == GRADIENTS_BY_HAND
    assert out.W_enc.stride() == sae.W_enc.stride() and out.W_dec.is_contiguous() and out.fired.dtype == torch.long
    assert all(v.shape == () for v in out.loss)


def test_automatic_differentiation_by_hand():
    sae, x = _by_hand()
    loss = sae_loss(x, sae(x), sae.encode(x), .5)
    loss.total.backward()
    assert [v.item() for v in loss] == LOSS_BY_HAND
    assert {k: p.grad.tolist() for k,p in sae.named_parameters()} == GRADIENTS_BY_HAND


def _whole_numbers(d, n, batch, shift, seed=0):
    "Sums of small whole numbers are exact in float32, so any order gives the same bits."
    gen = np.random.default_rng(seed)
    whole = lambda top, *shape: gen.integers(-top, top+1, shape)
    sae = _sae(whole(2, d, n), whole(3, n)+shift, whole(1, n, d), whole(2, d))
    return sae, torch.as_tensor(whole(2, batch, d), dtype=torch.float32)


@pytest.mark.parametrize('d,n,batch,shift', [(5, 33, 8, 0), (3, 32, 8, -5), (6, 31, 8, 4), (4, 70, 16, -9), (2, 1, 4, 0),
                                             (4, 40, 8, -1000), (2, 10, 4, 20), (5, 64, 1, -3), (1, 100, 2, -4)])
@pytest.mark.parametrize('way', TILED.values(), ids=TILED.keys())
def test_gradients_of_whole_numbers_are_exact(way, d, n, batch, shift):
    "Equal to automatic differentiation in float64, to the last bit: at every density, with blocks of 32 full, short and empty."
    sae, x = _whole_numbers(d, n, batch, shift)
    out, exact = way(sae, x, .5), SAE(sae.cfg).double()
    exact.load_state_dict(sae.state_dict())
    f = exact.encode(x.double())
    loss = sae_loss(x.double(), exact.decode(f), f, .5)
    loss.total.backward()
    assert [v.item() for v in out.loss] == [v.item() for v in loss] and torch.equal(out.fired, (f > 0).sum(0))
    for k,p in exact.named_parameters(): assert torch.equal(getattr(out, k).double(), p.grad), k


def test_active_set_by_hand():
    out = active_set(*_by_hand())
    assert out.start.tolist() == [0, 2, 4] and out.index.tolist() == [0, 2, 1, 2] and out.value.tolist() == [2, 1, 2, 3]
    assert out.start.dtype == np.int64 and out.index.dtype == np.int32 and out.value.dtype == np.float32


@pytest.mark.parametrize('tile', [1, 2, 3, 7, 512])
@pytest.mark.parametrize('shift', [0, -8, -1000, 1000])
def test_the_active_set_holds_the_positive_entries(shift, tile):
    sae, x = _whole_numbers(4, 70, 7, shift)
    out, f = active_set(sae, x, tile), sae.encode(x).detach().numpy()
    b, j = np.nonzero(f > 0)
    assert np.array_equal(out.start, np.searchsorted(b, np.arange(8))) and np.array_equal(out.index, j) and np.array_equal(out.value, f[b, j])


def test_vectors_on_which_nothing_fires_pull_on_the_bias_alone():
    "Row 1 fires nothing: both features' gradients are those of row 0 alone, at half the weight."
    sae = _sae([[1, 0], [0, 1]], [0, 0], [[1, 0], [0, 1]], [0, 0])
    x = torch.tensor([[4., 2.], [-6., -2.]])
    for way in WAYS.values():
        out, alone = way(sae, x, 1.), way(sae, x[:1], 1.)
        assert out.fired.tolist() == [1, 1] and out.loss.l0 == 1 and out.loss.mse == 20
        assert all(torch.equal(getattr(out, k), getattr(alone, k)/2) for k in ('W_enc', 'b_enc', 'W_dec'))
        assert out.b_dec.tolist() == [6-.5, 2-.5]


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS.keys())
def test_what_is_not_finite_reaches_the_loss(way, value):
    sae, x = _whole_numbers(4, 40, 8, 0)
    x[3, 1] = value
    assert not way(sae, x, .5).loss.total.isfinite() and not way(sae, x, .5).loss.mse.isfinite()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_are_refused_by_name(dtype):
    sae, x = _by_hand()
    for way in (*WAYS.values(), active_set):
        args = (sae, x.to(dtype)) if way is active_set else (sae, x.to(dtype), .5)
        with pytest.raises(ValueError, match=f'{dtype} on cpu for weights of torch.float32'): way(*args)
    with pytest.raises(ValueError, match=f'{dtype} on cpu; expected float32 on the CPU'): sparse_gradients(sae.to(dtype), x.to(dtype), .5)


def test_the_loss_as_a_function_of_the_weights():
    for way in WAYS.values():
        sae, x = _by_hand()
        x.requires_grad_()
        loss = exact_loss(sae, x, .5, way)
        assert loss == 7.5 and loss.shape == ()
        (-4*loss).backward()
        assert x.grad is None
        for k,p in sae.named_parameters(): assert torch.equal(p.grad, -4*torch.tensor(GRADIENTS_BY_HAND[k])), k


def _with_active(k, n=8):
    "A dictionary of which k features fire on everything."
    return _sae(torch.zeros(1, n), [1.]*k+[-1.]*(n-k), torch.ones(n, 1), [0.])


def test_the_switch_at_its_thresholds():
    calls = []
    def way(sae, x, l1):
        calls.append(int((sae.b_enc > 0).sum()))
        return sparse_gradients(sae, x, l1)
    switch, x = DensitySwitch(low=.25, high=.5, way=way), torch.ones(3, 1)
    active = [4, 2, 1, 3, 3, 4, 3, 2, 1, 8, 0]
    after = [bool(switch(_with_active(k), x, .1)) and switch.sparse for k in active]
    assert after == [False, False, True, True, True, False, False, False, True, False, True]
    assert calls == [3, 3, 4, 8]  # dense at first, then what the batch before suggested


def test_the_switch_remembers_and_gives_dense_where_the_loops_cannot_go():
    calls, x = [], torch.ones(3, 1)
    spy = lambda s, x, l1: calls.append(x.dtype) or sparse_gradients(s, x, l1)
    switch = DensitySwitch(way=spy)
    assert (switch.low, switch.high, switch.sparse, DensitySwitch().way) == (.15, .2, False, sparse_gradients)
    assert switch.state_dict() == dict(sparse=False)
    switch(_with_active(0), x, .1)
    again = DensitySwitch(way=spy)
    again.load_state_dict(json.loads(json.dumps(switch.state_dict())))
    assert again.sparse and not calls
    again(_with_active(0), x, .1)
    again(_with_active(0).double(), x.double(), .1)
    assert calls == [torch.float32]
    for low, high in ((0., 0.), (0., 1.), (1., 1.), (.3, .3)): DensitySwitch(low, high)
    for low, high in ((-.01, .5), (.5, 1.01), (.3, .29)):
        with pytest.raises(ValueError, match=f'low={low}, high={high}'): DensitySwitch(low, high)


# A cache that is not to be had

SPARSE_STEP = '''
import sys, warnings, torch
from monosem.kernels import dense_gradients, sparse_gradients
from monosem.sae import SAE, SAEConfig
if len(sys.argv) > 1:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a full disk
sae, x = SAE(SAEConfig(6, 40)), torch.randn(9, 6)
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    a = sparse_gradients(sae, x, .1)
b = dense_gradients(sae, x, .1)
assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(a[1:], b[1:]))
print(*[str(m.message) for m in w if 'numba cannot use its cache' in str(m.message)])
'''


def _sparse_step(package, *args, **env):
    "The words of the warning, or nothing, from a process of its own."
    code = ['-c', SPARSE_STEP, *args]
    env = {k: v for k,v in os.environ.items() if k != 'NUMBA_CACHE_DIR'} | dict(PYTHONPATH=str(package), OMP_NUM_THREADS='1') | env
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=300, env=env, cwd=package)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    "A copy of the package whose folder holds no cache."
    source = Path(monosem.__file__).parent
    shutil.copytree(source, tmp_path/'p'/'monosem', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    return tmp_path/'p'


def test_no_place_for_the_cache(package, tmp_path):
    "Files stand where the folders of the cache would be."
    for name in ('cache', 'home', 'p/monosem/__pycache__'): (tmp_path/name).write_text('')
    said = _sparse_step(package, NUMBA_CACHE_DIR=str(tmp_path/'cache'), HOME=str(tmp_path/'home'), XDG_CACHE_HOME=str(tmp_path/'home'))
    assert 'no locator' in said and 'NUMBA_CACHE_DIR' in said


def test_a_cache_on_a_full_disk_and_one_that_is_damaged(package, tmp_path):
    cache = dict(NUMBA_CACHE_DIR=str(tmp_path/'cache'))
    assert 'File too large' in _sparse_step(package, 'full', **cache)
    assert _sparse_step(package, **cache) == ''  # there is space again
    files = sorted((tmp_path/'cache').rglob('*.nb?'))
    assert {p.suffix for p in files} == {'.nbi', '.nbc'}
    for p in files: p.write_bytes(b'')
    assert 'EOFError' in _sparse_step(package, **cache)


# Resampling

def _with_moments(sae, value=1.):
    "Adam with all moments at one value."
    opt = torch.optim.Adam(sae.parameters(), fused=True)
    sae(torch.ones(2, sae.cfg.d_in)).sum().backward()
    opt.step()
    for s in opt.state.values():
        for k in ('exp_avg', 'exp_avg_sq'): s[k].fill_(value)
    return opt


def test_a_dead_feature_starts_again_by_hand():
    "Alive encoder norms 3 and 5, a dead one of 100; one input with a direction, at 3 and 4 from the bias."
    sae = _sae([[3, 60, 0], [0, 80, 5]], [.1, .2, .3], [[1, 0], [0, 1], [0, 1]], [1, 1])
    opt = _with_moments(sae)
    with torch.no_grad():  # the step moved them
        for p,v in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), ([[3, 60, 0], [0, 80, 5]], [.1, .2, .3], [[1, 0], [0, 1], [0, 1]], [1, 1])):
            p.copy_(torch.tensor(v))
    x = torch.tensor([[1., 1.], [4., 5.], [1., 1.]])
    assert resample_dead(sae, opt, x, torch.tensor([False, True, False]), make_generator(0), scale=.25) == 1
    close = lambda a, b: torch.allclose(a, torch.tensor(b, dtype=torch.float32), atol=1e-6)
    assert close(sae.W_dec, [[1, 0], [.6, .8], [0, 1]]) and close(sae.W_enc, [[3, .6, 0], [0, .8, 5]])
    assert close(sae.b_enc, [.1, 0, .3]) and close(sae.b_dec, [1, 1])
    for moment in ('exp_avg', 'exp_avg_sq'):
        now = {k: opt.state[p][moment].tolist() for k,p in sae.named_parameters()}
        assert now == dict(W_enc=[[1, 0, 1], [1, 0, 1]], b_enc=[1, 0, 1], W_dec=[[1, 1], [0, 0], [1, 1]], b_dec=[1, 1])
    assert all(s['step'] == 1 for s in opt.state.values())


def test_a_fifth_of_the_alive_norm_and_of_all_norms_if_none_is_alive():
    for dead in ([True, False], [True, True]):
        sae = _sae([[10, 5], [0, 0]], [0, 0], [[1, 0], [0, 1]], [0, 0])
        resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.tensor([[0., 9.]]), torch.tensor(dead), make_generator(0))
        assert torch.allclose(sae.W_enc[:, 0], torch.tensor([0., .2*(7.5 if all(dead) else 5.)]))


def test_the_sparsity_term_counts_in_the_loss():
    "Input 0 has no error and a feature at 6, which costs 2 x 6 = 12; input 1 is off by 2, which costs 4. So 9 of 10 draws are input 0."
    n = 2000
    sae = SAE(SAEConfig(d_in=2, n_feats=n+1, l1=2.))
    with torch.no_grad():
        for p in sae.parameters(): p.zero_()
        sae.W_enc[0, 0] = sae.W_dec[0, 0] = 1.
    resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.tensor([[6., 0.], [0., 2.]]), torch.arange(n+1) > 0, make_generator(1))
    share = (sae.W_dec[1:, 0] > .5).float().mean()
    assert abs(share-.9) < 4*(.9*.1/n)**.5  # four binomial standard deviations


def _axes(n, **kw):
    "A dictionary that reconstructs nothing."
    return _sae(torch.zeros(4, n), [0]*n, torch.full((n, 4), .5), [1, 2, 3, 4], **kw)


def test_inputs_are_drawn_once_as_long_as_they_last():
    fit = torch.eye(4)[:3]+torch.tensor([1., 2., 3., 4.])
    x = torch.cat([fit, torch.tensor([[1., 2., 3., 4.]]).expand(50, 4)])  # the others equal the bias
    for seed in range(20):
        sae = _axes(5)
        opt = torch.optim.Adam(sae.parameters())
        assert resample_dead(sae, opt, x, torch.arange(5) < 3, make_generator(seed)) == 3
        assert torch.allclose(sae.W_dec[:3].sum(0), torch.tensor([1., 1., 1., 0.]))  # each of the three, once
        assert resample_dead(sae, opt, x, torch.arange(5) >= 0, make_generator(seed)) == 5
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(5)) and torch.allclose(sae.W_dec.sum(), torch.tensor(5.))


@pytest.mark.parametrize('bias', [0., 9.])  # without any loss, and with a feature that fires on the decoder's bias
def test_a_pool_without_loss_or_direction_replaces_nothing(bias):
    sae, gen, x = _axes(3), make_generator(5), torch.tensor([[1., 2., 3., 4.]]).expand(9, 4)
    sae.b_enc.data += bias
    before, drawn = [p.clone() for p in sae.parameters()], gen.get_state()
    assert resample_dead(sae, torch.optim.Adam(sae.parameters()), x, torch.tensor([True, False, True]), gen) == 0
    assert all(torch.equal(p, q) for p,q in zip(sae.parameters(), before)) and torch.equal(gen.get_state(), drawn)


@pytest.mark.parametrize('distance,replaced', [(2e-12, 1), (5e-13, 0)])
def test_the_shortest_direction_is_what_still_gives_norm_one(distance, replaced):
    "The squared loss, 1.6e-47, is below what float32 holds."
    sae, gen = _sae([[0], [0]], [0], [[1, 0]], [0, 0]), make_generator(0)
    assert resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.tensor([[0., distance]]), torch.tensor([True]), gen) == replaced
    assert sae.W_dec.tolist() == [[0, 1] if replaced else [1, 0]]


def test_inputs_without_loss_are_not_drawn():
    "Input 0 is reconstructed exactly, at a coefficient of 0; it has a direction and no weight."
    sae = _sae([[1, 0], [0, 0]], [0, -9], [[1, 0], [1, 0]], [0, 0], l1=0.)
    for seed in range(10):
        resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.tensor([[3., 0.], [0., 1.]]), torch.tensor([False, True]), make_generator(seed))
        assert sae.W_dec[1].tolist() == [0, 1]


def test_inputs_that_are_not_finite_are_refused():
    sae = _axes(3)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match='not finite'):
            resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.tensor([[0., 0., 0., value]]), torch.tensor([True, False, True]), make_generator(0))
    with pytest.raises(ValueError, match='no input'): resample_dead(sae, torch.optim.Adam(sae.parameters()), torch.zeros(0, 4), torch.ones(3) > 0, make_generator(0))


def test_schedules_at_their_limits():
    paper = ResampleConfig.paper(seed=3)
    assert (paper.at, paper.window, paper.pool, paper.scale, paper.seed) == ((.025, .05, .075, .1), 102_400_000, 819_200, .2, 3)
    ResampleConfig(at=(), window=1, pool=1), ResampleConfig(pool=2**24)
    for bad in (dict(at=(0., .5)), dict(at=(.5, 1.)), dict(window=0), dict(pool=0), dict(pool=2**24+1)):
        with pytest.raises(ValueError, match=f'{[*bad][0]}='): ResampleConfig(**bad)


def _numbered(sizes):
    "Batches of these sizes in which every vector carries its own number."
    x = _random(sum(sizes), 3)
    x[:, 0] = torch.arange(len(x))
    return x.split(sizes)


@pytest.fixture
def draws(monkeypatch):
    "What each resampling was given; it replaces as many as `draws.says`."
    class Draws(list): says = 0
    out = Draws()
    def spy(sae, opt, x, dead, gen, scale):
        out.append((x.clone(), dead.clone(), scale))
        return out.says
    monkeypatch.setattr(resampling, 'resample_dead', spy)
    return out


@pytest.mark.parametrize('sizes', [[8]*20, [5, 9, 3, 8, 1, 12, 7, 2, 9, 4, 8, 8, 1, 1, 1, 20, 3, 6, 7, 2]])
@pytest.mark.parametrize('at', [(.15, .2, .6, .95), (.6, .3), (.4,), ()])
@pytest.mark.parametrize('pool', [1, 8, 13, 15])
def test_each_pool_holds_the_newest_vectors(draws, sizes, at, pool):
    batches, held = _numbered(sizes), []
    resampler = Resampler(ResampleConfig(at=at, window=1, pool=pool, scale=.3))
    kept = lambda s: held.append((s.step, sum(map(len, resampler.recent)), len(s.x)))
    train_sae(batches, SAEConfig(d_in=3, n_feats=4), callbacks=[resampler, kept])
    steps = sorted(round(20*a) for a in at)
    assert [h['step'] for h in resampler.history] == steps
    for step, (x, _, scale) in zip(steps, draws, strict=True):
        assert torch.equal(x, torch.cat(batches[:step])[-pool:]) and len(x) == pool and scale == .3
    for step, n, batch in held:
        assert n < pool+max(sizes) if step < max(steps, default=0) else n == 0


def test_dead_is_silent_for_the_window_or_longer(draws):
    "And what was replaced counts anew; what was not, does not."
    for says in (2, 0):
        draws.clear()
        draws.says = says
        silence = lambda s: s.step == 5 and s.silent.copy_(torch.tensor([9, 10, 0, 11]))
        after = []
        resampler = Resampler(ResampleConfig(at=(.5,), window=10, pool=4))
        train_sae(_numbered([2]*10), SAEConfig(d_in=3, n_feats=4), callbacks=[silence, resampler, lambda s: s.step == 5 and after.extend([s.silent.tolist(), s.rewarm_from])])
        assert draws[0][1].tolist() == [False, True, False, True]
        assert after == [[9, 0, 0, 0] if says else [9, 10, 0, 11], 5] and resampler.history == [dict(step=5, resampled=says)]


def test_silence_is_counted_in_vectors_since_the_batch_that_fired():
    "Feature 0 never fires, feature 1 on the third batch; batches differ in size."
    sae_off = lambda s: (s.sae.W_enc.data.zero_(), s.sae.b_enc.data.copy_(torch.tensor([-1., 1. if s.step == 2 else -1.])))
    seen = []
    train_sae(_numbered([4, 1, 5, 2, 3]), SAEConfig(d_in=3, n_feats=2), callbacks=[sae_off, lambda s: seen.append(s.silent.tolist())])
    assert [a for a,_ in seen[1:]] == [seen[0][0]+n for n in (1, 6, 8, 11)] and [b for _,b in seen[2:]] == [0, 2, 5]


@pytest.mark.parametrize('at,named', [((.3, .31), '[3, 3]'), ((.04,), '[0]'), ((.5, .96), '[5, 10]')])
def test_shares_that_fall_together_or_on_the_ends_are_refused(at, named):
    batches = _numbered([4]*10)
    with pytest.raises(ValueError) as e: train_sae(batches, SAEConfig(d_in=3, n_feats=4), callbacks=[Resampler(ResampleConfig(at=at, window=5, pool=4))])
    assert named in str(e.value) and 'expected different steps between 1 and the last but one' in str(e.value)


def test_the_first_pool_must_be_there():
    train = lambda pool: train_sae(_numbered([4]*10), SAEConfig(d_in=3, n_feats=4), callbacks=[Resampler(ResampleConfig(at=(.6, .3, .9, .1), window=5, pool=pool))])
    train(4)
    with pytest.raises(ValueError, match='first resampling after 4 vectors, of which 5'): train(5)


def _kill(s):
    "Switch off three features in good time before each resampling."
    if s.step in (1, 11): s.sae.b_enc.data[:3].fill_(-50.)


def _run(resampler): return TrainState(SAEConfig(d_in=6, n_feats=12, l1=.05), SAETrainConfig(lr=1e-2), 30, [_kill, resampler])


@pytest.mark.parametrize('stop', [5, 10, 13, 17, 20, 25])
def test_a_state_loaded_goes_on_as_the_state_saved(stop):
    "Weights, draws and history, to the bit: stopped in a pool, at a resampling, between two and after both."
    batches = _random(30*16, 6).split(16)
    cfg = ResampleConfig(at=(1/3, 2/3), window=100, pool=80)
    whole = _run(Resampler(cfg))
    for x in batches: whole(x)
    first, second = _run(Resampler(cfg)), _run(Resampler(cfg))
    for x in batches[:stop]: first(x)
    tensors, meta = pack_state(first)
    tensors, meta = {k: v.clone() for k,v in tensors.items()}, json.dumps(meta)
    for x in batches[stop:stop+8]: first(x)  # the checkpoint is older than the stop
    unpack_state(second, tensors, json.loads(meta))
    for x in batches[stop:]: second(x)
    resamplers = [s.callbacks[1] for s in (whole, second)]
    assert [h['step'] for h in resamplers[0].history] == [10, 20] and all(h['resampled'] >= 3 for h in resamplers[0].history)
    assert resamplers[0].history == resamplers[1].history and torch.equal(*(r.gen.get_state() for r in resamplers))
    assert all(torch.equal(p, q) for p,q in zip(whole.sae.parameters(), second.sae.parameters()))


def test_a_resamplers_state_is_all_of_it():
    cfg = ResampleConfig(at=(.5, .9), window=5, pool=10)
    a, b = Resampler(cfg), Resampler(cfg)
    torch.rand(7, generator=a.gen)
    a.recent, a.history = list(_numbered([3, 4, 2])), [dict(step=1, resampled=2)]
    state = a.state_dict()
    b.load_state_dict(state)
    assert torch.equal(torch.rand(9, generator=a.gen), torch.rand(9, generator=b.gen))
    assert all(torch.equal(p, q) for p,q in zip(a.recent, b.recent, strict=True)) and b.history == a.history
    a.history.append('later')
    assert len(state['history']) == len(b.history) == 1  # neither follows the other
    empty = Resampler(cfg)
    b.load_state_dict(empty.state_dict())
    assert b.recent == [] and b.history == []
