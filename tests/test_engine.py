"The SAE engine: exact gradients at any density, data-parallel processes, streams that begin anywhere, bad input."
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from monosem.activations import ActivationStore, ActivationStream, StreamConfig, store_activations
from monosem.checkpoints import Checkpoints, differences, load_checkpoint, save_checkpoint
from monosem.tokens import TokenWindows
from monosem.active import PRODUCTS, ActiveSet, Screen, _Search, able, active_set, encoder_of, fastest, screen_for
from monosem.kernels import DensitySwitch, dense_gradients, exact_loss, plain_update, sparse_gradients, update
from monosem.resampling import ResampleConfig, Resampler
from monosem.sae import SAE, SAEConfig, sae_loss
from monosem.planted import planted
from monosem.training import SAETrainConfig, step, train_sae, train_saes


def _random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _example(d, n, b, shift, seed, dtype=torch.float32):
    sae = SAE(SAEConfig(d_in=d, n_feats=n, seed=seed, start='random'))
    with torch.no_grad():
        sae.b_enc.copy_(shift+.1*_random(n, seed=seed+1))
        sae.b_dec.copy_(.3*_random(d, seed=seed+2))
    return sae.to(dtype), _random(b, d, seed=seed+3).to(dtype)


def _autograd(sae, x, l1, active):
    "float64 gradients of the formula as the paper writes it, on a given active set."
    f = ((x-sae.b_dec)@sae.W_enc+sae.b_enc)*active
    loss = ((x-f@sae.W_dec-sae.b_dec)**2).sum(-1).mean()+l1*f.sum(-1).mean()
    return dict(zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters()))))


@settings(max_examples=150, deadline=None)
@given(d=st.integers(1, 70), n=st.integers(1, 200), b=st.integers(1, 40), shift=st.sampled_from([-50., -2., -.7, 0., .7, 3.]), l1=st.floats(0, 3),
       tile=st.sampled_from([1, 7, 512]), seed=st.integers(0, 9))
def test_gradients_are_exact_at_any_density(d, n, b, shift, l1, tile, seed):
    "Both ways against float64 autograd: to 1e-5 of each tensor's norm, on the active set that float32 sees; where large terms cancel in the residual, float32 loses as many digits."
    sae, x = _example(d, n, b, shift, seed)
    f = sae.encode(x).detach()
    active = f > 0
    cancelled = float(((f@sae.W_dec.abs()).norm()/(x-sae.decode(f)).norm()).detach())
    want = _autograd(_example(d, n, b, shift, seed, torch.float64)[0], x.double(), l1, active)
    for out in (dense_gradients(sae, x, l1, tile=tile), sparse_gradients(sae, x, l1, tile=tile)):
        for k, w in want.items(): assert (getattr(out, k)-w).norm() <= (1e-5+1e-7*cancelled)*w.norm()+1e-6, k
        near = (sae.encode(x)-1e-5).abs() < 2e-5  # a feature at the very edge may fall on either side
        if not near[active].any(): assert torch.equal(out.fired, active.sum(0))
        assert abs(out.loss.l0*b-out.fired.sum()) < .01*max(1, b)


def test_the_active_set_is_that_of_the_encoder():
    sae, x = _example(20, 333, 17, -.5, 0)
    start, index, value = active_set(sae, x, tile=5)
    f = torch.zeros(17, 333)
    for b in range(17): f[b, index[start[b]:start[b+1]]] = torch.from_numpy(value[start[b]:start[b+1]])
    assert torch.allclose(f, sae.encode(x), atol=1e-5) and all((np.diff(index[start[b]:start[b+1]]) > 0).all() for b in range(17))


WAYS_TO_SEARCH = [Screen(p) for p in able()]


def _bits(found): return [a.tobytes() for a in found]


def _searched(sae, x, screen, tile=512):
    "The active set, by that product and no other."
    search = _Search(encoder_of(sae), screen, tile)
    if screen.product != 'float32': search.exact = None
    of_vector, index, value = map(np.concatenate, zip(*(search(rows.numpy()) for rows in x.split(tile))))
    return ActiveSet(np.concatenate([[0], of_vector.cumsum()]), index, value)


