"""Training a dictionary: monosem beside SAELens, dictionary_learning and a plain PyTorch loop, each in a process of its own, one at a time, in turns.
SAELens and dictionary_learning run in float32 and, where a plan says so, with their own mixed precision (bf16); two matrix products, in float32 and in bf16, are the limits.
Run: python benchmarks/sae.py [--only step|run] [--n-feats 4096 ...] [--quick]. $MONOSEM_PEERS names a virtual environment that has the peers; without it one is made in benchmarks/.peers/."""
import argparse, json, os, platform, statistics, subprocess, sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CACHE, WORKER, OUT = HERE/'.peers', HERE/'workers/sae.py', HERE/'sae.json'
PINS = 'sae-lens==6.54.12', 'python-socketio[client]', 'pillow'  # the last two are what dictionary-learning's imports need of nnsight's requirements
NO_DEPS = 'dictionary-learning==0.1.0', 'nnsight==0.3.7'         # their requirements would replace torch
OURS, PEERS = 'monosem', ('plain', 'SAELens', 'dictionary_learning')
LIMITS = 'product', 'product bf16'
MIXED = {p: f'{p} bf16' for p in ('SAELens', 'dictionary_learning')}  # the same libraries, their mixed precision on
LOCAL = OURS, 'plain', *LIMITS  # run in this environment, the rest in the peers'
INSTRUCTIONS = ('avx2', 'fma', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'avx_vnni', 'amx_tile', 'amx_bf16', 'amx_int8',
                'asimd', 'sve', 'bf16', 'i8mm')  # of /proc/cpuinfo: those that decide how fast products are
D_IN = 512
FULL = dict(vectors=2_097_152, held=4096, corpus='core', budget=None,
            step=[(n, batch, l0) for n in (4096, 16384) for batch in (4096, 8192) for l0 in (20, 50, 200, 1000, n//2)], rounds={4096: 7, 16384: 3}, seconds=.5,
            mixed=[(4096, batch, l0) for batch in (4096, 8192) for l0 in (20, 50, 200)],
            run=[(4096, 4096)], repeats={4096: 1}, every=16, rates=(1e-3, 3e-3, 1e-2))
QUICK = dict(vectors=81_920, held=1024, corpus='mini', budget=400_000, step=[(1024, 2048, l0) for l0 in (20, 512)], rounds={1024: 3}, seconds=.05, mixed=[(1024, 2048, 20)],
             run=[(1024, 2048)], repeats={1024: 1}, every=4, rates=(1e-3, 1e-2))
NEVER = 'never'
PATIENCE = 5  # seconds: a processor without bf16 products takes half a minute for a step in them, and is not asked for a second one


# -- what the processes need

def peers_python():
    "The peers' interpreter; their environment is made at the first use."
    if given := os.environ.get('MONOSEM_PEERS'): return Path(given)/'bin/python'
    venv = CACHE/'venv'
    if not (venv/'done').exists():
        print('[setup] virtual environment of the peers (once; a few minutes)', flush=True)
        pip = [venv/'bin/pip', 'install', '-q', '--disable-pip-version-check']
        pin = next(l for l in (HERE.parent/'constraints.txt').read_text().split() if l.startswith('torch=='))
        for command in ([sys.executable, '-m', 'venv', venv], [*pip, pin], [*pip, pin, *PINS], [*pip, '--no-deps', *NO_DEPS]): subprocess.run(command, check=True)
        (venv/'done').touch()
    return venv/'bin/python'


def harvest(plan):
    "Activations of the shipped model, written once as half-precision numbers in the order in which every library reads them."
    import torch
    from monosem.activations import ActivationStream, StreamConfig
    from monosem.hooked import at_hook
    from monosem.core import replacing
    from monosem.corpus import load_corpus
    from monosem.tokens import Mixture, load_tokenizer, token_windows
    from monosem.reproduce import SCALES
    from monosem.transformer import load_transformer
    torch.set_num_threads(2)
    folder = CACHE/f'activations-{plan["corpus"]}-{plan["vectors"]}'
    if folder.is_dir(): return folder
    print(f'[setup] {plan["vectors"]:,} activations in {folder} (once)', flush=True)
    corpus, tok, model = load_corpus(plan['corpus']), load_tokenizer(), load_transformer(device='cpu')
    mixture = Mixture(budget=plan['budget']) if plan['budget'] else SCALES['small'].mixture
    def write(path, n, mixture, batch, **which):
        windows, left = token_windows(corpus, tok, mixture, n_ctx=model.cfg.n_ctx, **which), n
        with open(path, 'wb') as f:
            for x in ActivationStream(at_hook(model), windows, StreamConfig(batch=batch, per_window=96)):
                x[:left].numpy().astype(np.float16).tofile(f)
                if (left := left-len(x)) <= 0: return
        raise ValueError(f'got {n-left} activations of {plan["corpus"]}; expected {n}; raise the budget of tokens.')
    with replacing(folder) as tmp:
        tmp.mkdir()
        write(tmp/'train.f16', plan['vectors'], mixture, 4096)
        write(tmp/'held.f16', plan['held'], Mixture(budget=100_000), 1024, validation=True, spread=True)
    return folder


def starting_weights(folder, n_feats, batch):
    "The weights that monosem starts from, for the others: seed 0, encoder transposed, and the geometric median of the first batch."
    import torch
    from monosem.sae import SAE, SAEConfig, geometric_median
    path, sae = folder/f'start-{n_feats}-{batch}.npz', SAE(SAEConfig(D_IN, n_feats, start='transposed'))
    first = torch.from_numpy(np.fromfile(folder/'train.f16', np.float16, batch*D_IN).reshape(batch, D_IN).astype(np.float32))
    np.savez(path, **{k: getattr(sae, k).detach().numpy() for k in ('W_enc', 'b_enc', 'W_dec')}, b_dec=geometric_median(first).numpy())
    return path


class Worker:
    "A library's process; it computes only between a question and its answer."
    def __init__(self, name):
        self.name, self.log = name, CACHE/f'{name.replace(" ", "")}.log'
        env = os.environ | dict(TQDM_DISABLE='1', WANDB_MODE='disabled', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='2')
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen([sys.executable if name in LOCAL else peers_python(), WORKER, name], text=True, env=env,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.versions = self.ask(do='hello')['versions']

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order, default=str)+'\n')
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()): raise RuntimeError(f'the process of {self.name} ended:\n{self.log.read_text()[-2000:]}')
        return json.loads(line)

    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


