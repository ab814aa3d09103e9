"The Triton kernels: exact against float64, in the interpreter or on a GPU; compiled for GPUs that are not there; clear words where Triton is missing."
import os, subprocess, sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from monosem.core import make_generator
from monosem.gpu_kernels import _candidates, _kernels, _positive_entries, _screened_entries, sparse_gradients_gpu
from monosem.kernels import DensitySwitch, dense_gradients, exact_loss
from monosem.sae import SAE, SAEConfig, sae_loss

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if DEVICE == 'cpu': os.environ.setdefault('TRITON_INTERPRET', '1')  # read when triton is first imported, and at the kernels' first use
needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='the package triton is not installed: sparse_gradients_gpu is untested here')


def example(d_in, n_feats, batch, shift, seed=0):
    sae, gen = SAE(SAEConfig(d_in=d_in, n_feats=n_feats, seed=seed, start='random')), make_generator(seed)
    sae.b_enc.data += shift+.1*torch.randn(n_feats, generator=gen)
    sae.b_dec.data += .3*torch.randn(d_in, generator=gen)
    return sae.to(DEVICE), torch.randn(batch, d_in, generator=gen).to(DEVICE)


def autograd(sae, x, l1):
    "Loss, active features and gradients by automatic differentiation in float64."
    exact = SAE(sae.cfg).to(DEVICE, torch.float64)
    exact.load_state_dict(sae.state_dict())
    f = exact.encode(x.double())
    loss = sae_loss(x.double(), exact.decode(f), f, l1)
    loss.total.backward()
    return loss, f.detach() > 0, {k: p.grad for k,p in exact.named_parameters()}


def worst_error(ours, grads):
    assert all(getattr(ours, k).shape == v.shape and getattr(ours, k).dtype == torch.float32 for k,v in grads.items())
    return max(float((getattr(ours, k)-v).norm()/v.norm().clamp_min(1e-30)) for k,v in grads.items())


def compare(sae, x, l1, **kw):
    loss, on, grads = autograd(sae, x, l1)
    ours = sparse_gradients_gpu(sae, x, l1, **kw)
    assert torch.equal(ours.fired, on.sum(0))
    for a,b in zip(ours.loss, loss): assert a.shape == () and a.dtype == torch.float32 and torch.isclose(a.double(), b.detach().double(), rtol=1e-5, atol=1e-5)
    assert worst_error(ours, grads) < max(1e-5, 10*worst_error(dense_gradients(sae, x, l1), grads))  # float32 keeps 6e-8; where terms cancel, the dense way loses as much


@needs_triton
@pytest.mark.parametrize('d_in, n_feats, batch, shift', [(24, 60, 40, 0.), (24, 60, 40, -1.), (7, 5, 3, -100.), (16, 24, 70, 100.), (33, 40, 1, -.3), (1, 1, 1, 0.),
                                                         (128, 20, 20, -1.), (129, 20, 20, -1.), (300, 20, 20, -1.), (600, 9, 9, 100.), (4200, 3, 3, 0.)])
def test_gradients_equal_automatic_differentiation(d_in, n_feats, batch, shift):
    compare(*example(d_in, n_feats, batch, shift), .3)


@needs_triton
@pytest.mark.parametrize('tile', [None, 1])
def test_gradients_by_hand(tile):
    "Two vectors, three features; one pre-activation is exactly 0, so it does not fire. The input may want a gradient, and gets none."
    sae, x = SAE(SAEConfig(d_in=2, n_feats=3)), torch.tensor([[3., 1.], [1., 2.]], requires_grad=True)
    weights = dict(W_enc=[[1., -1, 0], [0, 1, 2]], b_enc=[0., 0, -1], W_dec=[[1., 0], [0, 1], [-1, 0]], b_dec=[1., 0])
    sae.load_state_dict({k: torch.tensor(v) for k,v in weights.items()})
    out = sparse_gradients_gpu(sae.to(DEVICE), x.to(DEVICE), .5, tile)
    assert [v.item() for v in out.loss] == [7.5, 5.5, 4., 2.] and out.fired.tolist() == [1, 1, 2]
    assert {k: getattr(out, k).tolist() for k in weights} == dict(
        W_enc=[[-1.5, 0, 2.5], [-.75, .5, 7.75]], b_enc=[-.75, .25, 4.5], W_dec=[[-2, -2], [-6, 0], [-10, -1]], b_dec=[-3, -10.25])


