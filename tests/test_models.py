"Transformer, activations and dictionary: shapes, equality with references, determinism, round trips, bad input."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from monosem.activations import ActivationStream, StreamConfig
from monosem.core import load_artefact, save_artefact
from monosem.tokens import Mixture, TokenWindows, token_windows
from monosem.features import restrict
from monosem.hooked import sample
from monosem.resampling import resample_dead
from monosem.sae import SAE, SAEConfig, load_sae, normalize_decoder, remove_parallel_gradient, sae_loss, save_sae
from monosem.planted import planted
from monosem.training import SAETrainConfig, train_sae
from monosem.transformer import (LMTrainConfig, TransformerConfig, build_transformer, cosine_schedule, final_resid, load_transformer, loss_nats,
                                 save_transformer, train_transformer, weights)

SMALL = TransformerConfig(d_vocab=8192, d_model=32, n_heads=2, d_mlp=48, n_ctx=32)


def _random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('n_ctx,batch', [(32, 3), (2, 1), (17, 5)])
def test_fast_loss_equals_the_bridge(n_ctx, batch):
    model = build_transformer(SMALL, 'cpu')
    for p in weights(model).values(): p.data += .05*_random(*p.shape)  # leave the symmetric start: biases, norms
    t = torch.randint(8192, (batch, n_ctx), generator=torch.Generator().manual_seed(1))
    grads = []
    for loss in (model(t, return_type='loss'), loss_nats(model, t)):
        model.zero_grad(); loss.backward()
        grads.append([p.grad.clone() for p in weights(model).values()])
    assert abs(model(t, return_type='loss')-loss_nats(model, t)) < 1e-5
    for a,b in zip(*grads): assert (a-b).norm() <= 1e-4*a.norm()+1e-7  # float32, other order of sums
    assert torch.allclose(loss_nats(model, t, per_token=True).mean(), loss_nats(model, t), atol=1e-5)


def test_model_does_not_look_ahead():
    model = build_transformer(SMALL, 'cpu')
    t = torch.randint(8192, (1, 20), generator=torch.Generator().manual_seed(1))
    u = t.clone(); u[0, 12:] = 5
    assert torch.allclose(final_resid(model, t)[:, :12], final_resid(model, u)[:, :12], atol=1e-6)


def test_training_is_deterministic_and_round_trips(mini, tok, tmp_path):
    w = token_windows(mini, tok, Mixture(budget=20_000), n_ctx=32)
    a, b = (train_transformer(build_transformer(SMALL, 'cpu'), w, cfg=LMTrainConfig(batch=32)).model for _ in range(2))
    assert all(torch.equal(x, y) for x,y in zip(weights(a).values(), weights(b).values()))
    c = load_transformer(save_transformer(a, SMALL, tmp_path/'m'), 'cpu')
    t = torch.as_tensor(w.tokens[:2].astype(np.int64))
    assert torch.equal(loss_nats(a, t), loss_nats(c, t))
    assert sample(a, tok, 'x', 8, seed=3) == sample(c, tok, 'x', 8, seed=3)


def test_schedule_rises_and_falls():
    f = [cosine_schedule(s, 100, .1, .05) for s in range(101)]
    assert max(f) == f[9] == 1 and abs(f[100]-.05) < 1e-9 and f[0] == .1


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), n=st.integers(1, 20), b=st.integers(1, 9), l1=st.floats(0, 5), seed=st.integers(0, 99))
def test_sae_gradients_are_those_of_the_formula(d, n, b, l1, seed):
    "Against float64 autograd on the formula as the paper writes it."
    sae, x = SAE(SAEConfig(d_in=d, n_feats=n, seed=seed)).double(), _random(b, d, seed=seed).double()
    with torch.no_grad(): sae.b_dec.copy_(_random(d, seed=seed+1)); sae.b_enc.copy_(.1*_random(n, seed=seed+2))
    f = torch.relu((x-sae.b_dec)@sae.W_enc+sae.b_enc)
    want = torch.autograd.grad(((x-f@sae.W_dec-sae.b_dec)**2).sum(-1).mean()+l1*f.sum(-1).mean(), list(sae.parameters()))
    f = sae.encode(x)
    got = torch.autograd.grad(sae_loss(x, sae.decode(f), f, l1).total, list(sae.parameters()))
    for a,g in zip(want, got): assert (a-g).norm() <= 1e-9*(1+a.norm())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_permuting_features_changes_nothing(seed):
    sae, x = SAE(SAEConfig(d_in=6, n_feats=9, seed=seed)), _random(4, 6, seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).numpy()
    assert torch.allclose(restrict(sae, order)(x), sae(x), atol=1e-5)


def test_decoder_rows_stay_at_norm_one():
    sae, x = SAE(SAEConfig(d_in=8, n_feats=16)), _random(64, 8)
    opt = torch.optim.Adam(sae.parameters(), lr=.05)
    for _ in range(30):
        f = sae.encode(x)
        opt.zero_grad(); sae_loss(x, sae.decode(f), f, .1).total.backward()
        remove_parallel_gradient(sae)
        assert (sae.W_dec.grad*sae.W_dec).sum(-1).abs().max() < 1e-5
        opt.step(); normalize_decoder(sae)
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(16), atol=1e-5)