@settings(max_examples=80, deadline=None)
@given(d=st.integers(1, 90), n=st.integers(1, 150), b=st.integers(1, 40), log_x=st.floats(-25, 15), log_w=st.floats(-10, 10), shift=st.sampled_from([-1e3, -3., -.5, 0., 1.]),
       signed=st.booleans(), tile=st.sampled_from([1, 7, 512]), seed=st.integers(0, 99))
def test_no_way_of_searching_misses_an_entry_and_all_have_the_same_bits(d, n, b, log_x, log_w, shift, signed, tile, seed):
    "Over scales and densities, with empty vectors, dead features, and biases that put pre-activations next to zero."
    gen = np.random.default_rng(seed)
    sae, x = _example(d, n, b, 0., seed)
    with torch.no_grad():
        x = (x if signed else x.relu())*10**log_x
        x[gen.random(b) < .2] = 0.
        sae.W_enc *= 10**log_w
        sae.W_enc[:, gen.random(n) < .1] = 0.
        size = float(x.norm(dim=1).mean()*sae.W_enc.norm(dim=0).mean())
        sae.b_dec.zero_()
        sae.b_enc.copy_(torch.from_numpy(gen.standard_normal(n))*.1*size+shift*size)
        edge = gen.random(n) < .5  # zero on one of the vectors, up to what float32 can tell
        at = (x.double()@sae.W_enc.double())[gen.integers(0, b, n), np.arange(n)]
        sae.b_enc[edge] = (-at*(1+gen.standard_normal(n)*3e-7))[edge].float()
        pre = x.double()@sae.W_enc.double()+sae.b_enc.double()
        rounding = (d+64)*2.**-22*(x.double().norm(dim=1)[:, None]*sae.W_enc.double().norm(dim=0)+sae.b_enc.double().abs())+1e-37
    found = [_searched(sae, x, screen, tile) for screen in WAYS_TO_SEARCH]
    assert _bits(active_set(sae, x, tile)) == _bits(found[0])
    kept = found[0].matrix(n).toarray() > 0
    assert kept[(pre > rounding).numpy()].all() and not kept[(pre < -rounding).numpy()].any()
    assert all(_bits(f) == _bits(found[0]) for f in found[1:])
    assert all((np.diff(found[0].index[s:e]) > 0).all() for s, e in zip(found[0].start, found[0].start[1:]))


@pytest.mark.parametrize('d', [3, 64, 512])
@pytest.mark.parametrize('number', [1+2**-8, 1-2**-9, 1.5+2**-8, 127.5, 63.5])
@pytest.mark.parametrize('signs', [1, -1])
def test_the_bound_holds_where_every_error_has_the_same_sign(d, number, signs):
    "Numbers half way between two that a product knows; the bias leaves the sum a little above zero."
    sae = SAE(SAEConfig(d, 4)).requires_grad_(False)
    x = torch.full((2, d), float(number))
    x[1, ::2], x[:, 0] = signs*number, 127.  # 127 sets the step of eight bits
    sae.W_enc.copy_(x[1][:, None].expand(d, 4))
    pre = (x.double()@sae.W_enc.double()).numpy()
    sae.b_dec.zero_()
    sae.b_enc.copy_(torch.from_numpy(-pre[1]*(1-2.**-16)))
    kept = [_searched(sae, x, s).matrix(4).toarray()[1] for s in WAYS_TO_SEARCH]
    assert all((k > 0).all() and np.array_equal(k, kept[0]) for k in kept)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e-42, 2e-37, 3e38])
