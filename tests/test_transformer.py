"The transformer's training, number by number."
import json
import warnings

import numpy as np
import pytest
import torch

import monosem.transformer as T
from monosem.checkpoints import Checkpoints
from monosem.core import load_artefact
from monosem.tokens import windows_from_ids
from monosem.hooked import HookedModel, NeuronModel, at_hook, fitting, sample
from monosem.transformer import (LMTrainConfig, TransformerConfig, build_transformer, cosine_schedule, final_resid, is_ours,
                                 load_transformer, loss_nats, mean_loss, mlp_acts, save_transformer, train_transformer, weights)

SHAPE = TransformerConfig(d_vocab=40, d_model=8, d_mlp=12, n_heads=2, n_ctx=6)


def _windows(n, seed=0, tokenizer=None): return windows_from_ids(np.random.default_rng(seed).integers(0, 40, (n, 6)), tokenizer)


@pytest.mark.parametrize('step,want', [(0, .1), (4, .5), (9, 1.), (10, 1.), (55, .05+.95/2), (100, .05)])
def test_the_rate_rises_linearly_and_falls_as_a_cosine(step, want): assert cosine_schedule(step, 100, .1, .05) == pytest.approx(want)


def test_schedules_of_very_short_runs():
    assert cosine_schedule(0, 1) == 1. and cosine_schedule(0, 3, 0., 0.) == 1. and cosine_schedule(3, 3, 0., 0.) == pytest.approx(0.)


def test_a_mean_loss_weighs_every_prediction_alike():
    model, w = build_transformer(SHAPE, 'cpu'), _windows(7)
    with torch.no_grad(): want = loss_nats(model, w.ids(), per_token=True).mean().item()
    for batch in (1, 3, 32): assert mean_loss(model, w, batch=batch) == pytest.approx(want, abs=1e-5)
    zero = loss_nats(model, w.ids(), torch.zeros_like).item()
    assert mean_loss(model, w, torch.zeros_like, batch=4) == pytest.approx(zero, abs=1e-5)


def test_edited_neurons_are_what_the_rest_reads():
    model = build_transformer(SHAPE, 'cpu')
    with torch.no_grad():
        for p in weights(model).values(): p += .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    t = _windows(2).ids()
    resid, x = mlp_acts(model, t)
    w = weights(model)
    want = T.layer_norm(model, resid+2*x@w['layers.0.mlp.fc_out.weight'].T+w['layers.0.mlp.fc_out.bias'], 'ln_out')
    assert torch.allclose(final_resid(model, t, lambda x: 2*x), want, atol=1e-5) and (x >= 0).all() and (x == 0).any()
    logits = final_resid(model, t)@w['head.weight'].T
    nll = -logits.log_softmax(-1)[:, :-1].gather(2, t[:, 1:, None])[..., 0]
    assert torch.allclose(loss_nats(model, t, per_token=True), nll, atol=1e-5) and torch.allclose(loss_nats(model, t, chunk=3), nll.mean(), atol=1e-5)
    assert torch.allclose(loss_nats(model, t, per_token=True, chunk=3), nll, atol=1e-5)


def test_training_reads_each_window_once_and_logs_what_it_did(monkeypatch):
    seen, rates, groups, real, adam = [], [], [], T.loss_nats, torch.optim.AdamW
    def look(model, tokens, *a, **k):
        if torch.is_grad_enabled(): seen.append(tokens.clone())
        return real(model, tokens, *a, **k)
    class Adam(adam):
        def __init__(self, g, **k): groups.append([(x['weight_decay'], {p.ndim for p in x['params']}) for x in g]); super().__init__(g, **k)
        def step(self):
            rates.append(self.param_groups[1]['lr'])
            assert torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']]).norm() <= .1001
            return super().step()
    monkeypatch.setattr(T, 'loss_nats', look)
    monkeypatch.setenv('MONOSEM_PRECISION', 'float32')  # nothing is measured
    monkeypatch.setattr(torch.optim, 'AdamW', Adam)
    w, held, cfg = _windows(10), _windows(3, 1), LMTrainConfig(batch=4, eval_every=2, clip=.1, lr=.01, warmup=.5, weight_decay=.3)
    done = train_transformer(build_transformer(SHAPE, 'cpu'), w, held, cfg)
    rows = torch.cat(seen)
    assert [len(s) for s in seen] == [4, 4, 2] and sorted(map(tuple, rows.tolist())) == sorted(map(tuple, w.tokens.tolist()))
    assert not torch.equal(rows, w.ids()) and groups == [[(.3, {2}), (0., {1})]]
    assert np.allclose(rates, [.01*cosine_schedule(s, 3, .5, .05) for s in range(3)])
    assert done.log.step.tolist() == [0, 2] and done.log.tokens.tolist() == [24, 60] and not done.model.training
    assert done.log.validation_nats.iloc[-1] == pytest.approx(mean_loss(done.model, held)) and (done.log.train_nats > 0).all()
    assert train_transformer(build_transformer(SHAPE, 'cpu'), w, None, cfg).log.validation_nats.isna().all()