class Workers:
    "Processes of several libraries, asked in turns."
    def __init__(self, names): self.all = {n: Worker(n) for n in names}
    def __enter__(self): return self
    def __exit__(self, *_):
        for w in self.all.values(): w.__exit__()

    def ask(self, turn, leave_out=(), **order):
        "Ask everyone the same, the first one another at each turn."
        names = [n for n in self.all if n not in leave_out]
        k = turn % len(names)
        return {n: self.all[n].ask(**order) for n in names[k:]+names[:k]}


# -- what is measured

middle = lambda values, digits=2: [round(float(f(values)), digits) for f in (np.median, np.min, np.max)]  # median and range


def counts(n_feats, batch, l0, sparse):
    """Operations, and bytes of the arrays that are gone through, of a step; counted by hand in the code, each pass over an array once, caches not modelled.
    Passes over a weight matrix: ours 27 = search 4 (norms, rounding, product, fold), gradients 5 (zeros, b_dec's part, W_enc times a vector), update 18 (projection 3, length 1, Adam 14),
    and 4 for each tile of 256 vectors; plain 54, by products 4 and Adam 36. Passes over a matrix of (batch, n_feats): plain 17, ours none, as a tile of it stays in the cache.
    For each active entry ours has 40 bytes and, outside of the tile, one row of the encoder in the search and one of the decoder."""
    product, weights, matrix, rows, entries = 2*batch*D_IN*n_feats, 4*D_IN*n_feats, 4*batch*n_feats, 4*batch*D_IN, batch*l0
    search = dict(flops=round(product+2*entries*D_IN), bytes=round(4*weights+rows+entries*(8+4*D_IN))) if sparse else dict(flops=product, bytes=rows+weights)
    sums = dict(flops=round(8*entries*D_IN), bytes=round((23+4*-(-batch//256))*weights+5*rows+entries*(32+4*D_IN))) if sparse else dict(flops=4*product, bytes=29*weights+5*rows)
    return {k: dict(product=p, search=search[k], monosem=search[k]+sums[k], plain=q) for k, p, q in (('flops', product, 6*product), ('bytes', rows+weights+matrix, 54*weights+17*matrix+20*rows))}


def measure_step(plan, folder, n_feats, batch, l0):
    "Seconds of one step at a density, in turns; what computes in bf16, and slowly, takes part in the first round only."
    setting, seconds, encode, memory = (n_feats, batch, l0), {}, [], {}
    peers = *PEERS, *(MIXED.values() if setting in plan['mixed'] else ())
    rounded = *MIXED.values(), 'product bf16'
    with Workers((OURS, *peers, *LIMITS)) as workers:
        versions = {k: v for w in workers.all.values() for k,v in w.versions.items()}
        found = workers.ask(0, do='prepare', data=folder/'train.f16', n_feats=n_feats, batch=batch, l0=l0)
        active = [a['l0'] for a in found.values() if a['l0'] is not None]
        if max(active)-min(active) > .01*l0: raise ValueError(f'got L0 of {active}; expected the same for all; compare how the weights are loaded.')
        for r in range(plan['rounds'][n_feats]):
            for name, a in workers.ask(r, [n for n in rounded if min(seconds.get(n, [0])) > PATIENCE], do='turn', seconds=plan['seconds']).items():
                seconds.setdefault(name, []).append(a['seconds'])
                memory[name] = dict(baseline_mb=round(a['baseline_mb']), peak_mb=round(a['peak_mb']))
                if name == OURS: encode.append(a['encode'])
    s = {k: np.array(v) for k,v in seconds.items()}
    over = lambda name: s[name]/s[OURS][:len(s[name])]  # by paired rounds
    counted = counts(n_feats, batch, active[0], active[0]/n_feats < .15)
    gflops = lambda name: middle(counted['flops']['product']/s[name]/1e9, 0)
    ratio = {p: middle(over(p)) for p in peers}
    return versions, dict(n_feats=n_feats, batch=batch, l0=l0, l0_measured=round(active[0], 1), rounds={k: len(v) for k,v in s.items()},
                          seconds={k: middle(v, 4) for k,v in s.items()}, ratio=ratio, best=best_settings(ratio),
                          encoder_share=middle(np.array(encode)/s[OURS]), rest=rest(counted, s[OURS]-encode),
                          of_limit=middle(over('product')), limit_gflops=gflops('product'), of_limit_bf16=middle(over('product bf16')), limit_bf16_gflops=gflops('product bf16'),
                          memory_mb={k: v for k,v in memory.items() if k not in LIMITS}, **counted)


def best_settings(ratio):
    "Each peer's faster setting, where both were measured: its name, and how many times longer than ours it takes."
    pairs = {p: min((p, mixed), key=lambda name: ratio[name][0]) for p,mixed in MIXED.items() if mixed in ratio}
    return {p: dict(setting=name, ratio=ratio[name]) for p,name in pairs.items()}


def rest(counted, seconds):
    "Our step without the search for what fired: operations, bytes, and the rates at which it gets through them."
    flops, size = (counted[k][OURS]-counted[k]['search'] for k in ('flops', 'bytes'))
    return dict(seconds=middle(seconds, 4), flops=flops, bytes=size, gflops=middle(flops/seconds/1e9, 1), gb_per_s=middle(size/seconds/1e9, 1))


def reach(curve, loss):
    "The first evaluation at or below a loss."
    return next((row for row in curve if row.get('loss', np.inf) <= loss), None)


def choose_rates(plan, folder, start, n_feats, batch):
    "Each recipe's best of a few learning rates, by the held-out loss after a run of a quarter of the length, tried once: losses are not a machine's. plain and dictionary_learning have our recipe."
    n_steps, losses = plan['vectors']//batch//4, known_losses(plan, n_feats, batch)
    for name in (OURS, 'SAELens'):
        for lr in plan['rates']:
            if lr in losses.get(name, {}): continue
            with Workers([name]) as workers:
                order = dict(data=folder/'train.f16', held=folder/'held.f16', start=start, n_feats=n_feats, batch=batch, n_steps=n_steps, every=n_steps, lr=lr)
                workers.ask(0, do='run', **order)
                a = workers.ask(0, do='go')[name]
                losses.setdefault(name, {})[lr] = round(a['loss'], 2)
                print(f'    learning rate {lr:g} of {name}: loss {a["loss"]:.1f}, L0 {a["l0"]:.1f} after {n_steps} steps, {a["seconds"]:.0f} s', flush=True)
    best = {n: min(v, key=v.get) for n,v in losses.items()}
    rates = {n: best.get(n, best[OURS]) for n in (OURS, *PEERS)}
    return rates | {mixed: rates[p] for p,mixed in MIXED.items()}, losses


def known_losses(plan, n_feats, batch):
    "Those of a run of the same size in the file: library to rate to loss."
    rows = json.loads(plan['path'].read_text()).get('run', []) if plan['path'].exists() else []
    same = [r for r in rows if (r['n_feats'], r['batch'], r['vectors']) == (n_feats, batch, plan['vectors'])]
    return {name: {float(lr): loss for lr,loss in tried.items()} for r in same for name,tried in r['rates_tried'].items()}


def one_run(plan, folder, start, n_feats, batch, turn, rates, peers):
    "All libraries trained from the same start on the same batches, a few batches at a time in turns."
    names = OURS, *peers
    names = names[turn % len(names):]+names[:turn % len(names)]
    n_steps, curves = plan['vectors']//batch, {n: [] for n in names}
    with Workers(names) as workers:
        versions = {k: v for w in workers.all.values() for k,v in w.versions.items()}
        order = dict(data=folder/'train.f16', held=folder/'held.f16', start=start, n_feats=n_feats, batch=batch, n_steps=n_steps, every=plan['every'])
        answers = {n: w.ask(do='run', lr=rates[n], **order) for n,w in workers.all.items()}
        for k in range(1, -(-n_steps//plan['every'])+1):
            answers = workers.ask(k, do='go')
            for n,a in answers.items(): curves[n].append({key: round(a[key], 4) for key in ('step', 'seconds', 'loss', 'mse', 'l1', 'l0')})
            if k % 8 == 0: print(f'    step {a["step"]} of {n_steps}: '+', '.join(f'{n} {c[-1]["seconds"]:.1f} s, loss {c[-1]["loss"]:.1f}' for n,c in curves.items()), flush=True)
    return versions, curves, {n: dict(baseline_mb=round(a['baseline_mb']), peak_mb=round(a['peak_mb'])) for n,a in answers.items()}


def faster_in_bf16(plan):
    "The mixed settings that took a tenth less than float32 in every step measured before, on this machine: they train a whole run, too."
    rows = json.loads(plan['path'].read_text()).get('step', []) if plan['path'].exists() else []
    def gains(p, mixed): return [row['ratio'][mixed][0] < .9*row['ratio'][p][0] for row in rows if mixed in row['ratio']]
    return [mixed for p,mixed in MIXED.items() if gains(p, mixed) and all(gains(p, mixed))]


def measure_run(plan, folder, n_feats, batch):
    "Seconds until the held-out loss is what the slowest peer ends at."
    start, ratios, whole, common, reached, runs = starting_weights(folder, n_feats, batch), {}, {}, {}, {}, []
    rates, tried = choose_rates(plan, folder, start, n_feats, batch)
    peers = *PEERS, *faster_in_bf16(plan)
    for r in range(plan['repeats'][n_feats]):
        versions, curves, memory = one_run(plan, folder, start, n_feats, batch, r, rates, peers)
        runs.append(curves)
        slowest = max(PEERS, key=lambda n: curves[n][-1]['seconds'])
        target = curves[slowest][-1]['loss']
        ours, worst = reach(curves[OURS], target), max(c[-1]['loss'] for c in curves.values())  # all reach the highest of the last losses
        for n,c in curves.items():
            common.setdefault(n, []).append(reach(c, worst))
            row = reach(c, target)
            reached.setdefault(n, []).append(row)
            whole.setdefault(n, []).append(c[-1]['seconds']/curves[OURS][-1]['seconds'])
            if ours and row: ratios.setdefault(n, []).append(row['seconds']/ours['seconds'])
    last = runs[-1]
    return versions, dict(n_feats=n_feats, batch=batch, vectors=plan['vectors'], repeats=len(runs), rates={n: rates[n] for n in (OURS, *peers)}, rates_tried=tried, slowest=slowest, target_loss=round(target, 3),
                          seconds={n: middle([c[n][-1]['seconds'] for c in runs], 1) for n in last}, end={n: {k: c[-1][k] for k in ('loss', 'mse', 'l1', 'l0')} for n,c in last.items()},
                          reached={n: dict(step=rows[-1]['step'], l0=rows[-1]['l0'], loss=rows[-1]['loss'], seconds=middle([x['seconds'] for x in rows if x], 1)) if rows[-1] else NEVER for n,rows in reached.items()},
                          common_loss=round(worst, 3), common={n: dict(step=rows[-1]['step'], l0=rows[-1]['l0'], seconds=middle([x['seconds'] for x in rows], 1)) for n,rows in common.items()},
                          ratio={n: middle(v) for n,v in ratios.items() if n != OURS}, ratio_whole={n: middle(v) for n,v in whole.items() if n != OURS},
                          memory_mb=memory, curve={n: [[row[k] for k in ('step', 'seconds', 'loss', 'l0')] for row in c] for n,c in last.items()})


# -- what is told

def machine():
    "The computer, without a date: its processor, the instruction sets that decide how fast products are, its caches."
    import torch
    info = Path('/proc/cpuinfo')
    lines = dict(reversed([[p.strip() for p in l.split(':', 1)] for l in info.read_text().splitlines() if ':' in l])) if info.exists() else {}  # of the first core
    flags = set(lines.get('flags', lines.get('Features', '')).split())
    return dict(processor=lines.get('model name') or platform.processor() or platform.machine(), cores=os.cpu_count(), threads=2,
                instructions=[k for k in INSTRUCTIONS if k in flags], torch_uses=torch.backends.cpu.get_cpu_capability(), caches=caches(), python=platform.python_version())


def caches():
    "Sizes of the first core's caches, as far as the system tells: L1, L2, L3."
    read = lambda p: p.read_text().strip()
    found = [p for p in sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('index*')) if (p/'size').exists() and read(p/'type') != 'Instruction']
    return {f'L{read(p/"level")}': read(p/'size') for p in found}


def store(path, section, row, versions):
    "Put a row into the file, in place of an older one of the same setting."
    from monosem.core import write_json
    out = json.loads(path.read_text()) if path.exists() else {}
    same = lambda a: all(a[k] == row[k] for k in ('n_feats', 'batch', 'l0') if k in row)
    rows = sorted([a for a in out.get(section, []) if not same(a)]+[row], key=lambda a: (a['n_feats'], a['batch'], a.get('l0', 0)))
    write_json(path, dict(machine=machine(), versions=out.get('versions', {}) | versions, **{k: v for k,v in out.items() if k in ('step', 'run') and k != section}, **{section: rows}))


span = lambda v: f'{v[0]:g} ({v[1]:g} to {v[2]:g})'
over = lambda m: f'{m["peak_mb"]-m["baseline_mb"]}/{m["peak_mb"]}'


def tell_step(row):
    print(f"{row['n_feats']:>6} features, batch {row['batch']}, L0 {row['l0_measured']:g}: {row['seconds'][OURS][0]*1000:.0f} ms a step; slower by "
          + ', '.join(f'{p} {span(v)}' for p,v in row['ratio'].items())
          + f"; encoder {row['encoder_share'][0]:.0%} of the step, the rest at {row['rest']['gflops'][0]:g} GFLOP/s and {row['rest']['gb_per_s'][0]:g} GB/s"
          + f"; a product takes {row['of_limit'][0]:.0%} of the step in float32 ({row['limit_gflops'][0]:g} GFLOP/s), {row['of_limit_bf16'][0]:.0%} in bf16 ({row['limit_bf16_gflops'][0]:g}); memory over the baseline/in all, MB: "
          + ', '.join(f'{n} {over(m)}' for n,m in row['memory_mb'].items()), flush=True)


def tell_run(row):
    print(f"{row['n_feats']:>6} features, batch {row['batch']}, {row['vectors']:,} activations; {row['slowest']} ends at loss {row['target_loss']}")
    for n,s in row['seconds'].items():
        r, e = row['reached'][n], row['end'][n]
        there = 'does not reach it' if r == NEVER else f"there after {r['seconds'][0]:g} s at L0 {r['l0']:.1f}"
        ratio = f"; {span(row['ratio'][n])} times ours" if n in row['ratio'] else ''
        print(f"       {n:22}{there}{ratio}; at loss {row['common_loss']:.2f}, which all reach, after {row['common'][n]['seconds'][0]:g} s; whole run {s[0]:g} s, ends at loss {e['loss']:.2f} (error {e['mse']:.2f}), L0 {e['l0']:.1f}; memory {over(row['memory_mb'][n])} MB", flush=True)


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--quick', action='store_true', help='one small size, 3 rounds, into benchmarks/.peers/quick.json')
    ask.add_argument('--only', choices=['step', 'run'])
    ask.add_argument('--n-feats', type=int, nargs='*', help='only these sizes')
    ask.add_argument('--missing', action='store_true', help='only what the file lacks')
    args = ask.parse_args()
    CACHE.mkdir(exist_ok=True)
    plan, path = (QUICK, CACHE/'quick.json') if args.quick else (FULL, OUT)
    plan = plan | dict(path=path)
    peers_python()
    folder = harvest(plan)
    for section, measure, tell in (('step', measure_step, tell_step), ('run', measure_run, tell_run)):
        for setting in plan[section]:
            have = [a for a in (json.loads(path.read_text()) if path.exists() else {}).get(section, []) if (a['n_feats'], a['batch'], a.get('l0'))[:len(setting)] == setting]
            if args.only not in (None, section) or (args.n_feats and setting[0] not in args.n_feats) or (args.missing and have): continue
            versions, row = measure(plan, folder, *setting)
            store(path, section, row, versions)
            tell(row)


if __name__ == '__main__': main()