@pytest.mark.parametrize('where', ['x', 'W_enc', 'b_enc'])
def test_strange_numbers_are_found_alike_in_every_way(where, value):
    sae, x = _example(20, 60, 9, -.5, 0)
    with torch.no_grad():
        if where == 'x': x[3] = value
        elif where == 'W_enc': sae.W_enc[:, 7] = value
        else: sae.b_enc[7] = value
    found = [_searched(sae, x, s) for s in WAYS_TO_SEARCH]
    assert all(_bits(f) == _bits(found[0]) for f in found[1:])
    assert not np.isnan(found[0].value).any() and (found[0].value > 0).all()


def test_an_active_set_does_not_depend_on_the_number_of_threads_or_the_batch():
    sae, x = _example(64, 500, 700, -1., 0)
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [active_set(sae, x, screen=s) for s in WAYS_TO_SEARCH]
        torch.set_num_threads(2)
        two = [active_set(sae, x, screen=s) for s in WAYS_TO_SEARCH]
    finally: torch.set_num_threads(n)
    alone = active_set(sae, x[123:124])
    assert all(_bits(a) == _bits(one[0]) for a in one+two)
    s, e = one[0].start[123:125]
    assert alone.value.tobytes() == one[0].value[s:e].tobytes()


@pytest.mark.parametrize('n', [1, 7, 8, 13, 4097])
def test_where_every_feature_fires_all_are_kept_whatever_their_number(n):
    sae = SAE(SAEConfig(16, n)).requires_grad_(False)
    sae.b_enc.fill_(100.)
    found = active_set(sae, torch.randn(20, 16))
    assert (np.diff(found.start) == n).all() and (found.index.reshape(20, n) == np.arange(n)).all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_number_types_are_searched_plainly(dtype):
    sae, x = _example(12, 40, 17, -.3, 0, dtype)
    found, f = active_set(sae, x, 5), sae.encode(x).detach()
    assert np.allclose(found.matrix(40).toarray(), f.to(torch.promote_types(dtype, torch.float32)).numpy(), atol=.02 if dtype == torch.bfloat16 else 1e-12)
    assert np.array_equal(found.row, np.repeat(np.arange(17), np.diff(found.start))) and (dtype == torch.bfloat16 or np.array_equal(found.row, (f > 0).nonzero()[:, 0].numpy()))


def test_a_search_gives_up_a_product_that_finds_too_much():
    "With half of all features near zero, tiles after the first go the plain way."
    sae, x = _example(64, 400, 600, 0., 0)
    counts = {}
    for limit in (0., np.inf):
        search = _Search(encoder_of(sae), Screen('bfloat16', limit), 100)
        for rows in x.split(100): search(rows.numpy())
        counts[limit] = search.n_candidates
    plain = _Search(encoder_of(sae), Screen(), 100)
    for rows in x.split(100): plain(rows.numpy())
    assert plain.n_candidates < counts[0.] < counts[np.inf] and plain.n_active == search.n_active


def test_a_slow_product_is_not_chosen_and_a_forced_one_is_taken(monkeypatch):
    class Slow(PRODUCTS['bfloat16']):
        def __call__(self, x):
            time.sleep(.02)
            return super().__call__(x)
    monkeypatch.setattr('monosem.active.able', lambda: ('float32', 'bfloat16'))
    monkeypatch.setitem(PRODUCTS, 'bfloat16', Slow)
    fastest.cache_clear()
    try: assert fastest(30, 50, 1) == Screen()
    finally: fastest.cache_clear()
    monkeypatch.setenv('MONOSEM_SCREEN', 'bfloat16')
    assert screen_for(30, 50) == Screen('bfloat16')
    monkeypatch.setenv('MONOSEM_SCREEN', 'int8')
    with pytest.raises(RuntimeError, match='int8.*no such exact product.*bfloat16.*float32'): screen_for(30, 50)
    monkeypatch.setenv('MONOSEM_SCREEN', 'int4')
    with pytest.raises(ValueError, match="MONOSEM_SCREEN='int4'.*int8"): screen_for(30, 50)
    monkeypatch.setenv('MONOSEM_SCREEN', '')
    assert screen_for(30, 50) == screen_for(512, 4096, 511) == Screen()