def test_a_stopped_training_goes_on_with_the_same_text_only(tmp_path):
    class Due(Checkpoints):
        def due(self, step):
            if step == 3: raise KeyboardInterrupt
            return step == 2
    make, cfg = lambda: build_transformer(SHAPE, 'cpu'), LMTrainConfig(batch=2)
    with pytest.raises(KeyboardInterrupt): train_transformer(make(), _windows(9), _windows(2, 1), cfg, Due(tmp_path))
    for other, what in (((_windows(9, 5), _windows(2, 1)), 'data'), ((_windows(9), _windows(2, 7)), 'validation'), ((_windows(9, tokenizer='abc'), _windows(2, 1)), 'tokenizer')):
        with pytest.raises(ValueError, match=what): train_transformer(make(), *other, cfg, Checkpoints(tmp_path))
    a, b = (train_transformer(make(), _windows(9), _windows(2, 1), cfg, k) for k in (Checkpoints(tmp_path), None))
    assert all(torch.equal(p, q) for p,q in zip(weights(a.model).values(), weights(b.model).values()))
    assert a.log.drop(columns='seconds').equals(b.log.drop(columns='seconds'))


@pytest.mark.parametrize('ids,n_ctx,what', [(41, 6, 'ids below 40'), (40, 7, "at most the model's 6")])
def test_a_text_that_the_model_cannot_read_is_refused_before_training(ids, n_ctx, what):
    w = windows_from_ids(np.full((3, n_ctx), ids-1))
    for args in ((w,), (_windows(3), w)):
        with pytest.raises(ValueError, match=what): train_transformer(build_transformer(SHAPE, 'cpu'), *args)


def test_a_model_remembers_its_tokenizer(tmp_path):
    model = train_transformer(build_transformer(SHAPE, 'cpu'), _windows(2, tokenizer='abc')).model
    save_transformer(model, SHAPE, tmp_path/'m', dict(note='x'))
    assert load_artefact(tmp_path/'m').run == dict(note='x', tokenizer='abc')
    back = load_transformer(tmp_path/'m', 'cpu')
    assert back.tokenizer_hash == 'abc' and at_hook(back).origin == dict(model=at_hook(model).hash, hook='blocks.0.mlp.hook_post', tokenizer='abc')
    save_transformer(build_transformer(SHAPE, 'cpu'), SHAPE, tmp_path/'n')
    assert load_transformer(tmp_path/'n', 'cpu').tokenizer_hash is None
    (tmp_path/'n/config.json').write_text(json.dumps(SHAPE.to_dict() | dict(d_mlp=13)))
    with pytest.raises(ValueError, match='lacks or misshapes'): load_transformer(tmp_path/'n', 'cpu')


@pytest.mark.parametrize('bad', [dict(d_vocab=0), dict(n_heads=3), dict(d_mlp=-1), dict(n_ctx=0)])
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=[*bad][0]): TransformerConfig(**bad)


@pytest.mark.parametrize('bad', [dict(batch=0), dict(lr=0.), dict(lr=-1.)])
def test_impossible_trainings_are_refused(bad):
    with pytest.raises(ValueError, match=[*bad][0]): LMTrainConfig(**bad)


# rounded products

def _trained(monkeypatch, precision, checkpoints=None, n=9, **cfg):
    if precision: monkeypatch.setenv('MONOSEM_PRECISION', precision)
    else: monkeypatch.delenv('MONOSEM_PRECISION', raising=False)
    return train_transformer(build_transformer(SHAPE, 'cpu'), _windows(n), _windows(2, 1), LMTrainConfig(batch=2, **cfg), checkpoints)


def _same(a, b): return all(torch.equal(p, q) for p,q in zip(weights(a.model).values(), weights(b.model).values()))


class _Stops(Checkpoints):
    def due(self, step):
        if step == 3: raise KeyboardInterrupt
        return step == 2


@pytest.mark.parametrize('chunk', [1, 7, 35, 100])
def test_the_rounded_head_is_cross_entropy_where_nothing_is_rounded(chunk):
    gen = torch.Generator().manual_seed(0)
    h, w, t = 3*torch.randn(35, 8, generator=gen), torch.randn(40, 8, generator=gen), torch.randint(40, (35,), generator=gen)
    h[0] *= 100  # a prediction without doubt: probabilities of 0 and 1
    h, w = h.requires_grad_(), w.requires_grad_()
    want = torch.nn.functional.cross_entropy(h@w.T, t)
    got = T._RoundedHead.apply(h, w, t, chunk, torch.float32)
    for a,b in zip((got, *torch.autograd.grad(2*got, (h, w))), (want, *torch.autograd.grad(2*want, (h, w)))):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6) and a.dtype == torch.float32