def test_dictionary_training_is_deterministic_and_round_trips(tmp_path):
    _, x = planted(8, 6, 20_000)
    a, b = (train_sae(x.split(256), SAEConfig(d_in=6, n_feats=12, l1=.1)).sae for _ in range(2))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    c = load_sae(save_sae(a, tmp_path/'s'), 'cpu')
    assert torch.allclose(a(x[:50]), c(x[:50]), atol=1e-6)


def test_resampling_everything_and_nothing():
    sae, x = SAE(SAEConfig(d_in=4, n_feats=6)), _random(3, 4)
    opt = torch.optim.Adam(sae.parameters())
    assert resample_dead(sae, opt, x, torch.zeros(6, dtype=torch.bool), torch.Generator()) == 0
    assert resample_dead(sae, opt, x, torch.ones(6, dtype=torch.bool), torch.Generator()) == 6  # more features than inputs, none alive
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_resampling_prefers_what_is_reconstructed_badly():
    "Probability goes with the loss squared: an input with 3 times the loss is drawn 9 times as often."
    sae = SAE(SAEConfig(d_in=2, n_feats=2000, l1=0.))
    with torch.no_grad(): sae.W_enc.zero_(); sae.b_enc.zero_()  # reconstructs nothing: loss = squared norm
    x = torch.tensor([[1., 0.], [0., 3.**.5]])
    resample_dead(sae, torch.optim.Adam(sae.parameters()), x, torch.ones(2000, dtype=torch.bool), torch.Generator().manual_seed(0))
    share = (sae.W_dec[:, 1] > .5).float().mean()
    assert abs(share-.9) < 4*(.9*.1/2000)**.5  # four binomial standard deviations


@pytest.mark.parametrize('batch,block,per', [(7, 50, 3), (64, 64, 16), (10, 1000, 32)])
def test_stream_repeats_nothing(batch, block, per):
    w = TokenWindows(np.arange(100*32, dtype=np.uint16).reshape(100, 32), np.zeros((100, 32), np.int32), [], {})  # every token its own id
    stream = ActivationStream(lambda t: t[..., None].float(), w, StreamConfig(batch=batch, block=block, per_window=per), harvest_batch=5)
    got = list(stream)
    flat = torch.cat(got).flatten()
    assert len(got) == len(stream) and all(len(b) == batch for b in got) and len(flat.unique()) == len(flat)
    assert (np.bincount(flat.long().numpy()//32, minlength=100) <= per).all()
    assert torch.equal(torch.cat(list(stream)), torch.cat(got))  # another pass, the same order


@pytest.mark.parametrize('make,what', [
    (lambda: SAEConfig(l1=-.1), 'l1'), (lambda: SAEConfig(n_feats=0), 'n_feats'), (lambda: SAE(SAEConfig(4, 8)).encode(torch.zeros(2, 5)), 'width 5'),
    (lambda: TransformerConfig(n_heads=3), 'n_heads'), (lambda: SAETrainConfig(lr=0.), 'lr'), (lambda: StreamConfig(batch=0), 'batch'),
    (lambda: TransformerConfig.from_dict({'d_modle': 3}), 'd_modle'), (lambda: Mixture(budget=0), 'budget'),
    (lambda: loss_nats(build_transformer(SMALL, 'cpu'), torch.zeros(1, 40, dtype=torch.long)), '40 tokens')])
def test_bad_input_names_what_was_given(make, what):
    with pytest.raises(ValueError) as e: make()
    assert what in str(e.value) and 'expected' in str(e.value) and str(e.value).count('\n') == 0


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nan_activations_stop_the_stream(mini, tok, value):
    w = token_windows(mini, tok, Mixture(budget=4000), n_ctx=32)
    with pytest.raises(ValueError, match='NaN or infinite'): next(iter(ActivationStream(lambda t: torch.full((*t.shape, 3), value), w, StreamConfig(batch=8, per_window=8))))


def test_a_failed_write_keeps_the_old_artefact(tmp_path, monkeypatch):
    save_artefact(tmp_path/'a', {'w': torch.ones(2)}, {})
    import monosem.core as core
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(core, 'save_file', full)
    with pytest.raises(OSError, match='No space left'): save_artefact(tmp_path/'a', {'w': torch.zeros(2)}, {})
    assert torch.equal(load_artefact(tmp_path/'a').tensors['w'], torch.ones(2)) and [p.name for p in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('name', ['weights.safetensors', 'config.json', 'run.json'])
def test_damaged_artefacts_are_named(tmp_path, name):
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-3])):
        save_artefact(tmp_path/'a', {'w': torch.ones(2)}, {'x': 1})
        damage(tmp_path/'a'/name)
        with pytest.raises((ValueError, FileNotFoundError), match='expected'): load_artefact(tmp_path/'a')


def test_shapes_are_checked():
    "The jaxtyping hook is on: a wrong rank is refused at the door."
    with pytest.raises(Exception, match='batch d_in'): sae_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), 1.)