@needs_triton
@settings(max_examples=20, deadline=None)
@given(d_in=st.integers(1, 150), n_feats=st.integers(1, 24), batch=st.integers(1, 40), shift=st.floats(-2, 1), l1=st.floats(0, 10), tile=st.integers(1, 50), seed=st.integers(0, 999))
def test_gradients_of_any_shape(d_in, n_feats, batch, shift, l1, tile, seed):
    sae, x = example(d_in, n_feats, batch, shift, seed)
    assume(torch.equal(sae.encode(x) > 0, autograd(sae, x, l1)[1]))  # no entry so near zero that rounding decides
    compare(sae, x, l1, tile=tile)


@needs_triton
@pytest.mark.parametrize('d_in, n_feats, batch, shift', [(24, 60, 40, 0.), (24, 60, 40, -1.), (7, 5, 3, -100.), (16, 24, 70, 100.), (1, 1, 1, 0.), (129, 1030, 3, -1.),
                                                         (600, 9, 9, 100.)])
def test_screened_gradients_equal_automatic_differentiation(d_in, n_feats, batch, shift):
    compare(*example(d_in, n_feats, batch, shift), .3, screen='bfloat16')


def same_entries(sae, x, tile):
    plain, screened = _positive_entries(sae, x, tile), _screened_entries(sae, x, tile)
    assert torch.equal(plain.row, screened.row) and torch.equal(plain.index, screened.index) and (screened.value > 0).all()
    assert torch.allclose(plain.value, screened.value, rtol=1e-4, atol=1e-5)


@needs_triton
def test_screening_of_dead_features_empty_vectors_and_silence():
    "A feature without weights and bias is never a candidate, nor is anything of a vector of zeros below its bias; exactly 0 does not fire."
    sae, x = example(24, 40, 30, -.5)
    sae.requires_grad_(False)
    sae.b_dec.zero_()
    sae.W_enc[:, :5], sae.b_enc[:5], sae.b_enc[5] = 0., 0., 0.
    x[:4] = 0.
    x[4] = sae.W_enc[:, 6]/sae.W_enc[:, 6].norm()
    same_entries(sae, x, 7)
    row, index = _candidates(x, sae.W_enc.T.contiguous(), sae.b_enc, 30)
    assert not (index < 5).any() and (index[row < 4] > 6).sum() == (sae.b_enc[6:] > 0).sum()*4
    sae.b_enc.fill_(-1e6)
    assert len(_screened_entries(sae, x, 7).value) == 0


@needs_triton
@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 200), n_feats=st.integers(1, 24), batch=st.integers(1, 12), tile=st.integers(1, 20), x_scale=st.integers(-70, 50), w_scale=st.integers(-70, 50),
       gap=st.floats(-1, 1), midway=st.booleans(), seed=st.integers(0, 999))
def test_screening_misses_nothing(d_in, n_feats, batch, tile, x_scale, w_scale, gap, midway, seed):
    """Scales from denormal products to huge ones; each feature's pre-activation at one vector is within rounding in bfloat16 of zero.
    With `midway` all numbers lie between two of bfloat16, and all products are rounded down while their sum cancels: the worst that can be.
    Nothing is missed that is positive in float64 by more than float32 rounds, and nothing is kept that is as far below."""
    gen = make_generator(seed)
    up = torch.arange(d_in) % 2 == 1  # to even: 1+3*2^-8 is rounded up, 1+2^-8 down
    unlucky = torch.where(up, 1+3*2.**-8, 1+2.**-8)
    draw = lambda n, sign: unlucky*sign*2.**torch.randint(-2, 3, (n, 1), generator=gen) if midway else torch.randn(n, d_in, generator=gen)
    sae = SAE(SAEConfig(d_in=d_in, n_feats=n_feats, start='random')).requires_grad_(False)
    x, W = draw(batch, 1)*2.**x_scale, draw(n_feats, torch.where(up, -1, 1))*2.**w_scale
    sae.W_enc.copy_(W.T)
    norms = x.double().norm(dim=1)[:, None]*W.double().norm(dim=1)
    dots = x.double()@W.double().T
    near = torch.arange(n_feats) % batch
    at = near, torch.arange(n_feats)
    sae.b_enc.copy_(-dots[at]+gap*2.**-7*norms[at])
    exact, rounding = dots+sae.b_enc.double(), d_in*2.**-22*norms+2.**-23*dots.abs()+2.**-126
    kept = torch.zeros(batch, n_feats, dtype=torch.bool)
    row, index, value = _screened_entries(sae.to(DEVICE), x.to(DEVICE), tile)
    kept[row.cpu(), index.cpu()] = True
    assert not ((exact > rounding) & ~kept).any() and not ((exact < -rounding) & kept).any()
    assert torch.allclose(value.cpu().double(), exact[kept], rtol=1e-5, atol=float(rounding.max()))


