"Training steps of the transformer: monosem's plain forward against the bridge's own loss, interleaved. Run: python benchmarks/transformer.py"
import json, platform, time
from pathlib import Path

import numpy as np
import torch

from monosem.transformer import TransformerConfig, build_transformer, loss_nats, weights

ROUNDS, BATCH = 21, 16


def step(model, opt, loss):
    opt.zero_grad()
    loss(model).backward()
    opt.step()


def main():
    tokens = torch.randint(8192, (BATCH, 256), generator=torch.Generator().manual_seed(0))
    ways = {'bridge': lambda m: m(tokens, return_type='loss'), 'plain': lambda m: loss_nats(m, tokens)}
    runs = {}
    for name in ways:
        model = build_transformer(TransformerConfig(), 'cpu')
        runs[name] = model, torch.optim.AdamW(weights(model).values(), lr=1e-3, fused=True)
        step(*runs[name], ways[name])  # warm up
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, loss in ways.items():
            start = time.perf_counter()
            step(*runs[name], loss)
            seconds[name].append(time.perf_counter()-start)
    rate = {name: tokens.numel()/np.array(s) for name,s in seconds.items()}
    ratio = rate['plain']/rate['bridge']
    out = dict(tokens_per_s={k: round(float(np.median(v))) for k,v in rate.items()}, ratio_median=round(float(np.median(ratio)), 2),
               ratio_range=[round(float(r), 2) for r in (ratio.min(), ratio.max())], rounds=ROUNDS, batch=BATCH,
               machine=f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    print('\n'.join(f'{k:8}{v:>9,} tokens/s' for k,v in out['tokens_per_s'].items()))
    print(f"ratio   {out['ratio_median']} (interleaved rounds: {out['ratio_range'][0]} to {out['ratio_range'][1]})")
    Path(__file__).with_suffix('.json').write_text(json.dumps(out, indent=1)+'\n')


if __name__ == '__main__': main()
