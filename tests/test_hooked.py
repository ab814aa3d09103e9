"Models that are not ours: everything measured through `at_hook` equals what plain hooks give."
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from monosem.activations import ActivationStream, StreamConfig
from monosem.tokens import TokenWindows, load_tokenizer, windows_from_ids
from monosem.evaluation import evaluate
from monosem.features import examples, feature_pass, feature_stats, logit_weights, restrict, vector_stats
from monosem.hooked import (HookedModel, NeuronModel, at_hook, fitting, kept, mean_acts, only_at,
                            sample, text_ids)
from monosem.neuron_embeddings import features_of, neurons_of, strong_examples
from monosem.proxies import correlate, neuron_correlations
from monosem.sae import SAE, SAEConfig, load_sae, save_sae
from monosem.steering import pin, steer
from monosem.training import SAETrainConfig, train_sae
from monosem.transformer import (TransformerConfig, build_transformer, final_resid, loss_nats,
                                 mlp_acts, weights_hash)

VOCAB, CTX = 300, 24


def _native(**other):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    shape = dict(n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=48, n_ctx=CTX,
                 d_vocab=VOCAB, act_fn='gelu', seed=0)
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape | other), device='cpu')
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():  # leave the symmetric start: biases, norms
        for p in model.parameters(): p += .1*torch.randn(p.shape, generator=gen)
    return model


def _transformers(kind, tmp_path, monkeypatch):
    "A model of the transformers library with random weights, bridged as its users bridge one."
    from transformers import (GPT2Config, GPT2LMHeadModel, Gemma2Config, Gemma2ForCausalLM,
                              LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)
    from transformer_lens.model_bridge import TransformerBridge
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    mark = '<|endoftext|>'
    PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(), bos_token=mark, eos_token=mark,
                            pad_token=mark).save_pretrained(tmp_path/'tok')
    tok = PreTrainedTokenizerFast.from_pretrained(tmp_path/'tok')
    torch.manual_seed(0)
    shape = dict(vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CTX)
    hf = dict(llama=lambda: LlamaForCausalLM(LlamaConfig(**shape)),
              gemma2=lambda: Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8)),
              gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=CTX, n_embd=32,
                                                      n_layer=2, n_head=4)))[kind]()
    with torch.no_grad():
        for p in hf.parameters(): p += .1*torch.randn(p.shape)
    return TransformerBridge.boot_transformers(kind, hf_model=hf, device='cpu', tokenizer=tok)


PLACES = {
    'two layers, GELU': (dict(), 'blocks.1.mlp.hook_post', 48),
    'gated, RMS': (dict(gated_mlp=True, act_fn='silu', normalization_type='RMS'),
                   'blocks.1.mlp.hook_post', 48),
    'residual stream': (dict(), 'blocks.0.hook_resid_post', 32),
    'MLP output': (dict(), 'blocks.0.hook_mlp_out', 32),
    'heads': (dict(), 'blocks.1.attn.hook_z', 32),
    'grouped queries': (dict(n_key_value_heads=2), 'blocks.0.attn.hook_z', 32),
    'grouped values': (dict(n_key_value_heads=2), 'blocks.1.attn.hook_v', 16),
    'one layer, GELU': (dict(n_layers=1), 'blocks.0.mlp.hook_post', 48),
}


@pytest.fixture(scope='module', params=PLACES, ids=lambda p: p)
def place(request):
    other, hook, width = PLACES[request.param]
    return at_hook(_native(**other), hook), width


def _tokens(n=3, pos=CTX, vocab=VOCAB, seed=0):
    return torch.randint(vocab, (n, pos), generator=torch.Generator().manual_seed(seed))


def _windows(n=6, pos=CTX, vocab=VOCAB, seed=0):
    return windows_from_ids(_tokens(n, pos, vocab, seed).numpy())


def _plain_read(at, tokens):
    "By the library's own cache."
    _, cache = at.model.run_with_cache(tokens)
    return cache[at.hook].detach().flatten(2)


def _plain_losses(at, tokens, edit):
    "By the library's own hooks, loss written out."
    def put(x, hook): return edit(x.flatten(2)).view(x.shape)
    with torch.no_grad():
        logits = at.model.run_with_hooks(tokens, return_type='logits', fwd_hooks=[(at.hook, put)])
    return -logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


