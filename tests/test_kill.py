"A training process is killed, stopped, starved of disk; started again, it ends with the very same weights."
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

# One thread; a few seconds of training with resampling, checkpoints every 10 steps, on a stream that harvests in blocks.
PROGRAM = '''
import sys, torch
import numpy as np
from safetensors.torch import save_file
from monosem.activations import ActivationStream, StreamConfig
from monosem.checkpoints import Checkpoints
from monosem.core import save_artefact
from monosem.tokens import TokenWindows
from monosem.resampling import ResampleConfig, Resampler
from monosem.sae import SAEConfig
from monosem.training import SAETrainConfig, train_saes
torch.set_num_threads(1)
out, pause = sys.argv[1], float(sys.argv[2])
gen = np.random.default_rng(0)
table = torch.from_numpy(gen.standard_normal((500, 48)).astype('float32')).relu()
windows = TokenWindows(gen.integers(0, 500, (1200, 32)).astype(np.uint16), np.zeros((1200, 32), np.int32), [], {})
stream = ActivationStream(lambda t: table[t], windows, StreamConfig(batch=128, block=4096, per_window=16))
print('ready', flush=True)
def slow(state):
    import time; time.sleep(pause)
    if state.step % 5 == 0: print(state.step, flush=True)
def silence(state):  # so that there is something to resample, and random numbers are drawn
    if state.step in (20, 70): state.sae.b_enc.data[:7] = -50.
resamplers = []
def callbacks():
    resamplers.append(Resampler(ResampleConfig(at=(.3, .6), window=1000, pool=1024)))
    return [resamplers[-1], slow, silence]
cfg = SAETrainConfig(lr=3e-3, warmup=.1, decay=.2, rewarm=.05, l1_warmup=.1, dead_window=2000)
done = train_saes(stream, [SAEConfig(d_in=48, n_feats=96, l1=.3), SAEConfig(d_in=48, n_feats=64, l1=.6, seed=1)], cfg,
                  callbacks, checkpoints=Checkpoints(out+'/checkpoints', every_s=None, every_steps=10))
for i,d in enumerate(done): save_artefact(f'{out}/{i}', dict(d.sae.named_parameters()), dict(log=d.log.to_dict('list'), resampled=[h['resampled'] for h in resamplers[i].history]))
'''


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp('kill')/'program.py'
    path.write_text(PROGRAM)
    return path


