"Seconds of SAELens' training step on a device, in float32 and with its mixed precision, as JSON; benchmarks/gpu.py runs it, in the environment that has SAELens."
import json, sys, time
from functools import partial
from importlib.metadata import version

import numpy as np
import torch


def timed(f, device, enough):
    "Median seconds of a call, the first two left out; where there is no GPU, of one call, to try the logic."
    gpu, times = device.type == 'cuda', []
    wait = partial(torch.cuda.synchronize, device) if gpu else lambda: None
    while len(times) < (5 if gpu else 1) or gpu and sum(times) < enough:
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter()-start)
    return float(np.median(times[2:] if gpu else times))


def main(device, batch, d_in, n_feats, enough):
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    seconds, x = {}, torch.randn(batch, d_in, device=device)
    for name, autocast in (('float32', False), ('bf16', True)):
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=n_feats, l1_coefficient=2.5, device=device))
        cfg = SAETrainerConfig(total_training_samples=10**6*batch, train_batch_size_samples=batch, lr=1e-12, lr_end=1e-13, autocast=autocast, device=device)
        trainer = SAETrainer(cfg, sae, data_provider=None)
        seconds[name] = timed(lambda: trainer.step(x), torch.device(device), enough)
    print(json.dumps(dict(version=version('sae-lens'), torch=torch.__version__, seconds=seconds)))


if __name__ == '__main__': main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
