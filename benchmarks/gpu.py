"""A/1 on a GPU: check the kernels there, measure a step beside the card's own limits and SAELens, then train towards 8.19 billion samples until the time is spent.
Run: python benchmarks/gpu.py --minutes 10 [--out FOLDER]. The same call goes on from where the last one stopped; no file in the output folder is larger than 16 MiB,
and with a copy of that folder it goes on on another machine, too. It needs a CUDA device; `--tiny` goes through all of it on a CPU, in Triton's interpreter, in some minutes."""
import argparse, json, os, shutil, signal, subprocess, sys, time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if '--tiny' in sys.argv: os.environ.setdefault('TRITON_INTERPRET', '1')  # read when triton is first imported

import torch

from monosem.activations import ActivationStream, StreamConfig
from monosem.checkpoints import Checkpoints
from monosem.core import Config, check, content_hash, replacing, run_record, write_json
from monosem.corpus import load_corpus
from monosem.gpu_kernels import _candidates, _positive_entries, _screened_entries, sparse_gradients_gpu
from monosem.hooked import at_hook
from monosem.kernels import DensitySwitch, dense_gradients
from monosem.reproduce import SCALES, corpus_name
from monosem.resampling import Resampler
from monosem.sae import SAE, SAEConfig, load_sae, sae_loss, save_sae
from monosem.tokens import Mixture, load_tokenizer, token_windows
from monosem.training import step, train_sae
from monosem.transformer import load_transformer
from workers.saelens import timed

LARGEST = 16*2**20                 # bytes of a file in the output folder
PART = 15*2**20                    # bytes of a part of the training's state
SAELENS = 'sae-lens==6.54.12'
WAYS = dict(dense=dense_gradients, sparse=sparse_gradients_gpu, screened=partial(sparse_gradients_gpu, screen='bfloat16'))