@needs_triton
def test_screened_values_have_the_same_bits_in_any_batch_and_tile():
    sae, x = example(129, 60, 50, 0.)
    whole = _screened_entries(sae, x, 50)
    for tile in (1, 7): assert all(torch.equal(a, b) for a,b in zip(whole, _screened_entries(sae, x, tile)))
    for b in (0, 17, 49):
        alone = _screened_entries(sae, x[b:b+1].clone(), 1)
        assert torch.equal(alone.value, whole.value[whole.row == b]) and torch.equal(alone.index, whole.index[whole.row == b])


@needs_triton
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_what_is_not_finite_is_decided_in_float32(value):
    "In an activation or in a weight; 3.4e38 is finite, and infinite in bfloat16."
    sae, x = example(24, 30, 10, 0.)
    sae.requires_grad_(False)
    for spoil in (x[4], sae.W_enc[:, 3]):
        before = spoil[2].clone()
        spoil[2] = value
        plain, screened = _positive_entries(sae, x, 10), _screened_entries(sae, x, 10)
        assert torch.equal(plain.row, screened.row) and torch.equal(plain.index, screened.index)
        spoil[2] = before


def test_other_screens_are_refused():
    sae, x = example(4, 5, 3, 0.)
    with pytest.raises(ValueError, match="screen='int8'; expected None or 'bfloat16'"): sparse_gradients_gpu(sae, x, .3, screen='int8')


@needs_triton
def test_screening_leaves_torch_as_it_was():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    sparse_gradients_gpu(*example(4, 5, 3, 0.), .3, screen='bfloat16')
    assert matmul.allow_bf16_reduced_precision_reduction == before


@needs_triton
def test_layouts_of_the_inputs_do_not_matter():
    sae, x = example(20, 30, 10, -.3)
    a = sparse_gradients_gpu(sae, x, .3)
    sae.W_dec.data = sae.W_dec.data.T.contiguous().T
    sae.W_enc.data = sae.W_enc.data.contiguous()
    b = sparse_gradients_gpu(sae, x.T.contiguous().T, .3)
    assert all(torch.allclose(p, q, atol=1e-6) for p,q in zip(a[1:], b[1:]))
    assert a.W_enc.T.is_contiguous() and a.W_dec.is_contiguous()


@needs_triton
def test_runs_agree_to_the_bit():
    sae, x = example(24, 60, 50, 0.)
    a, b = (sparse_gradients_gpu(sae, x, .3) for _ in range(2))
    assert all(torch.equal(p, q) for p,q in zip([*a.loss, *a[1:]], [*b.loss, *b[1:]]))
    tiled = sparse_gradients_gpu(sae, x, .3, tile=7)
    assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(a[1:], tiled[1:]))


