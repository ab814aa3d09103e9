"The script for GPUs: the whole of it on a CPU at a tiny size, stopped by its budget and gone on from; what it refuses."
import json, os, sys
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault('TRITON_INTERPRET', '1')
needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='the package triton is not installed: measurements of benchmarks/gpu.py are untested here')
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def gpu(root):
    sys.path.insert(0, str(root/'benchmarks'))
    import gpu
    sys.path.remove(str(root/'benchmarks'))
    gpu.streams = lru_cache(gpu.streams)  # one text for all tests
    return gpu


@pytest.fixture
def trial(gpu, monkeypatch):
    "Runs that are about something else than kernels: nothing is measured, the dense way is the best, and triton is not asked for."
    rates = dict(float32=1., tf32=None, bf16=4., fp8=None)
    measured = dict(card=gpu.card(CPU), peak_tflops=rates, product_tflops=rates, steps=[dict(l0=2., best='dense')], saelens=dict(skipped='not here'))
    monkeypatch.setattr(gpu, 'measure', lambda plan, x, say: measured)
    monkeypatch.setattr(gpu, 'find_spec', lambda name: True)


def slow_clock(gpu, monkeypatch, stop_at):
    "The budget is spent at a step, not at a time."
    old = gpu.Budget.__call__
    def call(self, state):
        self.until = -1. if state.step >= stop_at else float('inf')
        old(self, state)
    monkeypatch.setattr(gpu.Budget, '__call__', call)


def test_no_gpu_is_said_before_anything_long(gpu, tmp_path):
    if torch.cuda.is_available(): pytest.skip('there is one')
    with pytest.raises(SystemExit, match='expected a CUDA device; run this on a machine with an NVIDIA card .* or try its logic with --tiny'):
        gpu.main(['--out', str(tmp_path/'out'), '--work', str(tmp_path/'work')])
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('change, message', [(dict(n_feats=20_000), 'below 16 MiB'), (dict(pool=4096), 'the first resampling after'), (dict(samples=64, at=(.01,)), 'different steps')])
def test_impossible_plans_are_refused_at_once(gpu, trial, tmp_path, change, message):
    with pytest.raises(ValueError, match=message): gpu.look_ahead(replace(gpu.TINY, **change), CPU, tmp_path/'out', tmp_path/'work', True)


def test_what_is_missing_and_a_file_in_the_way_are_named(gpu, trial, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'corpus_name', lambda name: 'mini')
    with pytest.raises(FileNotFoundError, match='no folder data/ for the corpus'): gpu.look_ahead(replace(gpu.TINY, corpus='core'), CPU, tmp_path/'out', tmp_path/'work', True)
    (tmp_path/'out').write_text('a file')
    with pytest.raises(OSError, match='choose a writable output folder'): gpu.look_ahead(gpu.TINY, CPU, tmp_path/'out', tmp_path/'work', True)
    monkeypatch.setattr(gpu, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='without the package triton; .* `pip install triton`'): gpu.look_ahead(gpu.TINY, CPU, tmp_path/'out', tmp_path/'work', True)


@needs_triton
def test_kernels_that_are_wrong_on_a_card_are_not_trained_with(gpu, monkeypatch):
    assert max(gpu.check_kernels(CPU).values()) < 1e-5
    monkeypatch.setitem(gpu.WAYS, 'sparse', lambda sae, x, l1: (out := gpu.dense_gradients(sae, x, l1))._replace(W_dec=out.W_dec*1.01))
    with pytest.raises(ArithmeticError, match="off by the way 'sparse'"): gpu.check_kernels(CPU)


def test_the_way_follows_the_measurement(gpu):
    def way(*best):
        l0 = 20, 100, 400
        return gpu.way_of(dict(steps=[dict(l0=l, best=b) for l,b in zip(l0, best)]), 4000)()
    assert way('dense', 'dense', 'dense').high == 0
    some = way('screened', 'screened', 'dense')
    assert (some.low, some.high) == (100/4000, 125/4000) and some.way is gpu.WAYS['screened']
    assert way('sparse', 'dense', 'dense').way is gpu.WAYS['sparse']


def test_density_is_what_was_asked(gpu):
    sae = gpu.SAE(gpu.SAEConfig(16, 64, start='random')).requires_grad_(False)
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    gpu.at_density(sae, x, 5)
    assert abs(float((sae.encode(x) > 0).sum()/100)-5) < .05


def test_everything_then_on_another_machine(gpu, trial, tmp_path, monkeypatch):
    "Stopped after 7 of 24 steps, gone on from the parts in the output folder, the weights are those of a run without a stop, to the bit."
    monkeypatch.setattr(gpu, 'PART', 100_000)
    said, plan = [], gpu.TINY
    go = lambda out, work: gpu.run(plan, tmp_path/out, tmp_path/work, 60., CPU, True, said.append)
    with monkeypatch.context() as m:
        slow_clock(gpu, m, 7)
        first = go('out', 'work')
    assert first['training']['samples'] == 7*16 and not first['training']['finished'] and first['training']['of'] == plan.samples
    assert len(list((tmp_path/'out/state').glob('part-*'))) > 2
    second, whole = go('out', 'elsewhere'), go('out2', 'work2')
    assert any('goes on from the state in' in l for l in said) and any('used again from' in l for l in said) and 'finished' in said[-1]
    a, b = (load_file(tmp_path/out/'A-1/weights.safetensors') for out in ('out', 'out2'))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == torch.float16 for k in a)
    assert second['training']['finished'] and [s['to'] for s in second['training']['sessions']] == [7*16, 24*16]
    assert second['training']['held_out'] == whole['training']['held_out'] and len(second['training']['resampled']) == 2
    on_disk = json.loads((tmp_path/'out/gpu.json').read_text())
    assert on_disk['training']['samples'] == plan.samples and json.loads((tmp_path/'out/A-1/run.json').read_text())['vectors'] == plan.samples
    third = go('out', 'elsewhere')  # nothing left to do: the same results, no new session
    assert len(third['training']['sessions']) == 2 and third['training']['finished']
    assert max(p.stat().st_size for p in (tmp_path/'out').rglob('*') if p.is_file()) <= gpu.LARGEST


@needs_triton
def test_everything_is_measured(gpu, tmp_path):
    "In the interpreter: the numbers mean nothing, but all are there."
    sae_in = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    said = []
    found = gpu.measure(gpu.TINY, sae_in, said.append)
    row = found['steps'][0]
    assert set(row['seconds']) == set(gpu.WAYS) and row['l0'] == pytest.approx(2, abs=.1) and row['candidates']['bf16'] >= row['l0'] and row['best'] in gpu.WAYS
    assert found['peak_tflops']['bf16'] > 0 and ('fp8' in found['product_tflops']) and json.dumps(found)
    assert 'seconds' in found['saelens'] or any('SAELens left out' in l and 'MONOSEM_PEERS' in l for l in said)


def test_a_budget_without_time_to_train_says_so(gpu, trial, tmp_path):
    with pytest.raises(TimeoutError, match='spent before training; expected some for training'): gpu.run(gpu.TINY, tmp_path/'out', tmp_path/'work', 0., CPU, True, lambda line: None)