def _sae(width, n_feats=20, seed=0):
    "A dictionary with random weights that fires on something."
    sae, gen = SAE(SAEConfig(width, n_feats, seed=seed, start='random')), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(width, n_feats, generator=gen))
        sae.b_enc.copy_(-.5*torch.rand(n_feats, generator=gen))
        sae.b_dec.copy_(.1*torch.randn(width, generator=gen))
    return sae


def test_reading_and_replacing_are_those_of_plain_hooks(place):
    at, width = place
    tokens = _tokens()
    assert type(at) is HookedModel and at.d_in == width
    assert torch.allclose(at(tokens), _plain_read(at, tokens), atol=1e-6)
    sae = _sae(width)
    for edit in (lambda x: x, torch.zeros_like, sae, pin(sae, 3, 2.)):
        with torch.no_grad(): want = _plain_losses(at, tokens, edit)
        assert torch.allclose(at.losses(tokens, edit), want, atol=1e-5)
    assert torch.allclose(at.next_logits(tokens), at.logits(tokens)[:, -1])
    assert not torch.allclose(at.losses(tokens, torch.zeros_like), at.losses(tokens), atol=1e-3)


def test_evaluation_of_a_stranger_is_that_of_plain_hooks(place):
    at, width = place
    sae, w = _sae(width), _windows()
    tokens = w.ids()
    with torch.no_grad():
        x = _plain_read(at, tokens)
        f = sae.encode(x)
        mean = x.mean((0, 1))
        ce = [_plain_losses(at, tokens, e).mean() for e in
              (lambda x: x, sae, torch.zeros_like, lambda x: mean.expand_as(x))]
        fvu = (x-sae(x)).square().sum()/(x-mean).square().sum()
    e = evaluate(at, sae, w, batch=4)
    assert np.allclose([e.ce_clean, e.ce_spliced, e.ce_zero, e.ce_mean], ce, atol=1e-5)
    assert np.isclose(e.fvu.value, fvu, rtol=1e-4)
    assert np.isclose(e.l0.value, (f > 0).sum(-1).float().mean())
    assert np.allclose(e.density, (f > 0).float().mean((0, 1))) and np.isclose(e.density.sum(), e.l0.value)
    assert np.isclose(e.recovered.value, (ce[2]-ce[1])/(ce[2]-ce[0]), rtol=1e-3)
    assert np.isclose(e.recovered_mean.value, (ce[3]-ce[1])/(ce[3]-ce[0]), rtol=1e-3)
    assert e.n_tokens == tokens.numel() and e.n_dead == int((f.amax((0, 1)) == 0).sum())


def test_statistics_and_examples_of_a_stranger_are_right(place, tok):
    at, width = place
    sae, w = _sae(width), _windows()
    with torch.no_grad(): f = sae.encode(_plain_read(at, w.ids())).flatten(0, 1)
    s = feature_stats(at, sae, w, k=4)
    want = f.topk(4, dim=0)
    assert np.allclose(s.top_act, want.values.T, atol=1e-5)
    assert np.allclose(s.freq, (f > 0).float().mean(0)) and np.allclose(s.max_act, f.amax(0), atol=1e-5)
    strong = want.values[0] > 1e-3
    assert (s.top[strong, 0] == want.indices[0][strong].numpy()).all()
    assert np.allclose(s.mean_act, (f.sum(0)/(f > 0).sum(0).clamp(min=1)), atol=1e-4)
    j = int(s.max_act.argmax())
    with pytest.raises(ValueError, match='8192 tokens for a model of 300'): examples(at, sae, tok, w, s, j)


def test_correlations_of_a_stranger_are_those_of_numpy(place):
    at, width = place
    sae, w = _sae(width), _windows()
    target, mask = w.tokens % 3 == 0, w.tokens % 7 != 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = correlate(at, sae, w, target[None], mask)
        x = _plain_read(at, w.ids())
        f, y = sae.encode(x).detach()[mask].numpy(), target[mask]
        for got, v in ((c.features, f), (c.neurons, x[mask].numpy())):
            want = [np.corrcoef(col, y)[0, 1] for col in v.T]
            assert np.allclose(got[0], want, atol=1e-4, equal_nan=True)