@dataclass(frozen=True)
class Plan(Config):
    "Sizes of everything; the recipe is the paper's, as in the scale `paper`."
    corpus: str = 'core'          # Text that the shipped model reads
    tokens: int = 7_000_000       # Of it; read again and again, each time at other positions in another order
    held_tokens: int = 100_000    # Validation tokens
    samples: int = 8_192_000_000  # Vectors in all: a million steps
    batch: int = 8192             # Vectors per step
    block: int = 2**19            # Vectors shuffled together
    per_window: int = 250         # Of 256 positions
    n_feats: int = 4096
    pool: int = 16_384            # Inputs that resampling chooses from; part of the state
    at: tuple = SCALES['paper'].resample.at # Shares of the run at which to resample
    window: int = 2_000_000       # Vectors without firing that make a feature dead
    l0: tuple = (20, 50, 100, 200, 400, 800) # Densities at which a step is measured
    square: int = 8192            # Side of the matrices whose product is called the card's peak
    seconds: float = 1.           # Of each measurement
    every_s: float = 60.          # Seconds between checkpoints
    reserve_s: float = 20.        # Kept back for writing the results

    @property
    def n_steps(self): return self.samples//self.batch

    @property
    def recipe(self): return replace(SCALES['paper'].train, log_every=max(1, self.n_steps//1000), dead_window=self.window)

    @property
    def resample(self): return replace(SCALES['paper'].resample, at=self.at, window=self.window, pool=self.pool)


TINY = Plan(corpus='mini', tokens=12_000, held_tokens=3_000, samples=24*16, batch=16, block=2048, n_feats=32, pool=32, at=(.25, .5), window=64,
            l0=(2,), square=64, seconds=0., every_s=3600., reserve_s=0.)


# -- before anything long

def look_ahead(plan, device, out, work, tiny):
    "Refuse now what a later stage would fail at."
    check(tiny or device.type == 'cuda', f'the device {device}', 'a CUDA device', 'run this on a machine with an NVIDIA card and a CUDA build of torch, or try its logic with --tiny')
    check(device.type != 'cuda' or torch.cuda.is_available(), f'a torch {torch.__version__} that sees no CUDA device', 'a CUDA device',
          'run this on a machine with an NVIDIA card and a CUDA build of torch (`nvidia-smi` lists the card), or try its logic with --tiny')
    check(find_spec('triton') is not None, 'a Python without the package triton', 'it, for the sparse kernels', 'run `pip install triton`', ImportError)
    check(corpus_name(plan.corpus) == plan.corpus, f'no folder data/ for the corpus {plan.corpus!r}', 'a checkout of the repository', 'run this from a checkout', FileNotFoundError)
    for folder in (out, work):
        with replacing(folder/'.probe') as tmp: tmp.write_text('is this folder writable?')
        (folder/'.probe').unlink()
    d_in, n = SAEConfig().d_in, plan.n_feats
    Resampler(plan.resample).possible(plan.n_steps, plan.batch)
    state = 4*d_in*(6*n+plan.pool)
    for folder, needed in ((work, 3*state), (out, 2*state)):
        free = shutil.disk_usage(folder).free
        check(free > needed, f'{free/1e9:.2f} GB free on the disk of {folder}', f'{needed/1e9:.2f} GB for checkpoints', 'free some space, or choose another folder', OSError)
    check(4*d_in*n < LARGEST, f'{n:,} features, {4*d_in*n/2**20:.0f} MiB in half precision', 'a dictionary below 16 MiB', 'choose fewer features')
    if device.type == 'cuda':
        free, needed = torch.cuda.mem_get_info(device)[0], 4*d_in*(2*plan.block+plan.pool+12*n)+6*2**29+12*plan.batch*n
        check(free > needed, f'{free/1e9:.1f} GB free on {torch.cuda.get_device_name(device)}', f'{needed/1e9:.1f} GB', 'end other programs on the card, or lower --block')


def check_kernels(device):
    "Sparse and screened gradients against float64, on this device: raises where they differ."
    gen = torch.Generator().manual_seed(0)
    sae, x = SAE(SAEConfig(64, 96, start='random')).requires_grad_(False), torch.randn(40, 64, generator=gen)
    sae.b_enc += .1*torch.randn(96, generator=gen)-.5
    sae, x = sae.to(device), x.to(device)
    exact = SAE(sae.cfg).to(device, torch.float64)
    exact.load_state_dict(sae.state_dict())
    reference, worst = dense_gradients(exact, x.double(), .3), {}
    for name, way in WAYS.items():
        out = way(sae, x, .3)
        worst[name] = max(float((a-b).norm()/b.norm()) for a,b in zip(out[2:], reference[2:]))
        check(worst[name] < 1e-4, f'gradients that are {worst[name]:.1e} off by the way {name!r} on {device}', 'less than 1e-4', 'do not train with it; report the card', ArithmeticError)
    plain, screened = _positive_entries(sae, x, 40), _screened_entries(sae, x, 40)
    check(len(plain.value) == len(screened.value), f'{len(screened.value)} screened entries of {len(plain.value)}', 'all', 'report the card', ArithmeticError)
    return worst


# -- what is measured

def card(device):
    "The device."
    if device.type != 'cuda': return dict(name=f'no GPU: {device}, the interpreter', memory_gb=None, capability=None)
    p = torch.cuda.get_device_properties(device)
    return dict(name=p.name, memory_gb=round(p.total_memory/1e9, 1), capability=f'{p.major}.{p.minor}', processors=p.multi_processor_count, cuda=torch.version.cuda)


def fp8_product(a, b):
    "A product in eight bits by torch's own function; each row of `a` and of `b` with a scale."
    f8 = torch.float8_e4m3fn
    scaled = [((m/(s := m.abs().amax(1, keepdim=True)/448)).to(f8), s.float()) for m in (a, b)]
    (qa, sa), (qb, sb) = scaled
    return lambda: torch._scaled_mm(qa, qb.T, scale_a=sa, scale_b=sb.T.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=False)


def product_rates(shape, device, enough):
    "TFLOP/s of one product (m, k) by (k, n): float32, TF32, bf16, fp8 where the card has it."
    (m, k, n), matmul = shape, torch.backends.cuda.matmul
    a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    def rate(f): return round(2*m*k*n/timed(f, device, enough)/1e12, 3)
    def in_tf32(allow):
        before, matmul.allow_tf32 = matmul.allow_tf32, allow
        try: return rate(lambda: a@b.T)
        finally: matmul.allow_tf32 = before
    a16, b16 = a.bfloat16(), b.bfloat16()
    rates = dict(float32=in_tf32(False), tf32=in_tf32(True) if device.type == 'cuda' else None, bf16=rate(lambda: a16@b16.T))
    try: return rates | dict(fp8=rate(fp8_product(a, b)))
    except (RuntimeError, NotImplementedError, ValueError) as e: return rates | dict(fp8=None, why_no_fp8=str(e).strip().splitlines()[0][:200])


def at_density(sae, x, l0):
    "Shift the encoder's bias so that a vector of the batch has l0 active features on average."
    rows = x[:256]
    pre = ((rows-sae.b_dec)@sae.W_enc+sae.b_enc).flatten()
    sae.b_enc -= pre.kthvalue(round(len(pre)*(1-l0/sae.cfg.n_feats))).values


def saelens_steps(plan, device, d_in):
    "Seconds of SAELens' step on the same device, in float32 and with its mixed precision; or why not."
    home = os.environ.get('MONOSEM_PEERS')
    python = Path(home)/'bin/python' if home else sys.executable
    how = dict(capture_output=True, text=True, env=os.environ | dict(TQDM_DISABLE='1', WANDB_MODE='disabled', HF_HUB_OFFLINE='1'))
    sizes = map(str, (device, plan.batch, d_in, plan.n_feats, plan.seconds))
    try: done = subprocess.run([python, Path(__file__).parent/'workers/saelens.py', *sizes], **how, timeout=60+20*plan.seconds)
    except (OSError, subprocess.TimeoutExpired) as e: return dict(skipped=f'SAELens left out: {e}')
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    why = (done.stderr.strip().splitlines() or ['no message'])[-1]
    return dict(skipped=f'SAELens left out: {python} cannot run it ({why}); name a virtual environment with {SAELENS} and torch for CUDA in $MONOSEM_PEERS to have it')


@torch.no_grad()
def eight_bit_candidates(x, W, bias):
    "How many entries a bound on rounding to eight bits leaves, sums taken as exact; per vector."
    def rounded(m):
        scale = m.abs().amax(1, keepdim=True).clamp_min(1e-30)/448
        return (m/scale).to(torch.float8_e4m3fn).float()*scale
    x8, W8 = rounded(x), rounded(W)
    bound = 1.01*(torch.outer((x-x8).norm(dim=1), W8.norm(dim=1))+torch.outer(x.norm(dim=1), (W-W8).norm(dim=1)))
    return float((x8@W8.T+bias+bound > 0).sum()/len(x))


def measure(plan, x, say):
    "The card, its products, a step at several densities by each way, SAELens beside it."
    device, (batch, d_in), n = x.device, x.shape, plan.n_feats
    found = dict(card=card(device), torch=torch.__version__, off_float64=check_kernels(device))
    found['peak_tflops'] = product_rates((plan.square,)*3, device, plan.seconds)
    found['product_tflops'] = product_rates((batch, d_in, n), device, plan.seconds)
    say(f'[measure] {found["card"]["name"]}: TFLOP/s of products {found["peak_tflops"]}')
    sae = load_sae('A/1', device) if n == 4096 else SAE(SAEConfig(d_in, n)).to(device)
    sae.requires_grad_(False)
    found['steps'], product = [], 2*batch*d_in*n
    for l0 in plan.l0:
        at_density(sae, x, l0)
        W, bias, rows = sae.W_enc.T.contiguous(), sae.b_enc-sae.b_dec@sae.W_enc, x[:256]
        candidates = dict(bf16=len(_candidates(rows, W, bias, 256)[0])/len(rows), fp8=eight_bit_candidates(rows, W, bias))
        for p in sae.parameters(): p.requires_grad_(True)
        opt = torch.optim.Adam(sae.parameters(), lr=1e-12, fused=True)
        seconds = {name: timed(lambda: step(sae, opt, x, 2.5, way), device, plan.seconds) for name,way in WAYS.items()}
        measured_l0 = float(dense_gradients(sae, x, 2.5).loss.l0)
        sae.requires_grad_(False)
        best = min(seconds, key=seconds.get)
        found['steps'].append(dict(l0=round(measured_l0, 1), seconds=seconds, best=best, samples_per_s=round(batch/seconds[best]), candidates=candidates,
                                   share_of_bf16_peak=product/seconds[best]/1e12/found['peak_tflops']['bf16'],
                                   share_of_float32_peak=product/seconds[best]/1e12/found['peak_tflops']['float32']))
        say(f'[measure] L0 {measured_l0:.1f}: '+', '.join(f'{k} {1e3*s:.2f} ms' for k,s in seconds.items())+f'; {batch/seconds[best]:,.0f} samples/s, candidates {candidates}')
    found['saelens'] = saelens_steps(plan, device, d_in)
    if 'skipped' in found['saelens']: say(f'[measure] {found["saelens"]["skipped"]}')
    else:
        ours = min(found['steps'][0]['seconds'].values())
        found['saelens']['times_ours'] = {k: s/ours for k,s in found['saelens']['seconds'].items()}
        say(f'[measure] SAELens takes {found["saelens"]["times_ours"]} times as long as our step at L0 {found["steps"][0]["l0"]}')
    return found


def way_of(found, n_feats):
    "A switch with the thresholds that this card's measurements suggest: sparse up to the densest step at which that was faster."
    sparser = [s for s in found['steps'] if s['best'] != 'dense']
    if not sparser: return lambda: DensitySwitch(0., 0.)
    low, names = max(s['l0'] for s in sparser)/n_feats, [s['best'] for s in sparser]
    way = WAYS[max(set(names), key=names.count)]
    return lambda: DensitySwitch(min(low, 1.), min(1.25*low, 1.), way)


# -- the training

class Budget:
    "A callback that stops the training when the time is spent, by the signal that makes it keep a checkpoint."
    def __init__(self, seconds): self.until, self.spent, self.first, self.state = time.monotonic()+seconds, False, None, None

    def __call__(self, state):
        now = time.monotonic()
        self.state, self.last = state, (state.vectors, now)
        self.first = self.first or self.last
        if now > self.until and not self.spent and state.step < state.n_steps:
            self.spent = True
            signal.raise_signal(signal.SIGINT)

    def session(self):
        "What this call did, and its rate after the first step: harvesting, training, checkpoints."
        (v0, t0), (v1, t1) = self.first, self.last
        return dict(to=v1, seconds=round(t1-t0, 1), samples_per_s=round((v1-v0)/(t1-t0)) if t1 > t0 else None)


def train(plan, stream, work, seconds, way, device):
    "As far as the time goes: the dictionary, its log, what was resampled, the session."
    budget, resampler = Budget(seconds), Resampler(plan.resample)
    kept = Checkpoints(work/f'checkpoints-{plan.hash()}', every_s=plan.every_s)
    sae_cfg = replace(SCALES['paper'].sae, n_feats=plan.n_feats, start='transposed')
    try: sae, log = train_sae(stream, sae_cfg, plan.recipe, [resampler, budget], device, 'A/1', kept, way)[:2]
    except KeyboardInterrupt:
        if not budget.spent: raise
        sae, log = budget.state.sae, budget.state.metrics
    return sae.requires_grad_(False), log, resampler.history, budget.session() if budget.state else None


def pack(work, plan, out):
    "The newest checkpoint as parts of at most 15 MiB, for another machine."
    newest = max((work/f'checkpoints-{plan.hash()}').glob('step-*'))
    with replacing(out/'state') as tmp:
        tmp.mkdir()
        shutil.copy(newest/'state.json', tmp/'state.json')
        with open(newest/'state.safetensors', 'rb') as f:
            for i, part in enumerate(iter(lambda: f.read(PART), b'')): (tmp/f'part-{i:03d}').write_bytes(part)


def unpack(work, plan, out, say):
    "Put a packed checkpoint where the training looks for one, unless there is one that is as new."
    head, folder = out/'state/state.json', work/f'checkpoints-{plan.hash()}'
    if not head.is_file(): return
    target = folder/f'step-{json.loads(head.read_text())["step"]:09d}'
    if any(p.name >= target.name for p in folder.glob('step-*')): return
    with replacing(target) as tmp:
        tmp.mkdir()
        shutil.copy(head, tmp/'state.json')
        with open(tmp/'state.safetensors', 'wb') as f:
            for part in sorted((out/'state').glob('part-*')): f.write(part.read_bytes())
    say(f'[train] goes on from the state in {out/"state"}')


# -- the whole

@torch.no_grad()
def held_out(sae, x):
    "Loss and its parts on held-out vectors; FVU."
    f = sae.encode(x)
    loss = sae_loss(x, sae.decode(f), f, sae.cfg.l1)
    parts = {k: float(v) for k,v in loss._asdict().items()}
    return parts | dict(fvu=parts['mse']/float((x-x.mean(0)).square().sum(-1).mean()))


def streams(plan, device):
    "Activations of the shipped model: the stream to train on, and a batch of held-out ones."
    corpus, tok, at = load_corpus(plan.corpus), load_tokenizer(), at_hook(load_transformer(device=device))
    cfg = StreamConfig(batch=plan.batch, block=plan.block, per_window=plan.per_window)
    windows = token_windows(corpus, tok, Mixture(budget=plan.tokens), n_ctx=at.n_ctx)
    held = token_windows(corpus, tok, Mixture(budget=plan.held_tokens), n_ctx=at.n_ctx, validation=True, spread=True)
    one = len(ActivationStream(at, windows, cfg, device))  # batches in a pass
    stream = Stream(plan.n_steps, at, windows, replace(cfg, passes=-(-plan.n_steps//one)), device, harvest_batch=256)
    return stream, next(iter(ActivationStream(at, held, replace(cfg, batch=min(plan.batch, plan.held_tokens//2)), device)))


class Stream(ActivationStream):
    "A stream that ends after so many batches."
    def __init__(self, n, *args, **kw):
        self.n = n
        super().__init__(*args, **kw)

    def __len__(self): return self.n

    def batches(self, start=0):
        for _, x in zip(range(self.n-start), super().batches(start)): yield x


def run(plan, out, work, minutes, device, tiny=False, say=partial(print, flush=True)):
    "Check, measure, train, write; what is there already is used again."
    began, out, work = time.monotonic(), Path(out), Path(work)
    look_ahead(plan, device, out, work, tiny)
    say(f'[text] {plan.corpus}, {plan.tokens:,} tokens')
    stream, held = streams(plan, device)
    path, key = out/'measured.json', content_hash([card(device), torch.__version__, plan.to_dict()])
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get('key') != key:
        known = dict(key=key) | measure(plan, next(iter(stream)), say)
        write_json(path, known)
    else: say(f'[measure] used again from {path}')
    unpack(work, plan, out, say)
    left = 60*minutes-(time.monotonic()-began)-plan.reserve_s
    check(left > 0, f'{minutes:g} minutes, {(time.monotonic()-began)/60:.1f} of them spent before training', 'some for training, too',
          'call again, now that the measurements are there, with more --minutes', TimeoutError)
    say(f'[train] towards {plan.samples:,} samples, for {left/60:.1f} minutes')
    sae, log, resampled, session = train(plan, stream, work, left, way_of(known, plan.n_feats), device)
    results = write(plan, out, work, sae, log, resampled, session, known, held)
    say(f'[done] {results["training"]["samples"]:,} of {plan.samples:,} samples, {"finished" if results["training"]["finished"] else "the same call goes on"}; '
        f'L0 {results["training"]["held_out"]["l0"]:.1f}, loss {results["training"]["held_out"]["loss"]:.2f}; in {out}')
    return results


def write(plan, out, work, sae, log, resampled, session, known, held):
    "The dictionary in half precision with its record, the state in parts, the results."
    path, last = out/'gpu.json', log.iloc[-1]
    before = json.loads(path.read_text())['training']['sessions'] if path.is_file() else []
    sessions = before+([session | dict(card=known['card']['name'])] if session else [])
    done = int(sessions[-1]['to']) if sessions else int(last.vectors)
    rates = [s['samples_per_s'] for s in sessions if s['samples_per_s']]
    product, measured = 2*sae.cfg.d_in*plan.n_feats, held_out(sae, held)
    training = dict(samples=done, of=plan.samples, finished=done >= plan.samples, sessions=sessions, resampled=resampled, last={k: float(last[k]) for k in ('step', 'total', 'l0', 'fvu', 'dead')},
                    held_out=dict(loss=measured.pop('total')) | measured, n_held=len(held),
                    share_of_bf16_peak=product*rates[-1]/1e12/known['peak_tflops']['bf16'] if rates else None)
    if plan.n_feats == 4096: training['held_out_shipped'] = held_out(load_sae('A/1', held.device), held)
    record = run_record(name='A/1', vectors=done, config=plan.recipe.to_dict(), plan=plan.to_dict(), gpu=known['card'], sessions=sessions, resampled=resampled,
                        log=log.iloc[::-(-len(log)//500)].round(4).to_dict('records'))
    save_sae(sae, out/'A-1', record, half=True)
    pack(work, plan, out)
    results = dict(run=run_record(), plan=plan.to_dict(), measured=known, training=training)
    write_json(path, results)
    large = [str(p) for p in out.rglob('*') if p.is_file() and p.stat().st_size > LARGEST]
    check(not large, f'{large} larger than 16 MiB', 'smaller files', 'lower n_feats')
    return results


def main(args=None):
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--minutes', type=float, default=10., help='for everything, measurements included')
    ask.add_argument('--out', default=os.environ.get('OUT', 'runs/gpu/out'), help='results; $OUT by default')
    ask.add_argument('--work', default='runs/gpu/work', help='checkpoints')
    ask.add_argument('--samples', type=int, help='how many in all, in place of 8,192,000,000')
    ask.add_argument('--block', type=int, help='vectors shuffled together; fewer need less memory')
    ask.add_argument('--tiny', action='store_true', help='the same on a CPU, very small')
    got = ask.parse_args(args)
    changes = {k: getattr(got, k) for k in ('samples', 'block') if getattr(got, k)}
    device = torch.device('cpu' if got.tiny else 'cuda')
    try: run(replace(TINY if got.tiny else Plan(), **changes), got.out, got.work, got.minutes, device, got.tiny)
    except (ValueError, OSError, ImportError, ArithmeticError) as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
