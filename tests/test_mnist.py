"Digits: damaged files are refused, splits do not leak, and a fixed sample size is one."
import gzip

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from monosem.mnist import (MLPConfig, Shuffled, at_l0, load_digits, load_fashion, load_mnist, match_l0, measure_units, read_idx, seed_interval,
                           train_mlp, write_idx)
from monosem.neuron_embeddings import ClusterConfig


@settings(max_examples=50, deadline=None)
@given(array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)), suffix=st.sampled_from(['', '.gz', '.xz']))
def test_idx_round_trip(array, suffix, tmp_path_factory):
    path = write_idx(tmp_path_factory.mktemp('idx')/f'a{suffix}', array)
    back = read_idx(path)
    assert back.shape == array.shape and np.array_equal(back, array)


@pytest.mark.parametrize('keep', [0, 1, 3, 4, 7, 15, 16, 100, -1])
def test_a_cut_idx_file_is_refused(tmp_path, keep):
    raw = write_idx(tmp_path/'a', np.zeros((3, 28, 28), np.uint8)).read_bytes()
    (tmp_path/'b').write_bytes(raw[:keep])
    (tmp_path/'c').write_bytes(raw+b'\0')
    for name in 'bc':
        with pytest.raises(ValueError, match=name): read_idx(tmp_path/name)


@pytest.mark.parametrize('suffix', ['.gz', '.xz'])
def test_a_damaged_archive_is_refused(tmp_path, suffix):
    raw = write_idx(tmp_path/f'a{suffix}', np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)).read_bytes()
    for bad in (b'', raw[:20], raw[:-1], b'no archive'):
        (tmp_path/f'b{suffix}').write_bytes(bad)
        with pytest.raises(ValueError, match=f'b{suffix}'): read_idx(tmp_path/f'b{suffix}')


@pytest.mark.parametrize('first', [b'\0\0\x0d\x03', b'\0\0\x08\0', b'\x1f\x8b\x08\0'])
def test_another_number_type_is_refused(tmp_path, first):
    (tmp_path/'a').write_bytes(first+bytes(64))
    with pytest.raises(ValueError, match='first bytes'): read_idx(tmp_path/'a')


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='train-images'): load_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match='train-images'): load_fashion(tmp_path/'none')


def four(folder, n=20, labels=10, shape=(28, 28)):
    rng = np.random.default_rng(0)
    for part in ('train', 't10k'):
        write_idx(folder/f'{part}-images-idx3-ubyte.gz', rng.integers(0, 256, (n, *shape), dtype=np.uint8))
        write_idx(folder/f'{part}-labels-idx1-ubyte', np.arange(n, dtype=np.uint8) % labels)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    four(tmp_path)
    assert len(load_mnist(tmp_path).train) == 20 and 'Fashion' in str(load_fashion(tmp_path)) and 'Fashion' not in str(load_mnist(tmp_path))
    write_idx(tmp_path/'t10k-labels-idx1-ubyte', np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match='belong together'): load_mnist(tmp_path)
    four(tmp_path, labels=11)
    with pytest.raises(ValueError, match='labels up to 10'): load_mnist(tmp_path)
    four(tmp_path, shape=(28, 27))
    with pytest.raises(ValueError, match='28, 27'): load_mnist(tmp_path)


def test_the_digits(root):
    if not (root/'data'/'mnist').is_dir(): pytest.skip('no data/ here: a wheel')
    d, other = load_digits(), load_digits(n_test=1000, seed=1)
    assert (len(d.train), len(d.test), len(other.test)) == (8000, 2000, 1000)
    keys = [{r.tobytes() for r in d.pixels(x)} for x in (d.train, d.test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 10_000
    assert torch.equal(load_digits().test, d.test)
    assert np.abs(np.bincount(other.test_labels)/1000-np.bincount(np.r_[d.train_labels, d.test_labels])/10_000).max() < 2e-3
    with pytest.raises(ValueError, match='n_test'): load_digits(n_test=10_000)


def test_training_is_reproducible(tmp_path):
    four(tmp_path, n=64)
    data, cfg = load_mnist(tmp_path), MLPConfig(n_hidden=8, epochs=2, batch=16, seed=3)
    a, b = train_mlp(data, cfg), train_mlp(data, cfg)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert not any(p.requires_grad for p in a.parameters())


def test_shuffled_batches_come_again():
    s = Shuffled(torch.arange(10.)[:, None], 4, 3, seed=1)
    first, second = list(s), list(s)
    assert len(first) == len(s) == 6 and all(torch.equal(a, b) for a,b in zip(first, second))
    with pytest.raises(ValueError, match='batch=11'): Shuffled(torch.zeros(10, 1), 11, 1)


def test_units_with_too_few_examples_are_left_out():
    gen = torch.Generator().manual_seed(0)
    h, acts = torch.rand(50, 6, generator=gen), torch.rand(50, 4, generator=gen)
    acts[:, 1] = 0          # never fires
    acts[5:, 2] = 0         # fires five times
    found = measure_units(h, torch.ones(4, 6), acts, np.zeros(50, np.int64), ClusterConfig(share=0., most=10))
    assert found.unit.tolist() == [0, 3] and (found.n == 10).all() and (found.purity == 1).all()
    assert len(measure_units(h, torch.ones(4, 6), torch.zeros(50, 4), np.zeros(50, np.int64))) == 0
    zero = measure_units(torch.zeros(50, 6), torch.ones(4, 6), acts, np.zeros(50, np.int64), ClusterConfig(share=0., most=10))
    assert (zero['mean'] == 1).all() and np.isfinite(zero.reads).all()


def test_nothing_is_extrapolated():
    rows = pd.DataFrame([dict(weight=w, seed=s, l0=l, m=l) for w in (0., 1.) for s in (0, 1) for l in (4., 16.)])
    assert np.allclose(at_l0(rows, 8., ['m']).m, 10)
    assert len(at_l0(rows, 3.9, ['m'])) == len(at_l0(rows, 16.1, ['m'])) == 0
    with pytest.raises(ValueError, match='L0 17'): match_l0(rows, [17.], 1., ['m'])
    for bad in ([1.], [1., float('nan')]):
        with pytest.raises(ValueError, match='at least 2'): seed_interval(bad)