def test_rounded_products_leave_weights_and_sums_in_float32():
    model, t = build_transformer(SHAPE, 'cpu'), _windows(4).ids()
    with T.computing_in('bfloat16', 'cpu'):
        resid, x = mlp_acts(model, t)
        loss, each = loss_nats(model, t), loss_nats(model, t, per_token=True)
    assert resid.dtype == loss.dtype == torch.float32 and x.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(loss, [*weights(model).values()])} == {torch.float32}
    want = loss_nats(model, t)
    assert abs(loss-want) < .01 and abs(each.float().mean()-want) < .05 and loss != want
    with T.computing_in('float32', 'cpu'): assert torch.equal(loss_nats(model, t), want)


def test_training_in_bfloat16_comes_close_to_float32(monkeypatch):
    "36 steps of rate 0.01. A factor is rounded by at most 2^-9; steps of Adam amplify that where a gradient is near 0, so weights may differ by some steps."
    full, rounded = (_trained(monkeypatch, p, n=72, lr=.01) for p in T.PRECISIONS)
    assert (full.precision, rounded.precision) == T.PRECISIONS and not _same(full, rounded)
    assert {p.dtype for p in weights(rounded.model).values()} == {torch.float32}
    assert np.isfinite(rounded.log.train_nats).all() and rounded.log.validation_nats.iloc[-1] < rounded.log.validation_nats.iloc[0]-.2
    assert abs(full.log[['train_nats', 'validation_nats']]-rounded.log[['train_nats', 'validation_nats']]).max(None) < .03
    assert _same(rounded, _trained(monkeypatch, 'bfloat16', n=72, lr=.01))


@pytest.mark.parametrize('precision', T.PRECISIONS)
@pytest.mark.parametrize('here', [*T.PRECISIONS, None])
def test_a_checkpoint_keeps_its_precision(precision, here, monkeypatch, tmp_path):
    "What is forced or measured where the run goes on comes second, and is said to."
    whole = _trained(monkeypatch, precision)
    with pytest.raises(KeyboardInterrupt): _trained(monkeypatch, precision, _Stops(tmp_path))
    monkeypatch.setattr(T, 'pick_precision', lambda *a: here or 'float32')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        back = _trained(monkeypatch, here, Checkpoints(tmp_path))
    assert _same(back, whole) and back.precision == precision
    differ = precision != (here or 'float32')
    assert [f'goes on in {precision}' in str(w.message) for w in said] == [True]*differ


def test_a_checkpoint_that_does_not_say_is_of_float32(monkeypatch, tmp_path):
    class Older(_Stops):
        def save(self, step, tensors, meta, settings, must=False):
            super().save(step, tensors, {k: v for k,v in meta.items() if k != 'precision'}, settings, must)
    with pytest.raises(KeyboardInterrupt): _trained(monkeypatch, 'float32', Older(tmp_path))
    assert _same(_trained(monkeypatch, 'float32', Checkpoints(tmp_path)), _trained(monkeypatch, 'float32'))


def test_a_precision_that_cannot_be_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'half' from MONOSEM_PRECISION; expected float32 or bfloat16"): _trained(monkeypatch, 'half')
    with pytest.raises(KeyboardInterrupt): _trained(monkeypatch, 'bfloat16', _Stops(tmp_path))
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda device: False)
    with pytest.raises(ValueError, match='bfloat16 from MONOSEM_PRECISION on the device cpu'): _trained(monkeypatch, 'bfloat16')
    with pytest.raises(ValueError, match=r'bfloat16 from .*step-000000002 on the device cpu.*float32'): _trained(monkeypatch, None, Checkpoints(tmp_path))
    assert _trained(monkeypatch, None).precision == 'float32'


