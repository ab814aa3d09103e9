"Sweeps of toy models: all instances in one batch against one model at a time in plain PyTorch, interleaved. Run: python benchmarks/toy.py"
import json, platform, time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from monosem.toy import Sparse, ToyConfig, ToyModel, ToyTrainConfig, evaluate_toy, train_toy

ROUNDS, LR, EVAL = 3, 1e-2, 32_768
# name: n_feats, d_hidden, densities, seeds, steps, batch, decay of importance
SWEEPS = {'phase diagram, 2 features in 1 dimension': (2, 1, np.logspace(0, -1, 16), 4, 600, 128, .8),
          'plane, 5 features in 2 dimensions': (5, 2, np.logspace(0, -1.5, 8), 4, 600, 256, .9),
          'superposition, 20 features in 5 dimensions': (20, 5, np.logspace(0, -2, 7), 4, 1000, 256, .7)}


class Plain(nn.Module):
    "The model as one writes it first."
    def __init__(self, n, m):
        super().__init__()
        self.W, self.b = nn.Parameter(nn.init.xavier_normal_(torch.empty(m, n))), nn.Parameter(torch.zeros(n))

    def forward(self, x): return torch.relu(x@self.W.T@self.W+self.b)


def one_at_a_time(n, m, densities, seeds, steps, batch, I):
    "Plain models, densities x seeds, one after the other."
    out = []
    for d in np.repeat(densities, seeds):
        model = Plain(n, m)
        opt = torch.optim.Adam(model.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (steps-i)/(.5*steps)))
        for _ in range(steps):
            x = torch.rand(batch, n)*(torch.rand(batch, n) < d)
            loss = ((model(x)-x).square()*I).sum(-1).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        out.append(model)
    return out


def stack(models, n, m):
    "Plain models as one batch, to measure them on the same inputs."
    batch = ToyModel(ToyConfig(n, m, len(models))).requires_grad_(False)
    for k,model in enumerate(models): batch.W[k], batch.b[k] = model.W, model.b
    return batch


def main():
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    results = {}
    for name, (n, m, densities, seeds, steps, batch, decay) in SWEEPS.items():
        I, inputs = decay**torch.arange(n), Sparse(torch.tensor(densities, dtype=torch.float32).repeat_interleave(seeds), n)
        seconds, losses = {'plain': [], 'batched': []}, {'plain': [], 'batched': []}
        for r in range(ROUNDS):
            torch.manual_seed(r)
            start = time.perf_counter()
            models = one_at_a_time(n, m, densities, seeds, steps, batch, I)
            seconds['plain'].append(time.perf_counter()-start)
            losses['plain'].append(evaluate_toy(stack(models, n, m), inputs, I, n=EVAL).numpy())
            start = time.perf_counter()
            done = train_toy(ToyConfig(n, m, inputs.n_inst, seed=r), inputs, I, ToyTrainConfig(steps=steps, batch=batch, lr=LR, seed=r))
            seconds['batched'].append(time.perf_counter()-start)
            losses['batched'].append(evaluate_toy(done.model, inputs, I, n=EVAL).numpy())
        ratio = np.array(seconds['plain'])/seconds['batched']
        best = {k: np.array(v).reshape(ROUNDS, len(densities), seeds).min((0, 2)) for k,v in losses.items()}  # best of all seeds, as the chapters use it
        mean = {k: np.array(v).reshape(ROUNDS, len(densities), seeds).mean((0, 2)) for k,v in losses.items()}
        compare = lambda d: [round(float(x), 3) for x in (np.median(d['batched']/d['plain']), (d['batched']/d['plain']).min(), (d['batched']/d['plain']).max())]
        results[name] = dict(instances=inputs.n_inst, steps=steps, batch=batch, seconds={k: [round(s, 2) for s in v] for k,v in seconds.items()},
                             speedup_median=round(float(np.median(ratio)), 2), speedup_range=[round(float(x), 2) for x in (ratio.min(), ratio.max())],
                             best_loss_ratio=compare(best), mean_loss_ratio=compare(mean))
        print(f"{name}: {results[name]['speedup_median']}x ({results[name]['speedup_range'][0]} to {results[name]['speedup_range'][1]}), {inputs.n_inst} models;"
              f" best loss batched/plain, per density: median {results[name]['best_loss_ratio'][0]}, {results[name]['best_loss_ratio'][1]} to {results[name]['best_loss_ratio'][2]}", flush=True)
    out = dict(rounds=ROUNDS, sweeps=results, machine=f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    Path(__file__).with_suffix('.json').write_text(json.dumps(out, indent=1)+'\n')


if __name__ == '__main__': main()
