"One library's process of benchmarks/sae.py, which sends orders as JSON lines and reads answers likewise; not for running by hand."
import json, os, sys, time
from importlib.metadata import version
from pathlib import Path

answers, sys.stdout = os.fdopen(os.dup(1), 'w'), sys.stderr  # whatever a library prints goes to the log
os.dup2(2, 1)

import numpy as np
import torch

torch.set_num_threads(2)
D_IN, TILE = 512, 512
L1, WARMUP, DECAY, L1_WARMUP, CLIP = 2.5, .02, .2, .1, 1.  # of the runs: schedule and coefficient of A/1, and SAELens' limit of the gradient


def memory_mb(key):
    "VmHWM, the most, or VmRSS, now."
    return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1])/1024


class Plain:
    "The recipe of *Towards Monosemanticity* as one writes it first."
    packages = 'torch',

    def __init__(self, n_feats, batch, n_steps, lr):
        make = lambda *shape: torch.nn.Parameter(torch.zeros(*shape))
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = make(D_IN, n_feats), make(n_feats), make(n_feats, D_IN), make(D_IN)
        self.opt, self.n_steps, self.lr, self.l1, self.clip = torch.optim.Adam(self.weights(), lr=lr), n_steps, lr, L1, 0

    def weights(self): return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    def step(self, x):
        f = torch.relu((x-self.b_dec)@self.W_enc + self.b_enc)
        x_hat = f@self.W_dec + self.b_dec
        loss = (x_hat-x).pow(2).sum(-1).mean() + self.l1*f.sum(-1).mean()
        self.opt.zero_grad()
        loss.backward()
        with torch.no_grad(): self.W_dec.grad -= (self.W_dec.grad*self.W_dec).sum(-1, keepdim=True)*self.W_dec
        if self.clip: torch.nn.utils.clip_grad_norm_(self.weights(), self.clip)
        self.opt.step()
        with torch.no_grad(): self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)

    def train(self, batches):
        up, down, l1_up, self.clip = WARMUP*self.n_steps, DECAY*self.n_steps, L1_WARMUP*self.n_steps, CLIP
        for i,x in enumerate(batches):
            for g in self.opt.param_groups: g['lr'] = self.lr*min(1, (i+1)/up, (self.n_steps-i)/down)
            self.l1 = L1*min(1, (i+1)/l1_up)
            self.step(x)


class Monosem:
    "This library."
    packages = 'monosem', 'torch', 'numba'

    def __init__(self, n_feats, batch, n_steps, lr):
        from monosem import active, kernels, sae, training
        self.active_set = active.active_set
        self.train_sae, self.cfg = training.train_sae, training.SAETrainConfig(lr=lr, warmup=WARMUP, decay=DECAY, l1_warmup=L1_WARMUP, clip=CLIP)
        self.sae = sae.SAE(sae.SAEConfig(D_IN, n_feats, L1, start='transposed'))
        self.opt = torch.optim.Adam(self.sae.parameters(), lr=lr, fused=True)
        self.gradients, self.one_step, self.buffer = kernels.DensitySwitch(), training.step, torch.empty(TILE, n_feats)

    def weights(self): return self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec

    def step(self, x): self.one_step(self.sae, self.opt, x, L1, self.gradients)

    @torch.no_grad()
    def encode(self, x):
        "What the step does before its sums: the search for what fired, or in a dense step the product, in its tiles."
        if self.gradients.sparse: return self.active_set(self.sae, x)
        for rows in x.split(TILE): torch.addmm(self.sae.b_enc, rows, self.sae.W_enc, out=self.buffer[:len(rows)])

    def train(self, batches):
        cfg = self.sae.cfg
        del self.sae, self.opt, self.buffer
        def keep(state): self.sae = state.sae
        self.train_sae(batches, cfg, self.cfg, [keep])  # seed 0 and the bias of its first batch: the start that the others are given