def _moved(way, clip, opt_class=torch.optim.Adam, relayout=False, n_steps=200, **how):
    "A dictionary after steps on batches of its own gradients' making; half of its features never fire."
    sae, x = _example(24, 60, 50, -.3, 1)
    with torch.no_grad(): sae.b_enc[30:] = -100.
    if relayout: sae.W_enc.data = sae.W_enc.data.contiguous()
    guide, opt = _example(24, 60, 50, -.3, 1)[0], opt_class(sae.parameters(), lr=1e-2, **how)
    with torch.no_grad(): guide.b_enc[30:] = -100.
    for i in range(n_steps): way(sae, opt, sparse_gradients(guide, _random(50, 24, seed=i), .3), clip)
    return sae


@pytest.mark.parametrize('clip', [0., .2, 1e6])
def test_the_fused_update_is_torchs_to_a_millionth(clip):
    for p, q in zip(_moved(update, clip).parameters(), _moved(plain_update, clip).parameters()): assert (p-q).norm() <= 1e-6*q.norm()


@pytest.mark.parametrize('how', [dict(opt_class=torch.optim.SGD), dict(weight_decay=.1), dict(amsgrad=True), dict(relayout=True), dict(maximize=True)])
def test_other_optimisers_and_layouts_go_the_plain_way(how):
    for p, q in zip(_moved(update, .2, n_steps=5, **how).parameters(), _moved(plain_update, .2, n_steps=5, **how).parameters()): assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize('watch', ['register_step_pre_hook', 'register_step_post_hook', 'scheduler'])
def test_who_listens_to_an_optimisers_steps_hears_all_of_them(watch):
    sae, x = _example(24, 60, 50, -.3, 1)
    opt, heard = torch.optim.Adam(sae.parameters(), lr=1e-2), []
    if watch == 'scheduler':
        torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1.)
        inner = opt.step
        opt.step = lambda: heard.append(1) or inner()
    else: getattr(opt, watch)(lambda *_: heard.append(1))
    for _ in range(3): update(sae, opt, sparse_gradients(sae, x, .3))
    assert len(heard) == 3


def test_an_update_keeps_the_decoders_rows_at_norm_one():
    assert torch.allclose(_moved(update, .2).W_dec.norm(dim=1), torch.ones(60), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(b=st.integers(1, 700), n=st.integers(1, 60), bytes_=st.sampled_from([1, 300, 5000, 2**20]), seed=st.integers(0, 9))
def test_the_tile_of_the_sums_changes_rounding_only(b, n, bytes_, seed):
    sae, x = _example(9, n, b, -.2, seed)
    want = sparse_gradients(sae, x, .3)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('monosem.kernels._weight_sums.__defaults__', (bytes_,))
        got = sparse_gradients(sae, x, .3)
    assert torch.equal(got.fired, want.fired)
    for a, c in zip(got[2:], want[2:]): assert (a-c).norm() <= 2e-6*c.norm()+1e-7


def test_one_step_is_the_same_in_both_ways_and_by_autograd():
    results = []
    for way in (dense_gradients, sparse_gradients, None):
        sae, x = _example(24, 60, 50, -.3, 1)
        opt = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
        if way: step(sae, opt, x, .3, way)
        else:
            from monosem.sae import normalize_decoder, remove_parallel_gradient
            f = sae.encode(x)
            sae_loss(x, sae.decode(f), f, .3).total.backward()
            remove_parallel_gradient(sae); opt.step(); normalize_decoder(sae)
        results.append([p.detach().clone() for p in sae.parameters()])
    for other in results[:2]:  # Adam's first step is lr times the sign of the gradient: entries whose gradient is rounding noise may differ
        for a, b in zip(other, results[2]): assert ((a-b).abs() > 1e-4).float().mean() < .01


def test_clipping_is_that_of_torch_and_a_short_gradient_stays():
    from monosem.sae import normalize_decoder, remove_parallel_gradient
    def moved(clip, ours):
        sae, x = _example(24, 60, 50, -.3, 1)
        opt = torch.optim.SGD(sae.parameters(), lr=1e-2)
        if ours: step(sae, opt, x, .3, dense_gradients, clip)
        else:
            f = sae.encode(x)
            sae_loss(x, sae.decode(f), f, .3).total.backward()
            remove_parallel_gradient(sae)
            torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
            opt.step(); normalize_decoder(sae)
        return torch.cat([p.detach().flatten() for p in sae.parameters()])
    assert torch.allclose(moved(.1, True), moved(.1, False), atol=1e-6)
    assert torch.equal(moved(1e6, True), moved(0., True)) and not torch.allclose(moved(.1, True), moved(0., True), atol=1e-4)


def test_the_loops_leave_the_number_of_threads_alone():
    code = "import torch; from monosem.kernels import sparse_gradients; from monosem.sae import SAE, SAEConfig\ntorch.set_num_threads(1); sparse_gradients(SAE(SAEConfig(4, 8)), torch.randn(3, 4), .1); print(torch.get_num_threads())"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=200)
    assert got.stdout.strip() == '1', got.stderr[-500:]


