"Everything that is measured of a dictionary over a text: on active sets, against a plain torch loop with dense features. Run: python benchmarks/passes.py"
import json, platform, resource, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

TOKENS, SHARE, ROUNDS, K = 2_000_000, 100_000, 3, 20
WIDER, L0 = 16_384, 20


def setting(n_feats, tokens):
    "A, its dictionary (one of random weights and the same sparsity if it is another size), tokenizer, validation text."
    from monosem.corpus import load_corpus
    from monosem.hooked import at_hook
    from monosem.sae import SAE, SAEConfig, load_sae
    from monosem.tokens import Mixture, load_tokenizer, token_windows
    from monosem.transformer import load_transformer
    A, tok, sae = load_transformer('A', 'cpu'), load_tokenizer(), load_sae('A/1', 'cpu')
    windows = token_windows(load_corpus('core'), tok, Mixture(budget=tokens), validation=True, spread=True)
    at = at_hook(A)
    if n_feats != sae.cfg.n_feats:
        sae = SAE(SAEConfig(at.d_in, n_feats, start='random')).requires_grad_(False)
        x = at(windows.ids(slice(0, 8))).flatten(0, 1)
        for part in torch.arange(n_feats).split(1024): sae.b_enc[part] = -torch.quantile(x@sae.W_enc[:, part], 1-L0/n_feats, dim=0)
    return at, sae, tok, windows


def contexts_of(windows, tok):
    from monosem.proxies import CONTEXTS, halves, proxy
    return halves(windows), np.stack([proxy(c.name, windows, tok) > 0 for c in CONTEXTS])


def sparse(at, sae, tok, windows):
    "Statistics, examples, all features with all neurons and all contexts, in one pass; then the contexts' tests."
    from monosem.features import Tally, feature_pass
    from monosem.proxies import CONTEXTS, Correlations, Sums, test_contexts
    n, (select, inside) = sae.cfg.n_feats, contexts_of(windows, tok)
    tally, neurons, of_features, of_neurons = Tally(n, K), Sums(n, at.d_in), Sums(n, len(inside)), Sums(len(inside), at.d_in)
    for s in feature_pass(at, sae, windows, batch=32):
        f, x, use = s.active.matrix(n), s.acts.flatten(0, 1).numpy(), select[s.rows].ravel()
        y = inside[:, s.rows].reshape(len(inside), -1).T[use]
        tally.add(s.active)
        neurons.add(f, x)
        of_features.add(f[use], y)
        of_neurons.add(y, x[use])
    corr = Correlations(of_features.r().T, of_neurons.r())
    chosen = dict(zip((c.name for c in CONTEXTS), zip(*corr.strongest())))
    tests, _ = test_contexts(at, sae, tok, windows, chosen=chosen)
    assert len(tests) == len(CONTEXTS)
    return dict(freq=tally.stats().freq, top=tally.stats().top_act, neurons=neurons.r(), contexts=corr.features)


def one_by_one(at, sae, tok, windows):
    "The same by the functions, each with a pass of its own."
    from monosem.features import feature_stats
    from monosem.proxies import neuron_correlations, test_contexts
    stats = feature_stats(at, sae, windows, K)
    every = np.ones(windows.tokens.shape, bool)
    neurons = neuron_correlations(at, sae, windows, range(sae.cfg.n_feats), every)
    test_contexts(at, sae, tok, windows)
    return dict(freq=stats.freq, top=stats.top_act, neurons=neurons)


