"Vectors of every origin: each is used once a pass, in an order that a resumed run finds again, or refused."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, TensorDataset

from monosem.activations import (ActivationStore, ActivationStream, ArrayStream, GivenBatches,
                                 StreamConfig, as_stream, neighbour_excess, store_activations)
from monosem.checkpoints import Checkpoints, load_checkpoint
from monosem.tokens import windows_from_ids
from monosem.features import vector_stats
from monosem.kernels import DensitySwitch, dense_gradients
from monosem.core import ramp
from monosem.planted import planted
from monosem.resampling import ResampleConfig, Resampler
from monosem.sae import SAE, SAEConfig
from monosem.training import (SAETrainConfig, TrainState, pack_state, step, train_sae,
                              train_saes, unpack_state)

SHAPE = SAEConfig(6, 10, l1=.1)


def _x(n=400, d=6, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _same(a, b): return all(torch.equal(p, q) for p,q in zip(a.sae.parameters(), b.sae.parameters()))


def _windows(n=50, pos=16, seed=0):
    return windows_from_ids(np.arange(n*pos).reshape(n, pos))


def _identity(tokens): return tokens[..., None].float()


def _stream(acts=_identity, **kw):
    return ActivationStream(acts, _windows(), StreamConfig(**dict(batch=20, block=200, per_window=10) | kw))


# own arrays

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 20), passes=st.integers(1, 3), seed=st.integers(0, 3))
def test_an_array_is_used_once_a_pass_in_a_new_order(n, batch, passes, seed):
    if n < batch: return
    s = ArrayStream(torch.arange(float(n))[:, None], batch, passes, seed)
    got, per = torch.cat(list(s)).flatten(), n//batch*batch
    assert len(s) == passes*(n//batch) and len(got) == s.n_vectors == passes*per
    rounds = got.view(passes, per)
    assert all(len(r.unique()) == per for r in rounds)
    if passes > 1 and per > 10: assert not torch.equal(rounds[0], rounds[1])
    assert torch.equal(torch.cat(list(ArrayStream(torch.arange(float(n))[:, None], batch, passes, seed))).flatten(), got)


@pytest.mark.parametrize('kind', [np.float32, np.float64, np.float16, np.int32])
def test_arrays_of_numpy_are_those_of_torch(kind):
    x = (100*_x()).numpy().astype(kind)
    a, b = (train_sae(v, SHAPE) for v in (ArrayStream(x, 50), ArrayStream(torch.from_numpy(x).float(), 50)))
    assert _same(a, b) and list(ArrayStream(x, 50))[0].dtype == torch.float32


def test_an_array_alone_is_a_stream_and_so_are_lists_and_loaders():
    x = _x(4096)
    whole = train_sae(x, SHAPE)
    assert whole.log.vectors.iloc[-1] == 4096 and _same(whole, train_sae(x.numpy(), SHAPE))
    lists = [train_sae(b, SHAPE) for b in (x.split(64), [v.numpy() for v in x.split(64)], [[v] for v in x.split(64)],
                                           [v.double() for v in x.split(64)], DataLoader(TensorDataset(x), 64))]
    assert all(_same(lists[0], other) for other in lists)


def test_bfloat16_batches_are_trained_on_as_float32():
    x = _x().bfloat16()
    assert _same(train_sae(x.split(50), SHAPE), train_sae(x.float().split(50), SHAPE))


@pytest.mark.parametrize('bad,what', [
    (torch.zeros(3), r'shape \(3,\)'), (torch.zeros(0, 3), r'\(0, 3\)'), (np.zeros((2, 2, 2)), r'\(2, 2, 2\)'), (torch.zeros(4, 2, dtype=torch.cfloat), 'complex'),
    (iter([torch.zeros(3, 4)]), 'without a length'), ([], 'without batches'), ([torch.zeros(4, 6), torch.zeros(0, 6)], 'batch 1 of shape'),
    ([torch.zeros(4, 6), torch.zeros(6)], 'batch 1 of shape'), ([torch.zeros(4, 6), 'text'], 'batch 1 a str'), ([[torch.zeros(4, 6)]*2], 'batch 0 a list')])
def test_what_is_no_batch_of_vectors_is_refused_before_training(bad, what):
    steps = []
    with pytest.raises(ValueError, match=what): train_sae(bad, SHAPE, callbacks=[lambda s: steps.append(s.step)])
    assert not steps


def test_statistics_of_vectors_without_a_model():
    sae, x = SAE(SHAPE), _x()
    with torch.no_grad(): f = sae.encode(x)
    for source in (x, x.numpy(), x.split(70), DataLoader(TensorDataset(x), 33)):
        s = vector_stats(sae, source, k=5)
        assert s.n_tokens == 400 and np.allclose(s.freq, (f > 0).float().mean(0)) and np.allclose(s.max_act, f.amax(0))
        top = f.topk(5, dim=0)
        assert np.allclose(s.top_act, top.values.T) and (s.top == top.indices.T.numpy()).all()
        assert np.allclose(s.mean_act, f.sum(0)/(f > 0).sum(0).clamp(min=1))


def test_statistics_with_a_dictionary_in_float64():
    sae, x = SAE(SHAPE).double(), _x()
    with torch.no_grad(): f = sae.encode(x.double())
    s, top = vector_stats(sae, x, k=2), f.topk(2, dim=0)
    assert np.allclose(s.top_act, top.values.T) and (s.top == top.indices.T.numpy()).all()
    assert np.allclose(s.freq, (f > 0).double().mean(0)) and np.allclose(s.mean_act, f.sum(0)/(f > 0).sum(0).clamp(min=1))


def test_a_feature_that_fires_on_few_vectors_has_few_examples():
    sae = SAE(SAEConfig(2, 3, start='random'))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1., 0., 1.], [0., 0., 0.]]))
        sae.b_enc.copy_(torch.tensor([-1.5, -1., 0.]))
    s = vector_stats(sae, torch.tensor([[1., 0.], [3., 0.], [2., 0.]]), k=3)
    assert s.top.tolist() == [[1, 2, -1], [-1, -1, -1], [1, 2, 0]] and s.top_act[0].tolist() == [1.5, .5, 0.]
    assert s.freq.tolist() == pytest.approx([2/3, 0, 1]) and s.mean_act.tolist() == pytest.approx([1., 0., 2.])