PASSES = {'evaluate': lambda at, sae, w: evaluate(at, sae, w), 'feature_stats': lambda at, sae, w: feature_stats(at, sae, w),
          'correlate': lambda at, sae, w: correlate(at, sae, w, (w.tokens % 3 == 0)[None], w.tokens % 7 != 0),
          'neuron_correlations': lambda at, sae, w: neuron_correlations(at, sae, w, [1, 0], w.tokens % 7 != 0),
          'vector_stats': lambda at, sae, w: vector_stats(sae, at(w.ids()).flatten(0, 1)),
          'strong_examples': lambda at, sae, w: strong_examples(features_of(at, sae), w)}


@pytest.mark.parametrize('name', PASSES)
def test_no_pass_holds_a_number_for_every_token_and_feature(name, monkeypatch):
    "Neither encodes densely, nor makes any array of all tokens by features."
    n_feats, w = 3000, _windows(64)
    at, sae, largest = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48, n_feats), []
    with torch.no_grad(): sae.b_enc -= 25.
    def refused(self, *_): raise AssertionError('a dense array of features')
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            largest.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor) and n_feats in t.shape)
            return out
    monkeypatch.setattr(SAE, 'encode', refused)
    monkeypatch.setattr(scipy.sparse.csr_array, 'toarray', refused)
    with Watch(): PASSES[name](at, sae, w)
    assert max(largest, default=0) < w.n_tokens*n_feats


@pytest.mark.parametrize('name', ['evaluate', 'feature_stats', 'correlate', 'neuron_correlations', 'vector_stats', 'strong_examples'])
def test_activations_that_are_no_numbers_are_named(name):
    "They fire nothing: a pass that went on would leave them out without a word."
    class Broken(HookedModel):
        def __call__(self, tokens):
            x = super().__call__(tokens)
            x[tokens == 12] = bad
            return x
    at, w = Broken(_native(), 'blocks.1.mlp.hook_post'), _windows()
    w.tokens[3, 5] = 12
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match='NaN or infinit'): PASSES[name](at, _sae(48), w)


def test_what_does_not_count_is_not_looked_at():
    "Tokens left out may be anything; a window of them alone, too."
    class Broken(HookedModel):
        def __call__(self, tokens):
            x = super().__call__(tokens)
            x[tokens == 12] = torch.nan
            return x
    model, sae, w = _native(), _sae(48), _windows(40)
    w.tokens[17:35] = 12
    whole, broken = at_hook(model, 'blocks.1.mlp.hook_post'), Broken(model, 'blocks.1.mlp.hook_post')
    a, b = (vars(feature_stats(at, sae, w, skip_tokens=12)) for at in (whole, broken))
    assert all(np.array_equal(a[k], b[k]) for k in a) and a['n_tokens'] == (w.tokens != 12).sum()
    mask, target = w.tokens != 12, (w.tokens % 2 == 0)[None]
    for f in (lambda at: correlate(at, sae, w, target, mask).features, lambda at: neuron_correlations(at, sae, w, [3], mask)):
        assert np.array_equal(f(whole), f(broken), equal_nan=True) and np.isfinite(f(broken)).any()
    none = correlate(whole, sae, w, target, mask & False)
    assert np.isnan(none.features).all() and none.features.shape == (1, 20) and np.isnan(none.neurons).all() and none.neurons.shape == (1, 48)
    with pytest.raises(ValueError, match='no position that counts'): feature_stats(whole, sae, w, skip_tokens=range(VOCAB))
    with pytest.raises(ValueError, match='choice of tokens'): next(feature_pass(whole, sae, w, keep=mask[1:]))


def test_a_slice_gives_one_feature_densely():
    at, sae, w = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48), _windows(20)
    with torch.no_grad(): sae.b_enc[4] = -1e6  # dead
    keep = w.tokens % 3 > 0
    for mask in (None, keep):
        for s in feature_pass(at, sae, w, batch=5, keep=mask):
            f = sae.encode(s.acts).detach().numpy()*(1 if mask is None else keep[s.rows][..., None])
            assert all(np.allclose(s.of(j), f[..., j], atol=1e-5) for j in range(20)) and not s.of(4).any()
            assert len(s.active.start) == s.tokens.numel()+1 and (np.diff(s.active.row) >= 0).all()