def _start(program, out, pause=.01, **kw):
    return subprocess.Popen([sys.executable, '-W', 'always', program, out, str(pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1'), **kw)


def _hash(out): return [hashlib.sha256((out/str(i)/f).read_bytes()).hexdigest() for i in (0, 1) for f in ('weights.safetensors', 'config.json')]


@pytest.fixture(scope='module')
def undisturbed(program, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')
    p = _start(program, out, 0)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    for i in (0, 1): assert json.loads((out/str(i)/'config.json').read_text())['resampled'] == [7, 7]
    return _hash(out)


def _finish(program, out):
    p = _start(program, out, 0)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    return err


def _kill_at_random(program, out, gen):
    "Start, wait until it trains and then a random moment, kill -9."
    p = _start(program, out)
    for _ in range(2): p.stdout.readline()  # 'ready', and the first five steps
    time.sleep(gen.uniform(0, 1.2))
    p.send_signal(signal.SIGKILL)
    p.communicate()
    return p.returncode


def _killed_and_resumed(program, undisturbed, out, seed):
    "Two kills, then to the end."
    gen = random.Random(seed)
    kills = [_kill_at_random(program, out, gen) for _ in range(2)]
    assert -signal.SIGKILL in kills or 0 in kills
    _finish(program, out)
    assert _hash(out) == undisturbed
    return kills.count(-signal.SIGKILL)


def test_three_kills_lose_nothing(program, undisturbed, tmp_path):
    gen = random.Random(0)
    assert [_kill_at_random(program, tmp_path, gen) for _ in range(3)].count(-signal.SIGKILL) >= 2
    assert any((tmp_path/'checkpoints').glob('step-*'))
    _finish(program, tmp_path)
    assert _hash(tmp_path) == undisturbed


@pytest.mark.skipif('MONOSEM_SLOW' not in os.environ, reason='slow suite: MONOSEM_SLOW=1')
def test_twenty_kills_lose_nothing(program, undisturbed, tmp_path):
    assert sum(_killed_and_resumed(program, undisturbed, tmp_path/str(i), i) for i in range(12)) >= 20


@pytest.mark.parametrize('number,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_checkpoint(program, undisturbed, tmp_path, number, code):
    p = _start(program, tmp_path)
    while p.stdout.readline().strip() != '25': pass
    p.send_signal(number)
    _, err = p.communicate(timeout=60)
    assert p.returncode in (code, -number) and (number == signal.SIGTERM or 'the checkpoint is in' in err)
    steps = sorted(int(c.name.split('-')[1]) for c in (tmp_path/'checkpoints').glob('step-*'))
    assert steps[-1] > 20 and steps[-1] % 10  # not one of the periodic ones
    _finish(program, tmp_path)
    assert _hash(tmp_path) == undisturbed


@pytest.mark.parametrize('number,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_exits_with_the_code_of_the_signal(tmp_path, number, code):
    command = [sys.executable, '-m', 'monosem', 'train', '--tokens', '60000', '--features', '256', '--batch', '64', '--resample-at', '--out', tmp_path, '--device', 'cpu']
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={k: v for k,v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1'))
    line = ''
    while 'dictionaries' not in line: line += p.stderr.read(1)  # the bar of the training loop
    time.sleep(.5)
    p.send_signal(number)
    _, err = p.communicate(timeout=60)
    assert p.returncode == code and 'Traceback' not in err
    assert any((tmp_path/'checkpoints').glob('step-*'))


@pytest.mark.parametrize('damage', ['truncated', 'altered', 'missing'])
def test_a_damaged_checkpoint_is_passed_over(program, undisturbed, tmp_path, damage):
    p = _start(program, tmp_path)
    while p.stdout.readline().strip() != '40': pass
    p.kill(); p.communicate()
    newest = sorted((tmp_path/'checkpoints').glob('step-*'))[-1]/'state.safetensors'
    content = bytearray(newest.read_bytes())
    if damage == 'truncated': newest.write_bytes(content[:len(content)//2])
    elif damage == 'missing': newest.unlink()
    else:
        content[len(content)//2] ^= 1
        newest.write_bytes(content)
    err = _finish(program, tmp_path)
    assert 'is damaged' in err and 'the checkpoint before it is used' in err
    assert _hash(tmp_path) == undisturbed


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run(program, undisturbed, tmp_path):
    "Files may not grow beyond 1 kB: every write of a checkpoint fails, training goes on, what was there stays."
    p = _start(program, tmp_path)
    while p.stdout.readline().strip() != '40': pass
    p.kill(); p.communicate()
    before = sorted((tmp_path/'checkpoints').glob('step-*'))
    full = _start(program, tmp_path, 0, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    _, err = full.communicate(timeout=300)
    assert 'no checkpoint at step' in err and 'Training goes on' in err
    assert full.returncode != 0 and 'cannot write' in err.splitlines()[-1]  # the dictionary itself could not be saved, and says so
    assert sorted((tmp_path/'checkpoints').glob('*')) == before
    _finish(program, tmp_path)
    assert _hash(tmp_path) == undisturbed


def test_an_unwritable_folder_is_named(program, tmp_path):
    blocker = tmp_path/'checkpoints'
    blocker.write_text('a file, not a folder')
    p = _start(program, tmp_path, 0)
    _, err = p.communicate(timeout=120)
    assert 'choose a writable output folder' in err