def test_rows_are_named_for_vectors_in_their_order_only():
    sae, x = SAE(SHAPE), _x()
    assert np.array_equal(vector_stats(sae, ArrayStream(x, 50)).top, vector_stats(sae, x).top)
    for mixed in (DataLoader(TensorDataset(x), 50, shuffle=True), _stream(lambda t: _identity(t).expand(-1, -1, 6))):
        with pytest.raises(ValueError, match='in their order'): vector_stats(sae, mixed)
    with pytest.raises(ValueError, match='NaN'): vector_stats(sae, torch.full((5, 6), float('nan')))


def test_a_source_longer_than_it_says_is_cut_to_its_length():
    class Long:
        def __len__(self): return 3
        def __iter__(self): return iter(_x().split(40))
    rates = []
    with pytest.warns(UserWarning, match='more than 3'): train_sae(Long(), SHAPE, callbacks=[lambda s: rates.append(s.opt.param_groups[0]['lr'])])
    assert len(rates) == 3 and min(rates) > 0


def test_an_array_seen_backwards_is_an_array():
    x = _x().numpy()
    assert np.array_equal(ArrayStream(x[::-1], 50).x, x[::-1].copy())


# order and identity of resumed runs

def _broken(folder, batches, at=5, **kw):
    "A run that stops after `at` steps, with a checkpoint of each."
    def stop(state):
        if state.step == at+1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train_sae(batches, SHAPE, callbacks=[stop], checkpoints=Checkpoints(folder, every_steps=1), **kw)


class Go:
    "Stands for the callback of `_broken` in the run that goes on."
    def __call__(self, state): pass


def _goes_on(folder, batches, **kw):
    def stop(state): pass
    return train_sae(batches, SHAPE, callbacks=[stop], checkpoints=Checkpoints(folder, every_steps=1), **kw)


@pytest.mark.parametrize('make', [lambda x: x.split(40), lambda x: DataLoader(TensorDataset(x), 40),
                                  lambda x: ArrayStream(x, 40, passes=2), lambda x: ArrayStream(x.numpy(), 40)])
def test_batches_of_ones_own_are_gone_on_with_where_they_stopped(tmp_path, make):
    x = _x()
    _broken(tmp_path, make(x))
    assert _same(_goes_on(tmp_path, make(x)), train_sae(make(x), SHAPE))