def test_the_transposed_start_is_a_tenth_of_the_decoder():
    sae = SAE(SAEConfig(8, 20, start='transposed'))
    assert torch.equal(sae.W_enc, .1*sae.W_dec.T) and torch.equal(sae.W_dec, SAE(SAEConfig(8, 20)).W_dec) and sae.W_enc.T.is_contiguous()
    with pytest.raises(ValueError, match="start='tied'"): SAEConfig(8, 20, start='tied')
    with pytest.raises(ValueError, match='clip=-1'): SAETrainConfig(clip=-1.)


def test_a_checkpointed_layout_or_a_foreign_one_trains_alike():
    "Weights that are laid out row by row get the same step."
    def run(relayout):
        sae, x = _example(12, 40, 64, 0., 2)
        if relayout: sae.W_enc.data = sae.W_enc.data.contiguous()
        opt = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
        for way in (dense_gradients, sparse_gradients): step(sae, opt, x, .1, way)
        return sae
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run(False).parameters(), run(True).parameters()))


def test_exact_loss_is_for_loops_of_ones_own():
    sae, x = _example(10, 30, 20, -.2, 3)
    for way in (dense_gradients, sparse_gradients, DensitySwitch()):
        sae.zero_grad()
        (exact_loss(sae, x, .2, way)+sae.b_enc.square().sum()).backward()
        want = _autograd(sae, x, .2, sae.encode(x) > 0)
        assert torch.allclose(sae.b_enc.grad, want['b_enc']+2*sae.b_enc, atol=1e-5) and torch.allclose(sae.W_enc.grad, want['W_enc'], atol=1e-5)


def _windows(n=100, pos=32, seed=0): return TokenWindows(np.random.default_rng(seed).integers(0, 500, (n, pos)).astype(np.uint16), np.zeros((n, pos), np.int32), [], {})


def _stream(**kw): return ActivationStream(lambda t: torch.stack([t.float(), t.float()**.5], -1), _windows(), StreamConfig(**dict(dict(batch=20, block=300, per_window=10) | kw)))


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 60), block=st.integers(60, 1200), passes=st.integers(1, 3), share=st.floats(0, 1))
def test_a_stream_goes_on_from_anywhere(batch, block, passes, share):
    s = _stream(batch=batch, block=block, passes=passes)
    whole, start = list(s), int(share*len(s))
    assert len(whole) == len(s)
    rest = list(s.batches(start))
    assert len(rest) == len(s)-start and all(torch.equal(a, b) for a, b in zip(rest, whole[start:]))


def test_passes_differ_in_order_and_a_store_in_nothing_else(tmp_path):
    s = _stream()
    store = store_activations(s, tmp_path/'s', half=False)
    twice = ActivationStore(tmp_path/'s', 20, passes=2)
    rows = lambda bs: sorted(map(tuple, torch.cat(bs).tolist()))
    a, b = list(twice)[:len(s)], list(twice)[len(s):]
    assert rows(a) == rows(b) == rows(list(s)) == rows(list(store)) and not torch.equal(torch.cat(a), torch.cat(b))
    with pytest.raises(ValueError, match='other activations.*per_window'): store_activations(_stream(per_window=9), tmp_path/'s', half=False)


