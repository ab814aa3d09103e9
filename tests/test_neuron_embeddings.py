"Neuron embeddings: properties of distances and clusters, bad input, and the loss over time."
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse.csgraph import connected_components

from monosem.checkpoints import Checkpoints
from monosem.neuron_embeddings import (ClusterConfig, Units, agreement, cluster, cluster_stats, cosine_distances, effective_number,
                                       flat_map, polysemy, strong_examples, token_importance)
from monosem.one_meaning import Monosemanticity, MonosemanticGradients
from monosem.sae import SAE, SAEConfig
from monosem.planted import planted
from monosem.training import SAETrainConfig, TrainState, pack_state, train_sae, unpack_state

few = st.integers(0, 12).flatmap(lambda n: hnp.arrays(np.float64, (n, 3), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))


@settings(max_examples=60, deadline=None)
@given(few, st.sampled_from([0., .05, .5, 1., 2.]))
def test_distances_and_clusters_are_defined_for_any_embeddings(e, threshold):
    with warnings.catch_warnings(), np.errstate(all='raise', under='ignore'):
        warnings.simplefilter('error')
        d = cosine_distances(e)
        assert d.shape == (len(e), len(e)) and (d >= 0).all() and (d <= 2).all() and (d == d.T).all() and (np.diag(d) == 0).all()
        for link in ('average', 'single'):
            labels = cluster(d, ClusterConfig(linkage=link, threshold=threshold))
            sizes = np.bincount(labels)
            assert len(labels) == len(e) and (sizes > 0).all() and (np.diff(sizes) <= 0).all()
            if link == 'single' and len(e): assert len(sizes) == connected_components(d <= threshold)[0]
            s = cluster_stats(d, labels)
            assert s.n == len(e) and s.n_clusters == len(sizes)
            assert (s.intra is None or s.intra <= s.max+1e-12) and 0 <= effective_number(labels) <= len(sizes)+1e-9
        place = flat_map(d)
        assert place.at.shape == (len(e), 2) and 0 <= place.kept <= 1+1e-9


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(-10, 10).map(lambda v: round(v, 3))), st.floats(.01, 100))
def test_distances_do_not_see_scale_or_the_order_of_coordinates(e, c):
    assert np.allclose(cosine_distances(e), cosine_distances(c*e[:, ::-1]), atol=1e-9)


@pytest.mark.parametrize('bad', [np.array([[1., np.nan]]), np.array([[np.inf, 0.]]), np.ones(3)])
def test_unusable_embeddings_are_refused(bad):
    with pytest.raises(ValueError, match='expected'): cosine_distances(bad)


@pytest.mark.parametrize('bad', [dict(share=1.), dict(share=-.1), dict(most=0), dict(linkage='ward'), dict(threshold=2.5)])
def test_bad_cluster_configs_are_refused(bad):
    with pytest.raises(ValueError, match='expected'): ClusterConfig(**bad)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=15))
def test_agreement_is_defined_and_bounded(pairs):
    labels, kinds = (np.array([p[i] for p in pairs], dtype=int) for i in (0, 1))
    a = agreement(labels, kinds)
    if not pairs: assert a == (None, None, None)
    else: assert 0 < a.purity <= 1 and 0 < a.chance <= 1 and (a.ami is None or a.ami <= 1+1e-9)


def test_means_stay_for_silent_units_and_restore():
    loss, h, w = Monosemanticity(.5), torch.ones(3, 2), torch.ones(2, 2)
    loss(h, w, torch.tensor([[True, False]]*3))
    loss(3*h, w, torch.tensor([[False, False]]*3))
    assert loss.mean.tolist() == [[1, 1], [0, 0]] and loss.seen.tolist() == [True, False]
    other = Monosemanticity(.5)
    other.load_state_dict(loss.state_dict())
    on = torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(loss(h.flip(0)*torch.tensor([1., 2.]), w, on), other(h*torch.tensor([1., 2.]), w, on)) and torch.equal(loss.mean, other.mean)
    with pytest.raises(ValueError, match='new Monosemanticity'): loss(h, torch.ones(3, 2), torch.ones(3, 3, dtype=torch.bool))


def test_weight_zero_is_the_plain_trainer():
    _, x = planted(12, 8, 512)
    xs = list(x.split(64))
    plain = train_sae(xs, SAEConfig(8, 16, .1), SAETrainConfig())
    zero = train_sae(xs, SAEConfig(8, 16, .1), SAETrainConfig(), gradients=lambda: MonosemanticGradients(weight=0.))
    heavy = train_sae(xs, SAEConfig(8, 16, .1), SAETrainConfig(), gradients=lambda: MonosemanticGradients(weight=5.))
    assert all(torch.equal(p, q) for p,q in zip(plain.sae.parameters(), zero.sae.parameters()))
    assert not torch.equal(plain.sae.W_enc, heavy.sae.W_enc)


def test_running_means_survive_a_checkpoint(tmp_path):
    _, x = planted(12, 8, 512)
    xs = x.split(64)
    make = lambda: TrainState(SAEConfig(8, 16, .1), SAETrainConfig(), len(xs), gradients=MonosemanticGradients(weight=2.))
    a, b = make(), make()
    for y in xs[:4]: a(y)
    tensors, meta = pack_state(a)
    unpack_state(b, {k: v.clone() for k,v in tensors.items()}, json.loads(json.dumps(meta)))
    for s in (a, b):
        for y in xs[4:]: s(y)
    assert all(torch.equal(p, q) for p,q in zip(a.sae.parameters(), b.sae.parameters())) and torch.equal(a.gradients.loss.mean, b.gradients.loss.mean)


def test_a_checkpoint_of_another_weight_is_refused(tmp_path):
    _, x = planted(12, 8, 512)
    run = lambda weight: train_sae(list(x.split(64)), SAEConfig(8, 16, .1), checkpoints=Checkpoints(tmp_path, every_s=None, every_steps=2), gradients=lambda: MonosemanticGradients(weight=weight))
    run(1.)
    with pytest.raises(ValueError, match='another run'): run(2.)


def test_examples_do_not_depend_on_the_batch(mini, tok):
    from monosem.tokens import Mixture, token_windows
    from monosem.neuron_embeddings import neurons_of
    from monosem.transformer import load_transformer
    units, windows = neurons_of(load_transformer('A', 'cpu')), token_windows(mini, tok, Mixture(budget=12_000), validation=True, spread=True)
    a, b = strong_examples(units, windows, batch=3), strong_examples(units, windows, batch=16)
    assert np.array_equal(a.at, b.at) and np.array_equal(a.n_strong, b.n_strong) and torch.allclose(a.h, b.h, atol=1e-5)
    t = polysemy(a, windows)
    assert len(t) == 512 and t.drop(columns=['kind', 'intra', 'inter', 'ami', 'mean', 'max']).notna().all().all()
    assert polysemy(a, windows, size=20).n_examples.eq(20).all()


def test_importance_of_a_context_shorter_than_asked():
    units = Units('adder', torch.ones(1, 1), torch.zeros(1), lambda t: t.float().cumsum(1)[..., None])
    assert token_importance(units, 0, torch.tensor([2, 1]), n=12).tolist() == [1, .5]