DEFINED = ('two layers, GELU', 'gated, RMS', 'residual stream', 'MLP output', 'heads', 'grouped queries')


@pytest.mark.parametrize('name', DEFINED)
def test_logit_weights_are_the_derivative_with_the_last_scale_held(name):
    "Adding a direction in the last layer changes the logits by exactly these over the norm's scale, once that scale is held."
    other, hook, _ = PLACES[name]
    model = _native(**other | dict(n_layers=1))
    at, scales = at_hook(model, hook.replace('blocks.1', 'blocks.0')), []
    if 'attn' in hook: model.blocks[0].mlp.hook_out.add_hook(lambda x, hook: 0*x)  # the direct path is all there is
    def keep(x, hook): scales.append(x.clone())
    tokens = _tokens(2, 5)
    model.run_with_hooks(tokens, fwd_hooks=[('ln_final.hook_scale', keep)])
    def logits(shift):
        hooks = [(at.hook, lambda x, hook: x+shift.view(x.shape[2:])), ('ln_final.hook_scale', lambda x, hook: scales[0])]
        with torch.no_grad(): return model.run_with_hooks(tokens, return_type='logits', fwd_hooks=hooks)
    for d in torch.randn(3, at.d_in, generator=torch.Generator().manual_seed(3)):
        change = (logits(.1*d)-logits(-.1*d))/.2*scales[0]
        change = change-change.median(-1, keepdim=True).values
        got = logit_weights(at, d[None])[0]
        assert torch.allclose(change, got.expand_as(change), atol=1e-3*float(got.abs().max()))


def test_logit_weights_predict_the_change_of_logits():
    "In the last layer the measured change goes with them, whatever the norm's scale does."
    for name in ('two layers, GELU', 'gated, RMS'):
        at = at_hook(_native(**PLACES[name][0]), 'blocks.1.mlp.hook_post')
        d, tokens = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)), _tokens(2)
        change = at.logits(tokens, lambda x: x+.01*d[0])-at.logits(tokens, lambda x: x-.01*d[0])
        r = torch.corrcoef(torch.stack([change.mean((0, 1)), logit_weights(at, d)[0]]))[0, 1]
        assert r > .9, name


@pytest.mark.parametrize('hook', ['blocks.0.attn.hook_q', 'blocks.0.ln1.hook_normalized', 'hook_embed'])
def test_where_logit_weights_are_not_defined_they_are_refused(hook):
    at = at_hook(_native(), hook)
    with pytest.raises(ValueError, match='way to the logits'): logit_weights(at, torch.zeros(1, at.d_in))


@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'gemma2'])
def test_models_of_transformers(kind, tmp_path, monkeypatch, tok):
    "Dropout is off while one measures, whatever mode the model is in; prompts are continued with its tokenizer."
    model = _transformers(kind, tmp_path, monkeypatch)
    model.train()
    at, tokens = at_hook(model, 'blocks.1.mlp.hook_post'), _tokens(2, vocab=8192)
    assert torch.equal(at.losses(tokens), at.losses(tokens)) and model.training
    model.eval()
    assert torch.allclose(at(tokens), _plain_read(at, tokens), atol=1e-5)
    sae = _sae(at.d_in)
    e = evaluate(at, sae, _windows(3, vocab=8192))
    want = _plain_losses(at, _tokens(3, vocab=8192), sae).mean()
    assert abs(e.ce_spliced-want) < 1e-4
    text = steer(at, sae, tok, 2, 3., n_tokens=5)
    assert text.before == steer(at, sae, tok, 2, 3., n_tokens=5).before
    if kind == 'gemma2':
        with pytest.raises(ValueError, match='norms after its layers'): logit_weights(at, torch.zeros(1, 48))
    else: assert logit_weights(at, torch.eye(at.d_in)[:2]).shape == (2, 8192)


def test_half_precision_models_are_measured_in_float32():
    model = _native().to(torch.bfloat16)
    at, w = at_hook(model, 'blocks.1.mlp.hook_post'), _windows()
    assert at(w.ids()).dtype == torch.float32
    sae = _sae(48)
    e = evaluate(at, sae, w)
    assert e.ce_clean > 0 and np.isfinite([e.fvu.value, e.recovered.value]).all()
    same = at.losses(w.ids(), lambda x: x)
    assert torch.equal(same, at.losses(w.ids()))