@pytest.mark.parametrize('other', [lambda x: (x+1e-3).split(40), lambda x: x.flip(0).split(40), lambda x: [*x.split(40)[:-1], x[-40:]*2]])
def test_another_list_of_batches_is_refused(tmp_path, other):
    "The same beginning does not help: the rest counts too."
    x = _x()
    _broken(tmp_path, x.split(40))
    with pytest.raises(ValueError, match='data.content'): _goes_on(tmp_path, other(x))


def test_another_array_is_refused(tmp_path):
    _broken(tmp_path, ArrayStream(_x(), 40))
    with pytest.raises(ValueError, match='data.array'): _goes_on(tmp_path, ArrayStream(_x(seed=1), 40))


def test_a_loader_that_shuffles_anew_is_refused_and_its_checkpoint_stays(tmp_path):
    loader = DataLoader(TensorDataset(_x()), 40, shuffle=True)
    _broken(tmp_path, loader)
    for _ in range(2):
        with pytest.raises(ValueError, match='other batches'): _goes_on(tmp_path, loader)
    seeded = lambda: DataLoader(TensorDataset(_x()), 40, shuffle=True, generator=torch.Generator().manual_seed(3))
    _broken(tmp_path/'seeded', seeded())
    assert _same(_goes_on(tmp_path/'seeded', seeded()), train_sae(seeded(), SHAPE))


def test_a_batch_that_cannot_be_read_loses_nothing(tmp_path):
    class Source(list):
        bad = True
        def __iter__(self):
            for i,x in enumerate(list.__iter__(self)):
                if i == 7 and self.bad: raise OSError('the disk is gone')
                yield x
    class Loader:  # of the batches, only the length is known beforehand
        def __init__(self): self.source = Source(_x().split(40))
        def __len__(self): return len(self.source)
        def __iter__(self): return iter(self.source)
    loader = Loader()
    with pytest.raises(OSError, match='gone'): train_sae(loader, SHAPE, checkpoints=Checkpoints(tmp_path))
    assert load_checkpoint(tmp_path).step == 7
    Source.bad = False
    assert _same(train_sae(loader, SHAPE, checkpoints=Checkpoints(tmp_path)), train_sae(_x().split(40), SHAPE))


def test_a_finished_run_is_not_trained_again(tmp_path):
    steps, x = [], _x().split(40)
    runs = [train_sae(x, SHAPE, callbacks=[lambda s: steps.append(s.step)], checkpoints=Checkpoints(tmp_path)) for _ in range(2)]
    assert len(steps) == 10 and _same(*runs) and runs[0].log.equals(runs[1].log)


def test_a_loader_shorter_than_it_says_is_reported():
    class Short:
        def __len__(self): return 9
        def __iter__(self): return iter(_x().split(100))
    with pytest.warns(UserWarning, match='ended after 4 of 9'): train_sae(Short(), SHAPE)


def test_where_no_checkpoint_can_be_kept_the_run_says_so_at_its_start(tmp_path):
    (tmp_path/'file').write_text('in the way')
    steps = []
    with pytest.raises(OSError, match='writable'): train_sae(_x().split(40), SHAPE, callbacks=[lambda s: steps.append(1)], checkpoints=Checkpoints(tmp_path/'file'))
    assert not steps


def test_streams_of_other_models_and_texts_are_told_apart():
    s = _stream().settings()
    assert s == _stream().settings()
    others = [_stream(lambda t: 1.001*_identity(t)), _stream(seed=1), _stream(skip_tokens=(3,)),
              ActivationStream(_identity, windows_from_ids(np.arange(800).reshape(50, 16)[::-1].copy()), _stream().cfg)]
    assert all(o.settings() != s for o in others)


# stores

def test_a_store_of_bfloat16_activations_holds_what_float32_would(tmp_path):
    bf = _stream(lambda t: (t[..., None]/7).bfloat16())
    a, b = store_activations(bf, tmp_path/'h'), store_activations(bf, tmp_path/'f', half=False)
    want = torch.cat(list(bf)).flatten().sort()[0]
    assert torch.equal(torch.cat(list(b)).flatten().sort()[0], want)
    assert torch.allclose(torch.cat(list(a)).flatten().sort()[0], want, rtol=1e-3)
    assert isinstance(a, ActivationStore) and a.sizes() == bf.sizes()