def test_half_precision_refuses_what_it_cannot_hold(tmp_path):
    huge = ActivationStream(lambda t: torch.full((*t.shape, 2), 1e5), _windows(), StreamConfig(batch=20, block=300, per_window=10))
    with pytest.raises(ValueError, match='half=False'): store_activations(huge, tmp_path/'h')
    assert len(store_activations(huge, tmp_path/'f', half=False)) > 0


def test_several_dictionaries_are_as_alone():
    _, x = planted(20, 10, 12_000)
    resample = ResampleConfig(at=(.3, .6), window=500, pool=512)
    cfgs = [SAEConfig(d_in=10, n_feats=n, l1=.1, seed=n) for n in (15, 30)]
    both = train_saes(x.split(100), cfgs, SAETrainConfig(lr=1e-2, rewarm=.05), lambda: [Resampler(resample)])
    for c, t in zip(cfgs, both):
        alone = train_sae(x.split(100), c, SAETrainConfig(lr=1e-2, rewarm=.05), [Resampler(resample)])
        assert all(torch.equal(p, q) for p, q in zip(alone.sae.parameters(), t.sae.parameters())) and alone.log.equals(t.log)


def test_the_rate_rises_again_after_a_resampling():
    _, x = planted(20, 10, 10_000)
    rates = []
    train_sae(x.split(100), SAEConfig(d_in=10, n_feats=15, l1=.1), SAETrainConfig(lr=1e-2, warmup=0., decay=0., rewarm=.1), [Resampler(ResampleConfig(at=(.5,), window=500, pool=512)), lambda s: rates.append(s.opt.param_groups[0]['lr'])])
    assert rates[:50] == [1e-2]*50 and np.allclose(rates[50:61], [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3, 8e-3, 9e-3, 1e-2, 1e-2])


PARALLEL = '''
import sys, torch
from safetensors.torch import save_file
from monosem.activations import ActivationStream, StreamConfig
from monosem.checkpoints import Checkpoints
from monosem.tokens import TokenWindows
from monosem.parallel import join_processes, process_number, share_harvest
from monosem.resampling import ResampleConfig, Resampler
from monosem.sae import SAEConfig
from monosem.training import SAETrainConfig, train_sae
import numpy as np
out, what = sys.argv[1:]
join_processes()
gen = np.random.default_rng(process_number() if what == 'data' else 0)
table = torch.from_numpy(np.random.default_rng(1).standard_normal((500, 48)).astype('float32')).relu()
windows = TokenWindows(gen.integers(0, 500, (801, 32)).astype(np.uint16), np.zeros((801, 32), np.int32), [], {})
stream = ActivationStream(share_harvest(lambda t: table[t]), windows, StreamConfig(batch=127, block=4096, per_window=16), harvest_batch=7)
cfg = SAEConfig(d_in=48, n_feats=96, l1=1., seed=process_number() if what == 'seed' else 0)
resampler = Resampler(ResampleConfig(at=(.5,), window=300, pool=1024))
done = train_sae(stream, cfg, SAETrainConfig(lr=2e-3), [resampler, lambda s: s.step == 1 and s.sae.b_enc.data[:20].fill_(-50.)], checkpoints=Checkpoints(out+'-checkpoints', every_s=None, every_steps=30))
if process_number() == 0: save_file({k: p.contiguous() for k,p in done.sae.named_parameters()} | dict(resampled=torch.tensor([h['resampled'] for h in resampler.history]), dead=torch.tensor(done.log.dead.to_list())), out)
'''


def _run(tmp_path, n, what='weights', out=None):
    (tmp_path/'p.py').write_text(PARALLEL)
    torchrun = ['-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0'] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, tmp_path/'p.py', tmp_path/(out or f'{n}.safetensors'), what], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1'))


