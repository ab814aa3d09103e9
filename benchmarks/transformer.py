"""Training steps of the transformer in interleaved rounds: monosem's plain forward beside the bridge's own loss, and rounded (bfloat16) products beside float32.
Run: python benchmarks/transformer.py [--only bridge|precision] [--rounds 21] [--batch 16]; with --nats [--tokens 1000000 --seeds 3] instead: validation nats
at equal tokens in both precisions. Each part writes its own section of transformer.json."""
import argparse, json, os, platform, time
from pathlib import Path

import numpy as np
import torch

from monosem.core import write_json
from monosem.transformer import PRECISIONS, TransformerConfig, build_transformer, computing_in, faster_precision, loss_nats, weights

OUT, LIMIT = Path(__file__).with_suffix('.json'), 300  # seconds, where a way is hopelessly slow


def step(model, opt, loss):
    opt.zero_grad()
    loss(model).backward()
    opt.step()


def in_precision(precision, tokens):
    "A loss that is computed in a precision; its gradient comes in the same way."
    def loss(model):
        with computing_in(precision, tokens.device): return loss_nats(model, tokens)
    return loss


def race(ways, tokens, rounds):
    "Tokens/s of ways to compute a loss, in turns; ratios are the second to the first."
    runs, seconds = {}, {name: [] for name in ways}
    for name in ways:
        model = build_transformer(TransformerConfig(), 'cpu')
        runs[name] = model, torch.optim.AdamW(weights(model).values(), lr=1e-3, fused=True)
        step(*runs[name], ways[name])  # warm up
    begun = time.perf_counter()
    for done in range(rounds):
        if done > 2 and time.perf_counter()-begun > LIMIT: break
        for name, loss in ways.items():
            start = time.perf_counter()
            step(*runs[name], loss)
            seconds[name].append(time.perf_counter()-start)
    rate = {name: tokens.numel()/np.array(s) for name,s in seconds.items()}
    first, second = rate.values()
    ratio = second/first
    out = dict(tokens_per_s={k: round(float(np.median(v))) for k,v in rate.items()}, ratio_median=round(float(np.median(ratio)), 2),
               ratio_range=[round(float(r), 2) for r in (ratio.min(), ratio.max())], rounds=len(ratio), batch=len(tokens), machine=machine())
    print('\n'.join(f'{k:9}{v:>9,} tokens/s' for k,v in out['tokens_per_s'].items()))
    print(f"ratio    {out['ratio_median']} (interleaved rounds: {out['ratio_range'][0]} to {out['ratio_range'][1]})", flush=True)
    return out


def machine():
    return f'{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def store(**sections):
    "Write some sections, keep the others."
    write_json(OUT, (json.loads(OUT.read_text()) if OUT.exists() else {}) | sections)


def speed(only, rounds, batch):
    tokens = torch.randint(8192, (batch, 256), generator=torch.Generator().manual_seed(0))
    if only != 'precision': store(**race({'bridge': lambda m: m(tokens, return_type='loss'), 'plain': lambda m: loss_nats(m, tokens)}, tokens, rounds))
    if only == 'bridge': return
    raced = race({p: in_precision(p, tokens) for p in PRECISIONS}, tokens, rounds)
    model, start = build_transformer(TransformerConfig(), 'cpu'), time.perf_counter()
    chosen = faster_precision(model, tokens)
    seconds = round(time.perf_counter()-start, 2)
    print(f'chosen   {chosen}, in {seconds} s')
    store(precision=raced | dict(chosen=chosen, seconds_to_choose=seconds))


def nats(corpus, n_tokens, seeds):
    "The same text in the same order, in both precisions; the loss that is compared is computed in float32."
    from monosem.corpus import load_corpus
    from monosem.tokens import Mixture, load_tokenizer, token_windows
    from monosem.transformer import LMTrainConfig, train_transformer
    text, tok = load_corpus(corpus), load_tokenizer()
    train, held = token_windows(text, tok, Mixture(budget=n_tokens)), token_windows(text, tok, Mixture(budget=100_000), validation=True, spread=True)
    rows = []
    for seed in range(seeds):
        row = dict(seed=seed)
        for precision in PRECISIONS:
            os.environ['MONOSEM_PRECISION'] = precision
            done = train_transformer(build_transformer(TransformerConfig(seed=seed), 'cpu'), train, held, LMTrainConfig(seed=seed, eval_every=10**9))
            row[precision] = dict(nats=round(float(done.log.validation_nats.iloc[-1]), 4), tokens_per_s=round(train.n_tokens/done.seconds))
        row['difference'] = round(row['bfloat16']['nats']-row['float32']['nats'], 4)
        print(row, flush=True)
        rows.append(row)
    differences = [r['difference'] for r in rows]
    print(f'bfloat16 minus float32: {np.mean(differences):+.4f} nats (seeds: {min(differences):+.4f} to {max(differences):+.4f})')
    store(nats=dict(corpus=corpus, tokens=train.n_tokens, validation_tokens=held.n_tokens, runs=rows, mean_difference=round(float(np.mean(differences)), 4), machine=machine()))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', choices=['bridge', 'precision'])
    p.add_argument('--rounds', type=int, default=21)
    p.add_argument('--batch', type=int, default=16, help='windows of 256 tokens')
    p.add_argument('--nats', action='store_true')
    p.add_argument('--corpus', default='core')
    p.add_argument('--tokens', type=int, default=1_000_000)
    p.add_argument('--seeds', type=int, default=3)
    a = p.parse_args()
    if a.nats: nats(a.corpus, a.tokens, a.seeds)
    else: speed(a.only, a.rounds, a.batch)