def test_a_store_remembers_whose_activations_it_holds(tmp_path):
    acts = lambda t: _identity(t)
    acts.origin = dict(model='m1', hook='blocks.0.mlp.hook_post', tokenizer=None)
    stored = store_activations(_stream(acts), tmp_path/'s')
    assert stored.origin == acts.origin and train_sae(stored, SAEConfig(1, 4)).sae.origin == acts.origin
    other = lambda t: _identity(t)
    other.origin = acts.origin | dict(model='m2')
    with pytest.raises(ValueError, match='acts.model: m2, not m1'): store_activations(_stream(other), tmp_path/'s')


def test_positions_of_a_window_are_drawn_evenly_and_never_from_its_start():
    s = _stream(per_window=4, skip_first=6, passes=30)
    pos = torch.cat(list(s)).flatten().long() % 16
    n = np.bincount(pos, minlength=16)
    assert (n[:6] == 0).all()
    expected = n.sum()/10
    assert (abs(n[6:]-expected) < 5*expected**.5).all()  # five standard deviations


def test_neighbour_excess_is_zero_for_equal_vectors_and_positive_for_pairs():
    x = _x(200, 20)
    assert abs(neighbour_excess(x)) < .05 and neighbour_excess(x.repeat_interleave(2, 0)) > .3


# one step and its log

def test_a_vector_alone_or_a_constant_batch_has_no_fvu():
    log = train_sae([_x(50), _x(1), torch.ones(30, 6)*3.3, torch.zeros(5, 6)], SHAPE, SAETrainConfig(log_every=1)).log
    assert log.fvu.isna().tolist() == [False, True, True, True] and log[['total', 'mse', 'l0']].notna().all().all()


def test_a_constant_last_batch_ends_a_run_and_its_checkpoint_goes_on(tmp_path):
    x = [_x(50), _x(50, seed=1), _x(1)]
    a, b = (train_sae(x, SHAPE, SAETrainConfig(log_every=1), checkpoints=Checkpoints(tmp_path)) for _ in range(2))
    assert a.log.equals(b.log) and np.isnan(b.log.fvu.iloc[-1])
    assert 'NaN' not in (tmp_path/'step-000000003'/'state.json').read_text()


def test_the_log_says_what_the_step_did():
    x, seen = _x(64), []
    sae = SAE(SHAPE)
    def look(s): seen.append((s.silent.clone(), s.density.clone()))
    log = train_sae([x, x+1], SHAPE, SAETrainConfig(log_every=1, dead_window=64, clip=0.), callbacks=[look]).log
    from monosem.sae import geometric_median
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(x))
        f = sae.encode(x)
        mse = (x-sae.decode(f)).square().sum(1).mean()
        norm1 = f.sum(1).mean()*.1/(.1*2)*min(1, 1/(.1*2))  # the coefficient rises over a tenth of two steps: at once
    first = log.iloc[0]
    assert np.isclose(first.mse, mse, rtol=1e-5) and np.isclose(first.l1, f.sum(1).mean(), rtol=1e-5)
    assert np.isclose(first.l0, (f > 0).sum(1).float().mean()) and np.isclose(first.total, mse+.1*f.sum(1).mean(), rtol=1e-5)
    assert np.isclose(first.fvu, mse/(x-x.mean(0)).square().sum(1).mean(), rtol=1e-5)
    silent, density = seen[0]
    assert torch.equal(silent, torch.where((f > 0).any(0), 0, 64)) and first.dead == int((silent >= 64).sum())
    assert torch.allclose(density, (f > 0).float().mean(0))
    assert log.step.tolist() == [1, 2] and log.vectors.tolist() == [64, 128]


def test_dead_features_are_counted_in_vectors_and_wake_up():
    state = TrainState(SHAPE, SAETrainConfig(dead_window=100, log_every=1), 10)
    x = _x(60)
    state(x)
    with torch.no_grad(): state.sae.b_enc[2] = -1e4
    state(x)
    assert state.silent[2] == 60 and state.log[-1]['dead'] == int((state.silent >= 100).sum())
    state(x)
    assert state.silent[2] == 120 and state.log[-1]['dead'] >= 1
    with torch.no_grad(): state.sae.b_enc[2] = 1e4
    state(x)
    assert state.silent[2] == 0


def test_schedules_reach_the_optimiser_and_the_loss():
    rates, losses = [], []
    def look(s):
        rates.append(s.opt.param_groups[0]['lr'])
        losses.append(s.log[-1])
    train_sae(_x().split(40), SHAPE, SAETrainConfig(lr=.01, warmup=.2, decay=.3, l1_warmup=.5, log_every=1), callbacks=[look])
    assert np.allclose(rates, .01*np.array([.5, 1, 1, 1, 1, 1, 1, 1, 2/3, 1/3]))
    l1 = [(r['total']-r['mse'])/r['l1'] for r in losses]
    assert np.allclose(l1, .1*np.minimum(1, np.arange(1, 11)/5), rtol=1e-4)