def test_two_processes_are_as_one(tmp_path):
    "100 steps of one global batch, harvested, trained and resampled by one process and by two; batches of 127 do not divide evenly."
    for n in (1, 2): assert (r := _run(tmp_path, n)).returncode == 0, r.stderr
    one, two = (load_file(tmp_path/f'{n}.safetensors') for n in (1, 2))
    assert torch.equal(one['resampled'], two['resampled']) and one['resampled'].sum() > 0 and torch.equal(one['dead'], two['dead'])
    for k in ('W_enc', 'b_enc', 'W_dec', 'b_dec'): assert (one[k]-two[k]).norm() <= 1e-5*one[k].norm(), k
    last = load_checkpoint(tmp_path/'2.safetensors-checkpoints')
    assert last.step == 100  # written by process 0
    shutil.rmtree(last.path)
    assert load_checkpoint(tmp_path/'2.safetensors-checkpoints').step == 90
    r = _run(tmp_path, 1, out='2.safetensors')  # what two began, one finishes: the number of processes is no setting
    assert r.returncode == 0 and (load_file(tmp_path/'2.safetensors')['W_dec']-one['W_dec']).norm() <= 1e-5*one['W_dec'].norm()


@pytest.mark.parametrize('what,named', [('seed', 'dictionaries[0].seed: 1, not 0'), ('data', 'data.windows')])
def test_processes_that_differ_are_stopped(tmp_path, what, named):
    r = _run(tmp_path, 2, what)
    assert r.returncode != 0 and 'different settings in different processes' in r.stderr and named in r.stderr and not (tmp_path/'2.safetensors').exists()


@pytest.mark.parametrize('make,what', [
    (lambda: sparse_gradients(*_example(4, 8, 3, 0., 0, torch.float64), .1), 'float64'),
    (lambda: dense_gradients(_example(4, 8, 3, 0., 0)[0], torch.zeros(3, 4, dtype=torch.half), .1), 'float16'),
    (lambda: sparse_gradients(_example(4, 8, 3, 0., 0)[0], torch.zeros(3, 5), .1), '(3, 5)'),
    (lambda: dense_gradients(_example(4, 8, 3, 0., 0)[0], torch.zeros(0, 4), .1), '(0, 4)'),
    (lambda: dense_gradients(_example(4, 8, 3, 0., 0)[0], torch.zeros(3, 4, device='meta'), .1), 'meta'),
    (lambda: DensitySwitch(.5, .1), 'low=0.5'),
    (lambda: train_sae(iter([torch.zeros(3, 4)]), SAEConfig(4, 8)), 'without a length'),
    (lambda: train_sae([], SAEConfig(4, 8)), 'without batches'),
    (lambda: _stream(batch=1200, block=1200), 'batches of 1,200'),
    (lambda: train_sae(_random(1000, 4).split(100), SAEConfig(4, 8), callbacks=[Resampler(ResampleConfig(at=(.1,), pool=500))]), 'first resampling after 100 vectors'),
    (lambda: Checkpoints('x', every_s=0.), 'every_s=0.0'), (lambda: save_checkpoint('x', 1, {}, {}, keep=0), 'keep=0')])
def test_bad_input_names_what_was_given(make, what):
    with pytest.raises(ValueError) as e: make()
    assert what in str(e.value) and 'expected' in str(e.value)


def test_noncontiguous_batches_are_fine():
    sae, x = _example(6, 12, 10, 0., 0)
    odd = x.T.contiguous().T
    assert not odd.is_contiguous() and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(sparse_gradients(sae, odd, .1)[2:], sparse_gradients(sae, x, .1)[2:]))


def test_differences_name_the_place():
    assert differences({'a': {'b': [1, 2]}}, {'a': {'b': [1, 3]}}) == ['a.b[1]: 2, not 3'] and differences({'a': 1}, {}) == ['a: 1, not None']