@pytest.mark.parametrize('costs,want', [((1., .5), 'bfloat16'), ((1., .85), 'bfloat16'), ((1., .95), 'float32'), ((1., 2.), 'float32'), ((1., 50.), 'float32')])
def test_what_is_faster_is_measured_once_a_shape(costs, want, monkeypatch):
    calls = []
    def seconds(model, tokens, precision):
        calls.append((precision, tokens.numel()))
        return costs[T.PRECISIONS.index(precision)]*tokens.numel()*(1+.05*(len(calls)%3))
    monkeypatch.setattr(T, '_seconds', seconds)
    monkeypatch.setattr(T, '_FASTER', {})
    monkeypatch.setattr(T, '_WORTH_IT', 0)
    monkeypatch.delenv('MONOSEM_PRECISION', raising=False)
    model, t = build_transformer(SHAPE, 'cpu'), _windows(5).ids()
    before = [p.clone() for p in weights(model).values()]
    for _ in range(2): assert T.pick_precision(model, t) == want
    full = [c for c in calls if c[1] == t.numel()]
    assert len(full) == (0 if costs[1] > 3 else 10) and len(calls) < 25  # a hopeless way is not tried on a whole batch
    n = len(calls)
    assert T.pick_precision(model, t[:3]) == want and len(calls) > n
    monkeypatch.undo()
    with monkeypatch.context() as m:
        m.setattr(T, '_WORTH_IT', 0)
        assert T.faster_precision(model, t) in T.PRECISIONS
    assert T.faster_precision(model, t) == 'float32'  # too little work to gain anything
    assert all(torch.equal(a, b) and b.grad is None for a,b in zip(before, weights(model).values()))


def test_one_pause_of_the_machine_decides_nothing(monkeypatch):
    "Float32 is interrupted in most rounds, bfloat16 never: by its least time float32 is as fast."
    model, t, calls = build_transformer(SHAPE, 'cpu'), _windows(5).ids(), []
    def seconds(model, tokens, precision):
        calls.append(precision)
        paused = precision == 'float32' and tokens.numel() == t.numel() and calls.count('float32')%4
        return 1.+9*bool(paused)
    monkeypatch.setattr(T, '_seconds', seconds)
    monkeypatch.setattr(T, '_WORTH_IT', 0)
    assert T.faster_precision(model, t) == 'float32' and len(calls) > 10


# the door to it

def test_the_edges_of_what_a_model_reads_are_read():
    at = at_hook(build_transformer(SHAPE, 'cpu'))
    at(torch.full((1, 6), 39)); at(torch.zeros(1, 1, dtype=torch.long))
    for bad in (torch.full((1, 6), 40), torch.full((1, 6), -1), torch.zeros(1, 7, dtype=torch.long)):
        with pytest.raises(ValueError): at(bad)
    assert is_ours(at.model) and type(at) is NeuronModel and at_hook(at) is at
    with pytest.raises(ValueError, match='same hook point'): at_hook(at, 'blocks.0.hook_resid_pre')
    assert type(at_hook(at.model, 'blocks.0.hook_resid_pre')) is HookedModel
    assert repr(at) == 'NeuronModel(blocks.0.mlp.hook_post, 12 wide)'


def test_a_fitting_refuses_each_thing_that_does_not_belong():
    from monosem.sae import SAE, SAEConfig
    model = build_transformer(SHAPE, 'cpu')
    at, sae = at_hook(model), SAE(SAEConfig(12, 5))
    assert fitting(model, sae, _windows(2)).d_in == 12
    with pytest.raises(ValueError, match='width 13 for 12'): fitting(model, SAE(SAEConfig(13, 5)))
    sae.origin = dict(model=at.hash, hook=at.hook)
    assert fitting(model, sae)
    sae.origin = dict(model='other', hook=at.hook)
    with pytest.raises(ValueError, match='dictionary of the model other'): fitting(model, sae)
    sae.origin = dict(model=at.hash, hook='blocks.0.hook_mlp_out')
    with pytest.raises(ValueError, match='hook point'): fitting(at, sae)


def test_sampling_draws_from_the_softmax_and_slides_its_window(tok):
    "A model that always prefers one token, told apart by temperature, seed and edit."
    model = build_transformer(TransformerConfig(d_model=8, d_mlp=12, n_heads=2, n_ctx=4), 'cpu')
    lengths, real = [], NeuronModel.next_logits
    class Watched(NeuronModel):
        def next_logits(self, tokens, edit=None):
            lengths.append(tokens.shape[1])
            return real(self, tokens, edit)
    at = Watched(model)
    greedy = sample(at, tok, 'abc', 6, temperature=0.)
    start = len(tok.encode('abc').ids)+1
    assert lengths == [min(4, start+i) for i in range(6)]
    assert greedy == sample(at, tok, 'abc', 6, temperature=0., seed=9) and sample(at, tok, 'abc', 6, seed=1) != sample(at, tok, 'abc', 6, seed=2)
    assert sample(at, tok, 'abc', 6, seed=1) == sample(at, tok, 'abc', 6, seed=1) and sample(at, tok, 'abc', 0) == ''
    assert sample(at, tok, 'abc', 3, temperature=1e-4) == sample(at, tok, 'abc', 3, temperature=0.)
    with pytest.raises(ValueError, match='temperature'): sample(at, tok, 'a', 2, temperature=-.1)