@pytest.mark.parametrize('args,want', [((0, 10, 0.), 1.), ((0, 10, .5), .2), ((4, 10, .5), 1.), ((9, 10, 0., .5), .2),
                                       ((5, 10, 0., .5), 1.), ((0, 10, 1.), .1), ((9, 10, .1, 1.), .1)])
def test_ramp_values(args, want): assert ramp(*args) == pytest.approx(want)


def test_a_state_loaded_is_the_state_saved_and_goes_on_alike():
    def run(state, batches):
        for x in batches: state(x)
        return state
    def silence(s):
        n = {3: 9, 12: 5}.get(s.step, 0)
        with torch.no_grad(): s.sae.b_enc[:n] = -1e4
    make = lambda: TrainState(SAEConfig(6, 40, l1=.5), SAETrainConfig(lr=1e-2, rewarm=.2, log_every=3), 30,
                              [Resampler(ResampleConfig(at=(.3, .6), window=100, pool=100)), silence], DensitySwitch())
    batches = [_x(50, seed=i) for i in range(30)]
    whole, first = run(make(), batches), run(make(), batches[:14])
    assert [h['resampled'] for h in whole.callbacks[0].history] == [9, 5]
    other = make()
    tensors, meta = pack_state(first)
    unpack_state(other, {k: v.clone() for k,v in tensors.items()}, meta)
    again, meta_again = pack_state(other)
    assert meta_again == meta and all(torch.equal(again[k], v) for k,v in tensors.items())
    run(other, batches[14:])
    (a, ma), (b, mb) = pack_state(whole), pack_state(other)
    assert ma == mb and all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    sae, bad = SAE(SHAPE), _x(20)
    bad[3, 2] = float('inf')
    before = [p.clone() for p in sae.parameters()]
    with pytest.raises(FloatingPointError): step(sae, torch.optim.Adam(sae.parameters()), bad, .1, dense_gradients)
    assert all(torch.equal(a, b) for a,b in zip(before, sae.parameters()))
    with pytest.raises(FloatingPointError, match=r'At step 1, with NaN or infinity in 1 of 20 vectors'):
        train_sae([_x(20), bad], SHAPE, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(torch.as_tensor(__import__('safetensors.torch').torch.load_file(tmp_path/'not-finite-step-1.safetensors')['batch']), bad)


def test_several_dictionaries_share_a_checkpoint_and_keep_apart(tmp_path):
    cfgs, x = [SHAPE, SAEConfig(6, 14, l1=.3, seed=1)], _x().split(40)
    def stop(state):
        if state.step == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_saes(x, cfgs, callbacks=lambda: [stop], checkpoints=Checkpoints(tmp_path, every_steps=5))
    def stop(state): pass
    both = train_saes(x, cfgs, callbacks=lambda: [stop], checkpoints=Checkpoints(tmp_path, every_steps=5))
    assert all(_same(b, train_sae(x, c)) for b,c in zip(both, cfgs))


# a device without float64

class NoDouble(torch.overrides.TorchFunctionMode):
    "Tensors of the training device are a class of their own, which no operation may turn into float64."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        on_device = any(isinstance(t, Device) for t in leaves)
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and 'cpu' in map(str, leaves)): return out.as_subclass(torch.Tensor)
        if on_device: assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in torch.utils._pytree.tree_leaves(out)), f'float64 on the device by {func}'
        return out


class Device(torch.Tensor):
    "A tensor on the training device."


def test_nothing_is_computed_in_float64_on_the_training_device():
    state = TrainState(SAEConfig(6, 40, l1=.5), SAETrainConfig(lr=1e-2, log_every=1), 12, [Resampler(ResampleConfig(at=(.5,), window=100, pool=100))], dense_gradients)
    with NoDouble():
        with pytest.raises(AssertionError, match='float64 on the device'): _x(3).as_subclass(Device).double()
        for i in range(12):
            x = _x(50, seed=i).as_subclass(Device)
            state(x)
            if i == 3:
                with torch.no_grad(): state.sae.b_enc[:8] = -1e4
    assert state.callbacks[0].history[0]['resampled'] > 0