class SAELens:
    "StandardTrainingSAE and SAETrainer: the L1 term weighted by decoder norms, gradients clipped, norms free."
    packages, autocast = ('sae-lens', 'torch'), False

    def __init__(self, n_feats, batch, n_steps, lr):
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        share = lambda s: round(s*n_steps)
        self.sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=n_feats, l1_coefficient=L1, l1_warm_up_steps=share(L1_WARMUP)))
        self.trainer = SAETrainer(SAETrainerConfig(total_training_samples=n_steps*batch, train_batch_size_samples=batch, lr=lr, lr_end=lr/10,
                                                   lr_warm_up_steps=share(WARMUP), lr_decay_steps=share(DECAY), autocast=self.autocast), self.sae, data_provider=None)

    def weights(self): return self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec

    def step(self, x):
        self.trainer.step(x)
        self.trainer.n_training_steps += 1  # as `fit` does

    def train(self, batches):
        self.trainer.data_provider = iter(batches)
        self.trainer.fit()


class SAELensMixed(SAELens):
    "With its trainer's mixed precision: the forward pass, and so the backward pass, in bf16 products."
    autocast = True


class DictionaryLearning:
    "StandardTrainer: ConstrainedAdam projects and renormalises."
    packages = 'dictionary-learning', 'torch'

    def __init__(self, n_feats, batch, n_steps, lr):
        from dictionary_learning.trainers.standard import StandardTrainer
        share = lambda s: round(s*n_steps)
        self.trainer = StandardTrainer(steps=n_steps, activation_dim=D_IN, dict_size=n_feats, layer=0, lm_name='A', lr=lr, l1_penalty=L1, device='cpu',
                                       warmup_steps=share(WARMUP), sparsity_warmup_steps=share(L1_WARMUP), decay_start=n_steps-share(DECAY), seed=0)
        self.done = n_steps//2  # single steps come with the whole penalty and rate

    def weights(self): return self.trainer.ae.encoder.weight.T, self.trainer.ae.encoder.bias, self.trainer.ae.decoder.weight.T, self.trainer.ae.bias

    def step(self, x): self.trainer.update(self.done, x)

    def train(self, batches):
        for i,x in enumerate(batches): self.trainer.update(i, x)


class Autocast:
    "A trainer whose `update` runs as dictionary_learning's own loop runs it with autocast_dtype=bfloat16 on CUDA; on a CPU that loop leaves the context out and multiplies in float32."
    def __init__(self, trainer): self.trainer = trainer

    def __getattr__(self, name): return getattr(self.trainer, name)

    def update(self, i, x):
        with torch.autocast('cpu', torch.bfloat16): self.trainer.update(i, x.bfloat16())


class DictionaryLearningMixed(DictionaryLearning):
    "With its loop's mixed precision."
    def __init__(self, *how):
        super().__init__(*how)
        self.trainer = Autocast(self.trainer)


class Product:
    "A limit: one matrix product of the encoder's size, and nothing else."
    packages, dtype = ('torch',), torch.float32

    def __init__(self, n_feats, batch, n_steps, lr): self.W, self.out, self.x = torch.randn(n_feats, D_IN).to(self.dtype).T, torch.empty(batch, n_feats, dtype=self.dtype), None

    def step(self, x):
        if self.x is None: self.x = x.to(self.dtype)  # once: rounding the inputs is no part of the limit
        torch.mm(self.x, self.W, out=self.out)


class ProductBF16(Product):
    "The other limit: the same product in bf16."
    dtype = torch.bfloat16


LIBRARIES = {'monosem': Monosem, 'plain': Plain, 'SAELens': SAELens, 'dictionary_learning': DictionaryLearning, 'product': Product,
             'SAELens bf16': SAELensMixed, 'dictionary_learning bf16': DictionaryLearningMixed, 'product bf16': ProductBF16}


@torch.no_grad()
def load(library, start):
    "Give a library its starting weights."
    for ours, given in zip(library.weights(), start): ours.copy_(torch.as_tensor(given))


@torch.no_grad()
def at_density(x, n_feats, l0):
    "Weights with which a vector of the batch has l0 active features on average: tied, one bias for all, centred on the batch."
    W_dec = torch.nn.functional.normalize(torch.randn(n_feats, D_IN, generator=torch.Generator().manual_seed(0)), dim=-1)
    b_dec, rows = x.mean(0), x[torch.linspace(0, len(x)-1, 256).long()]
    pre = ((rows-b_dec)@W_dec.T).flatten()
    return W_dec.T, torch.full((n_feats,), -float(pre.kthvalue(round(len(pre)*(1-l0/n_feats))).values)), W_dec, b_dec