@torch.no_grad()
def dense(at, sae, tok, windows):
    "As one writes it first: all features of a few windows in one array. The contexts' tests are the library's."
    from monosem.core import pearson
    from monosem.proxies import CONTEXTS, Correlations, test_contexts
    n, (select, inside) = sae.cfg.n_feats, contexts_of(windows, tok)
    count, best, s = torch.zeros(n), torch.zeros(n, K), {}
    for rows in np.array_split(np.arange(len(windows)), max(1, len(windows)//16)):
        x = at(windows.ids(rows)).flatten(0, 1)
        f, use = sae.encode(x), torch.from_numpy(select[rows].ravel())
        y = torch.from_numpy(inside[:, rows].reshape(len(inside), -1)).float()*use
        count += (f > 0).sum(0)
        best = torch.cat([best, f.topk(min(K, len(f)), dim=0).values.T], 1).topk(K, dim=1).values
        part = dict(f=f.sum(0), ff=f.square().sum(0), x=x.sum(0), xx=x.square().sum(0), fx=f.T@x, y=y.sum(1),
                    yf=y@f, yx=y@x, uf=use.float()@f, uff=use.float()@f.square(), ux=use.float()@x, uxx=use.float()@x.square())
        s = {k: s.get(k, 0)+v.double() for k,v in part.items()}
    col, m = lambda v: v[:, None], select.sum()
    corr = Correlations(pearson(m, s['uf'], col(s['y']), s['uff'], col(s['y']), s['yf']), pearson(m, s['ux'], col(s['y']), s['uxx'], col(s['y']), s['yx']))
    chosen = dict(zip((c.name for c in CONTEXTS), zip(*corr.strongest())))
    test_contexts(at, sae, tok, windows, chosen=chosen)
    return dict(freq=(count/windows.n_tokens).numpy(), top=best.numpy(), contexts=corr.features,
                neurons=pearson(windows.n_tokens, col(s['f']), s['x'], col(s['ff']), s['xx'], s['fx']))


def measure(way, n_feats, tokens):
    "Seconds, peak memory of the process, and the numbers."
    args = setting(n_feats, tokens)
    from monosem.features import feature_stats
    feature_stats(*args[:2], args[3][:32])  # compiled loops are read
    start = time.perf_counter()
    numbers = globals()[way](*args)
    seconds = time.perf_counter()-start
    unit = 1e9 if sys.platform == 'darwin' else 1e6
    return dict(way=way, n_feats=n_feats, tokens=args[3].n_tokens, seconds=seconds, l0=float(numbers['freq'].sum()),
                memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit), numbers


def alone(*args):
    "In a process of its own."
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: row, numbers = pool.submit(measure, *args).result()
    print(f"{row['way']:11}{row['n_feats']:>7,} features {row['tokens']:>10,} tokens {row['seconds']:7.1f} s {row['memory_gb']:6.2f} GB", flush=True)
    return row, numbers


def main():
    ways, rows, far = ('sparse', 'one_by_one', 'dense'), [], {}
    for _ in range(ROUNDS):
        done = {way: alone(way, 4096, SHARE) for way in ways}
        rows.append({way: row for way,(row,_) in done.items()})
        for way in ways[:2]:
            for k,v in done[way][1].items():
                far[k] = max(far.get(k, 0), float(np.nanmax(np.abs(v-done['dense'][1][k]))))
    ratio = {way: np.array([r['dense']['seconds']/r[way]['seconds'] for r in rows]) for way in ways[:2]}
    whole, wider = alone('sparse', 4096, TOKENS)[0], alone('sparse', WIDER, SHARE)[0]
    share = rows[-1]['sparse']
    out = dict(whole=whole, wider=wider, wider_whole_memory_gb=wider['memory_gb']+whole['memory_gb']-share['memory_gb'],
               share={way: dict(rows[0][way], seconds=float(np.median([r[way]['seconds'] for r in rows])), memory_gb=float(np.median([r[way]['memory_gb'] for r in rows]))) for way in ways},
               speedup={way: dict(median=float(np.median(r)), range=[float(r.min()), float(r.max())]) for way,r in ratio.items()},
               largest_difference=far, rounds=ROUNDS,
               machine=f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    def rounded(v):
        if isinstance(v, dict): return {k: rounded(x) for k,x in v.items()}
        if isinstance(v, list): return [rounded(x) for x in v]
        return float(f'{v:.3g}') if isinstance(v, float) else v
    out = rounded(out)
    for way, v in out['speedup'].items(): print(f"{way} against dense: {v['median']}x ({v['range'][0]} to {v['range'][1]})")
    print(f"{WIDER:,} features over {whole['tokens']:,} tokens: {out['wider_whole_memory_gb']} GB, extrapolated; largest differences {out['largest_difference']}")
    Path(__file__).with_suffix('.json').write_text(json.dumps(out, indent=1)+'\n')


if __name__ == '__main__': main()