@pytest.mark.parametrize('hook,what', [('blocks.0.attn.hook_pattern', r'\(2, 4, 3, 3\)'),
                                       ('blocks.9.mlp.hook_post', 'blocks.9')])
def test_points_without_activations_are_refused(hook, what):
    with pytest.raises(ValueError, match=what): at_hook(_native(), hook)


def test_a_pattern_with_as_many_heads_as_positions_is_not_taken_for_activations():
    for heads in (2, 3):
        model = _native(n_heads=heads, d_head=8)
        with pytest.raises(ValueError, match='hook_pattern'): at_hook(model, 'blocks.0.attn.hook_pattern')


def test_a_stranger_is_not_taken_for_ours():
    with pytest.raises(ValueError, match='name it'): at_hook(_native())
    for other in (dict(n_layers=1), dict(n_layers=1, act_fn='relu', attn_scale=3.),
                  dict(n_layers=1, act_fn='relu', gated_mlp=True)):
        at = at_hook(_native(**other), 'blocks.0.mlp.hook_post')
        tokens = _tokens()
        assert torch.allclose(at(tokens), _plain_read(at, tokens), atol=1e-5), other
    assert type(at_hook(_native(n_layers=1, act_fn='relu'))) is NeuronModel  # this one is
    for f in (mlp_acts, final_resid, loss_nats, lambda m, t: neurons_of(m).read(t)):
        with pytest.raises(ValueError, match='at_hook'): f(_native(), _tokens())


def test_ours_is_measured_alike_both_ways():
    model = build_transformer(TransformerConfig(d_vocab=VOCAB, d_model=32, n_heads=2, d_mlp=48, n_ctx=CTX), 'cpu')
    with torch.no_grad():
        for p in model.parameters(): p += .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    fast, general, sae, w = at_hook(model), HookedModel(model, 'blocks.0.mlp.hook_post'), _sae(48), _windows()
    a, b = evaluate(fast, sae, w), evaluate(general, sae, w)
    for k in ('l0', 'fvu', 'recovered', 'recovered_mean'): assert np.isclose(getattr(a, k).value, getattr(b, k).value, atol=1e-4)
    assert a.ce_spliced == pytest.approx(b.ce_spliced, abs=1e-5)
    assert torch.allclose(logit_weights(fast, torch.eye(48)), logit_weights(general, torch.eye(48)))


def test_long_windows_and_foreign_ids_are_named_everywhere():
    at, sae = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48)
    long, foreign = _windows(pos=CTX+1), _windows(vocab=5*VOCAB)
    for w, what in ((long, "at most the model's 24"), (foreign, 'token ids')):
        for f in (lambda: at(w.ids()), lambda: at.losses(w.ids()), lambda: evaluate(at, sae, w), lambda: feature_stats(at, sae, w),
                  lambda: ActivationStream(at, w, StreamConfig(batch=8, per_window=4)), lambda: next(feature_pass(at, sae, w))):
            with pytest.raises(ValueError, match=what): f()


def test_dictionary_and_model_know_that_they_belong_together(tmp_path):
    at, other = at_hook(_native(), 'blocks.1.mlp.hook_post'), at_hook(_native(seed=5), 'blocks.1.mlp.hook_post')
    w = _windows(40)
    stream = ActivationStream(at, w, StreamConfig(batch=64, per_window=16))
    sae = train_sae(stream, SAEConfig(48, 64, l1=.1)).sae
    assert sae.origin == dict(model=at.hash, hook=at.hook, tokenizer=None)
    sae = load_sae(save_sae(sae, tmp_path/'s'), 'cpu')
    assert evaluate(at.model, sae, w).n_tokens == w.n_tokens  # the hook point is the dictionary's own
    assert restrict(sae, [1, 2]).origin == sae.origin
    for f in (lambda: evaluate(other, sae, w), lambda: feature_stats(other, sae, w), lambda: features_of(other, sae)):
        with pytest.raises(ValueError, match='a dictionary of the model'): f()
    with pytest.raises(ValueError, match='hook point'): evaluate(at_hook(at.model, 'blocks.0.mlp.hook_post'), sae, w)
    with torch.no_grad(): next(iter(at.model.parameters()))[0, 0] += 1e-3  # one weight
    with pytest.raises(ValueError, match='a dictionary of the model'): evaluate(at, sae, w)