@torch.no_grad()
def measure(weights, held):
    "Loss and its parts on held-out vectors, the same code for every library; equal functions get equal numbers whatever the decoder's norms."
    W_enc, b_enc, W_dec, b_dec = weights
    norms, total = W_dec.norm(dim=-1), np.zeros(3)
    for rows in held.split(256):
        f = torch.relu((rows-b_dec)@W_enc + b_enc)
        total += [float((f@W_dec+b_dec-rows).square().sum()), float((f@norms).sum()), float((f > 0).sum())]
    mse, l1, l0 = total/len(held)
    return dict(loss=mse+L1*l1, mse=mse, l1=l1, l0=l0)


def read(file, n):
    "The next n vectors of a file of half-precision ones, -1 for all; read, not mapped, so that the file does not count as memory of the process."
    return torch.from_numpy(np.fromfile(file, np.float16, n*D_IN if n > 0 else -1).reshape(-1, D_IN).astype(np.float32))


class Batches:
    "The batches of a file in their order; before every `every`-th the clock stops, the dictionary is measured, and the parent's word awaited."
    def __init__(self, path, batch, n_steps, every, report):
        self.path, self.batch, self.n_steps, self.every, self.report, self.seconds = path, batch, n_steps, every, report, 0.

    def __len__(self): return self.n_steps

    def __iter__(self):
        with open(self.path, 'rb') as file:
            for i in range(self.n_steps):
                if i % self.every == 0: self.pause(i)
                yield read(file, self.batch)

    def pause(self, i, **more):
        if i: self.seconds += time.perf_counter()-self.mark
        self.report(step=i, seconds=self.seconds, **more)
        self.mark = time.perf_counter()


class Worker:
    def __init__(self, name): self.name, self.base = name, None

    def hello(self):
        "Import everything; what the process then takes is its baseline."
        cls = LIBRARIES[self.name]
        cls(8, 8, 100, 1e-3)
        self.base = memory_mb('VmRSS')
        self.say(versions={p: version(p) for p in cls.packages})

    def say(self, **answer): print(json.dumps(answer), file=answers, flush=True)

    def memory(self): return dict(baseline_mb=self.base, peak_mb=memory_mb('VmHWM'))

    def prepare(self, data, n_feats, batch, l0):
        self.library, self.x = LIBRARIES[self.name](n_feats, batch, 10**6, 1e-12), read(data, batch)
        limit = issubclass(LIBRARIES[self.name], Product)
        if not limit: load(self.library, at_density(self.x, n_feats, l0))
        for _ in range(2): self.library.step(self.x)
        Path('/proc/self/clear_refs').write_text('5')  # the peak is that of steps, not of preparing
        self.library.step(self.x)
        self.say(l0=None if limit else measure(self.library.weights(), self.x)['l0'])

    def turn(self, seconds):
        "Seconds per step, and of our encoder's product. A step is repeated until `seconds` passed; the first is not counted where it is short."
        def timed(f):
            start = time.perf_counter()
            f(self.x)
            return time.perf_counter()-start
        def mean(f):
            times = [timed(f)]
            if times[0] < seconds: times = [timed(f)]
            while sum(times) < seconds: times.append(timed(f))
            return sum(times)/len(times)
        self.say(seconds=mean(self.library.step), encode=mean(self.library.encode) if self.name == 'monosem' else None, **self.memory())

    def run(self, data, held, start, n_feats, batch, n_steps, every, lr):
        "Train from the start to the end of the data, reporting and waiting at every pause."
        library, held = LIBRARIES[self.name](n_feats, batch, n_steps, lr), read(held, -1)
        if self.name != 'monosem':
            given = dict(np.load(start))
            if self.name.startswith('SAELens'): given['W_dec'] *= .1  # its own start: rows of a tenth, the encoder their transpose
            load(library, given.values())
        def report(step, **more):
            self.say(step=step, **more, **(measure(library.weights(), held) if step else {}))
            if step < n_steps: sys.stdin.readline()  # until the parent says go on
        batches = Batches(data, batch, n_steps, every, report)
        library.train(batches)
        batches.pause(n_steps, done=True, **self.memory())


def main():
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        getattr(worker, order.pop('do'))(**order)


if __name__ == '__main__': main()