@needs_triton
def test_nan_reaches_the_loss_and_no_other_vector():
    sae, x = example(24, 30, 10, 0.)
    broken = x.clone()
    broken[4, 2] = torch.nan
    ours, rest = sparse_gradients_gpu(sae, broken, .3), sparse_gradients_gpu(sae, x[[0, 1, 2, 3, 5, 6, 7, 8, 9]], .3)
    assert ours.loss.total.isnan() and ours.loss.mse.isnan() and ours.b_dec.isnan().tolist() == [d == 2 for d in range(24)]
    assert torch.equal(ours.fired, rest.fired) and torch.allclose(ours.W_dec*10/9, rest.W_dec, atol=1e-5)
    for value in (torch.inf, -torch.inf):
        broken[4, 2] = value
        assert not sparse_gradients_gpu(sae, broken, .3).loss.total.isfinite()


@needs_triton
def test_switch_and_autograd_function_take_it():
    sae, x = example(24, 60, 40, -1.)
    switch = DensitySwitch(way=sparse_gradients_gpu)
    dense, sparse = (switch(sae, x, .3) for _ in range(2))
    assert switch.sparse and all(torch.allclose(p, q, atol=1e-5) for p,q in zip(dense[2:], sparse[2:]))
    exact_loss(sae, x, .3, sparse_gradients_gpu).backward()
    assert all(torch.equal(p.grad, getattr(sparse, k)) for k,p in sae.named_parameters())


COMPILE = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from monosem.gpu_kernels import _block, _kernels, _screening
decode, weights, interpreted = _kernels()
compare, again = _screening()
assert not interpreted
integers = {'start', 'index', 'row', 'first', 'entry'}
for capability in (80, 90):
    for kernel, d in ((decode, 1), (decode, 24), (decode, 512), (decode, 16384), (weights, 1), (weights, 128), (again, 1), (again, 512), (compare, 512)):
        sizes = dict(BLOCK=1024, num_warps=4) if kernel is compare else _block(d)
        warps = sizes.pop('num_warps')
        fixed = sizes | ({'d_in': 1} if d == 1 and kernel is not compare else {})  # Triton turns an argument equal to 1 into a constant
        names = [p.name for p in kernel.params]
        special = dict(d_in='i32', n='i32', n_feats='i32', rough='*bf16', hit='*i8')
        kind = lambda n: 'constexpr' if n in fixed else special[n] if n in special else 'fp32' if n in ('scale', 'push') else '*i64' if n in integers else '*fp32'
        source = ASTSource(kernel, {n: kind(n) for n in names}, constexprs={(names.index(k),): v for k,v in fixed.items()})
        out = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps))
        assert len(out.asm['cubin']) > 1000 and out.metadata.shared <= 48*1024
'''


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    "What the interpreter forgives, types above all, the compiler does not; it runs without a GPU, in a process without the interpreter."
    env = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_missing_triton_is_named(monkeypatch):
    sae, x = example(4, 5, 3, 0.)
    monkeypatch.setitem(sys.modules, 'triton', None)
    _kernels.cache_clear()
    with pytest.raises(ImportError, match=r'without the package triton; expected .* `pip install triton`.*dense_gradients'): sparse_gradients_gpu(sae, x, .3)
    dense_gradients(sae, x, .3)


def test_import_leaves_triton_alone():
    code = 'import sys, monosem.gpu_kernels; assert "triton" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('spoil', [lambda x: x.double(), lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x[:, :-1], lambda x: x[:0], lambda x: x[0]])
def test_unfit_activations_are_refused(spoil):
    "Whoever refuses first, the function's own check or the shapes of its signature."
    sae, x = example(4, 5, 3, 0.)
    with pytest.raises(Exception, match='expected|Type-check'): sparse_gradients_gpu(sae, spoil(x), .3)


def test_other_types_and_devices_are_refused():
    sae, x = example(4, 5, 3, 0.)
    with pytest.raises(ValueError, match='float64; expected float32'): sparse_gradients_gpu(sae.double(), x.double(), .3)


@needs_triton
def test_cpu_without_the_interpreter_is_refused():
    code = '''
import torch
from monosem.gpu_kernels import sparse_gradients_gpu
from monosem.sae import SAE, SAEConfig
try: sparse_gradients_gpu(SAE(SAEConfig(4, 5)), torch.randn(3, 4), .3)
except ValueError as e: assert 'expected a CUDA device' in str(e), e
else: raise SystemExit('accepted')
'''
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'TRITON_INTERPRET': '0'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