def test_a_text_knows_its_tokenizer(tok):
    model = build_transformer(TransformerConfig(d_model=32, n_heads=2, d_mlp=48, n_ctx=CTX), 'cpu')
    mine, theirs = (windows_from_ids(_tokens().numpy(), tokenizer=h) for h in ('aaa', 'bbb'))
    model.tokenizer_hash = 'aaa'
    assert fitting(model, windows=mine)
    with pytest.raises(ValueError, match='bbb'): evaluate(model, _sae(48), theirs)
    with pytest.raises(ValueError, match='tokenizer'): sample(model, tok, 'x', 2)


def test_every_weight_counts_in_the_hash():
    model = _native()
    h = weights_hash(model)
    assert h == weights_hash(_native()) and len(h) == 12
    for p in model.parameters():
        with torch.no_grad(): p.view(-1)[-1] += 1e-3
        assert weights_hash(model) != h
        h = weights_hash(model)


def test_left_out_tokens_leave_no_trace():
    at, sae, w = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48), _windows()
    tokens, skip = w.ids(), [3, int(w.tokens[0, 0]), int(w.tokens[2, 7])]
    keep = ~torch.isin(tokens, torch.tensor(skip))
    assert 0 < (~keep).sum() < keep.sum() and torch.equal(kept(tokens, skip), keep)
    with torch.no_grad():
        x = _plain_read(at, tokens)
        f = sae.encode(x[keep])
        mean = x[keep].mean(0)
        spliced = _plain_losses(at, tokens, lambda x: torch.where(keep[..., None], sae(x), x))[keep[:, :-1]].mean()
        clean = _plain_losses(at, tokens, lambda x: x)[keep[:, :-1]].mean()
    e = evaluate(at, sae, w, skip_tokens=skip)
    assert torch.allclose(mean_acts(at, w, skip, batch=2), mean, atol=1e-5)
    assert e.n_tokens == keep.sum() and np.isclose(e.l0.value, (f > 0).sum(1).float().mean())
    assert np.allclose(e.density, (f > 0).float().mean(0))
    assert np.isclose(e.fvu.value, ((x[keep]-sae(x[keep])).square().sum()/(x[keep]-mean).square().sum()).detach(), rtol=1e-4)
    assert abs(e.ce_spliced-spliced) < 1e-5 and abs(e.ce_clean-clean) < 1e-5
    s = feature_stats(at, sae, w, k=3, skip_tokens=skip)
    assert s.n_tokens == keep.sum() and np.allclose(s.max_act, f.amax(0), atol=1e-5)
    flat, at_top = keep.flatten().numpy(), s.top[s.top >= 0]
    assert flat[at_top].all()
    stream = ActivationStream(lambda t: t[..., None].float(), w, StreamConfig(batch=1, per_window=CTX, skip_tokens=tuple(skip), passes=2))
    got = torch.cat(list(stream)).flatten().long()
    assert len(stream) == len(got) == 2*int(keep.sum()) and not torch.isin(got, torch.tensor(skip)).any()
    assert torch.equal(got[:len(got)//2].sort()[0], tokens[keep].sort()[0])
    with pytest.raises(ValueError, match='leave out fewer'): mean_acts(at, w, range(VOCAB))


def test_an_edit_at_some_positions_leaves_the_others():
    x, keep = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    y = only_at(lambda x: x+1, keep)(x)
    assert torch.equal(y[keep], x[keep]+1) and torch.equal(y[~keep], x[~keep]) and only_at(None, keep) is None


def test_prompts_begin_after_the_mark(tok):
    assert text_ids(tok, 'a <|endoftext|>')[0] == tok.token_to_id('<|endoftext|>') == 0
    assert 0 not in text_ids(tok, 'a <|endoftext|>')[1:] and text_ids(tok, '') == [0]


def test_constant_activations_have_no_variance_to_explain():
    at, w, sae = at_hook(_native(), 'blocks.1.mlp.hook_post'), _windows(), _sae(48)
    class Constant(HookedModel):
        def __call__(self, tokens): return torch.ones(*tokens.shape, 48)*.3
    e = evaluate(Constant(at.model, at.hook), sae, w)
    assert np.isnan(e.fvu.value) and np.isfinite(e.l0.value)


def test_numbers_do_not_depend_on_grad_mode():
    "Outside `no_grad`, under the type checks, as a user calls it; and a pass leaves the caller's mode alone."
    at, sae, w = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48), _windows()
    assert torch.is_grad_enabled() and feature_stats(at, sae, w).n_tokens == w.n_tokens
    for s in feature_pass(at, sae, w):
        assert torch.is_grad_enabled() and not s.acts.requires_grad


def test_a_model_at_a_hook_point_knows_that_it_was_trained_on():
    "Fused steps leave no trace in a tensor's version."
    at = at_hook(_native(), 'blocks.1.mlp.hook_post')
    before = at.hash
    opt = torch.optim.AdamW(at.model.parameters(), fused=True)
    at.model(_tokens(), return_type='loss').backward()
    opt.step()
    at.model.tokenizer_hash = 'later'
    assert at.hash == weights_hash(at.model) != before and at.origin['tokenizer'] == 'later'


def test_strangers_are_held_to_the_tokenizer_of_the_text_they_were_read_on(tok):
    at = at_hook(_native(d_vocab=8192), 'blocks.1.mlp.hook_post')
    mine, theirs = (windows_from_ids(_tokens(20).numpy(), tokenizer=h) for h in ('aaa', 'bbb'))
    sae = train_sae(ActivationStream(at, mine, StreamConfig(batch=64, per_window=16)), SAEConfig(48, 64, l1=.1)).sae
    assert sae.origin['tokenizer'] == 'aaa' and evaluate(at, sae, mine)
    with pytest.raises(ValueError, match='bbb'): evaluate(at, sae, theirs)
    with pytest.raises(ValueError, match='the tokenizer'): examples(at, sae, tok, mine, feature_stats(at, sae, mine), 0)


def test_ids_to_leave_out_may_come_from_anywhere():
    at, sae, w = at_hook(_native(), 'blocks.1.mlp.hook_post'), _sae(48), _windows()
    want = evaluate(at, sae, w, batch=2, skip_tokens=list(range(100)))
    for skip in ((i for i in range(100)), map(int, range(100)), np.arange(100), set(range(100))):
        got = evaluate(at, sae, w, batch=2, skip_tokens=skip)
        assert got.n_tokens == want.n_tokens < w.n_tokens and got.ce_spliced == want.ce_spliced
    assert feature_stats(at, sae, w, skip_tokens=(i for i in range(100))).n_tokens == want.n_tokens
    assert evaluate(at, sae, w, skip_tokens=3).n_tokens == (w.tokens != 3).sum()
    with pytest.raises(ValueError, match='skip_tokens'): evaluate(at, sae, w, skip_tokens=[None])


def test_our_own_model_in_bfloat16_and_very_short_ones_are_read():
    model = build_transformer(TransformerConfig(d_vocab=VOCAB, d_model=32, n_heads=2, d_mlp=48, n_ctx=CTX), 'cpu').bfloat16()
    at = at_hook(model)
    assert type(at) is HookedModel and at(_tokens()).dtype == torch.float32 and evaluate(at, _sae(48), _windows()).ce_clean > 0
    assert at_hook(_native(n_ctx=2), 'blocks.0.mlp.hook_post').d_in == 48


def test_a_dictionary_of_another_type_is_refused():
    at = at_hook(_native(), 'blocks.1.mlp.hook_post')
    with pytest.raises(ValueError, match='float32 on the same device'): evaluate(at, _sae(48).bfloat16(), _windows())


def test_correlations_keep_their_digits_far_from_zero():
    class Far(HookedModel):
        def __call__(self, tokens): return 1000+torch.stack([(tokens % 5).float(), (tokens % 2).float()], -1)
        def __init__(self, at): self.__dict__.update(at.__dict__, d_in=2)
    at, w = Far(at_hook(_native(), 'blocks.1.mlp.hook_post')), _windows(40)
    sae = _sae(2)
    target = (w.tokens % 5 > 2)
    r = correlate(at, sae, w, target[None], np.ones_like(target)).neurons[0]
    assert np.allclose(r, [np.corrcoef((w.tokens % k).ravel(), target.ravel())[0, 1] for k in (5, 2)], atol=1e-5)
