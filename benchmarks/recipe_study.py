"""What each part of the recipe is worth on a model's neurons, and what is left of every claim beside the controls.

    python benchmarks/recipe_study.py --model runs/full/A --tokenizer runs/full/tokenizer.json --sae runs/full/A-1

Resumable: the same command goes on where it stopped, inside a run too. Every run has the same budget (--vectors), schedule and seed as its
partners; a seed has a dictionary seed, a stream and a draw of the text of its own. Writes nbs/results/recipe.json (a row per recipe and seed; the density
clusters) and nbs/results/controls.json (a row per seed, dictionary and measure, with intervals over documents; paired over seeds), and
prints both as tables. `--tiny` tries all of it in two minutes; its results go to --out."""
import argparse, json, shutil, time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from monosem.activations import ActivationStore, ActivationStream, StreamConfig, store_activations
from monosem.active import active_set
from monosem.checkpoints import Checkpoints, differences
from monosem.controls import compare, fixed_controls, mean_l0, train_controls
from monosem.core import Estimate, make_generator, mean_of, run_record, store, write_json
from monosem.corpus import load_corpus
from monosem.evaluation import evaluate
from monosem.features import Tally
from monosem.hooked import at_hook
from monosem.neuron_embeddings import features_of, polysemy, strong_examples
from monosem.proxies import claim_measures, test_contexts
from monosem.recipe import density_clusters, held_out, paired, recipes, student
from monosem.resampling import ResampleConfig
from monosem.sae import SAEConfig, load_sae, save_sae
from monosem.steering import PATTERNS, dose_response
from monosem.tokens import Mixture, load_tokenizer, token_windows
from monosem.training import SAETrainConfig, train_sae
from monosem.transformer import load_transformer

TINY = dict(vectors=40_960, short=8_192, n_feats=256, batch=256, held=4_096, eval_tokens=10_000, test_tokens=60_000, density_tokens=50_000,
            seeds=2, window=5_000, pool=4_096, texts=4, units=20, per_window=96, corpus='mini', ica_iterations=10)


def options():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--model', default='A', help='shipped name or artefact folder')
    p.add_argument('--tokenizer', help='its tokenizer.json; the shipped one if left out')
    p.add_argument('--sae', help='a dictionary (artefact folder) for the density histogram; else the published recipe of seed 0')
    p.add_argument('--corpus', default='core', help='see load_corpus')
    p.add_argument('--shares', choices=('paper', 'usual'), default='paper', help='mixture of the training text')
    p.add_argument('--parts', nargs='+', choices=('recipes', 'controls', 'density'), default=['recipes', 'controls', 'density'])
    p.add_argument('--vectors', type=int, default=3_000_000, help='budget of every run')
    p.add_argument('--short', type=int, default=200_000, help='budget of every try of a coefficient')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--n-feats', type=int, default=4096)
    p.add_argument('--l1', type=float, default=2.5, help='of the published recipe')
    p.add_argument('--batch', type=int, default=2048)
    p.add_argument('--per-window', type=int, default=96)
    p.add_argument('--window', type=int, default=100_000, help='vectors without firing that make a feature dead')
    p.add_argument('--pool', type=int, default=40_960, help='inputs to resample from')
    p.add_argument('--held', type=int, default=40_960, help='held-out vectors of the recipe rows')
    p.add_argument('--eval-tokens', type=int, default=100_000, help='validation tokens of loss recovered, recipes')
    p.add_argument('--test-tokens', type=int, default=500_000, help='validation tokens on which claims are measured; as many again choose thresholds')
    p.add_argument('--density-tokens', type=int, default=10_000_000)
    p.add_argument('--texts', type=int, default=20, help='texts per steering dose')
    p.add_argument('--units', type=int, default=300, help='features per dictionary for the embedding distances')
    p.add_argument('--ica-iterations', type=int, default=100, help='of FastICA, a few seconds each')
    p.add_argument('--out', type=Path, default=Path('runs/recipe_study'))
    p.add_argument('--results', type=Path, default=Path('nbs/results'))
    p.add_argument('--tiny', action='store_true', help='everything small, results in --out')
    o = p.parse_args()
    if o.tiny: vars(o).update(TINY, out=o.out/'tiny', results=o.out/'tiny')
    return o


class Study:
    "Model, text and settings; what is done is kept in a folder and not done again."
    def __init__(self, o):
        self.o, self.out = o, o.out
        settings = {k: str(v) for k,v in vars(o).items() if k not in ('out', 'results', 'parts', 'tiny', 'seeds')}
        path = self.out/'settings.json'
        if path.exists() and (diff := differences(settings, json.loads(path.read_text()))):
            raise SystemExit(f'{path} is of another study ({"; ".join(diff)}): choose another --out, or remove it.')
        write_json(path, settings)
        self.at, self.tok = at_hook(load_transformer(o.model)), load_tokenizer(*([o.tokenizer] if o.tokenizer else []))
        self.corpus, self.n_ctx = load_corpus(o.corpus), min(256, self.at.n_ctx)
        self.per_run = -(-(o.vectors+o.batch*8)//o.per_window)  # windows
        self.shape = SAEConfig(self.at.d_in, o.n_feats, o.l1)
        self.cfg, self.resample = SAETrainConfig(dead_window=o.window), ResampleConfig(window=o.window, pool=o.pool)
        self.texts, self.begin = {}, time.time()

    def once(self, name, make):
        "A JSON result, from its file if it is there."
        path = self.out/f'{name}.json'
        if not path.exists(): write_json(path, make())
        return json.loads(path.read_text())

    def dictionary(self, name, make):
        "A dictionary, from its folder if it is there."
        folder = self.out/name
        if not folder.exists():
            start = time.time()
            sae = make()
            save_sae(sae, folder, run_record(seconds=round(time.time()-start)))
            self.say(f'{name} trained in {time.time()-start:.0f} s')
        return load_sae(folder, self.at.device)

    def say(self, text): print(f'[{(time.time()-self.begin)/60:6.1f} min] {text}', flush=True)

    def text(self, tokens):
        "Windows of validation text."
        if tokens not in self.texts:
            self.texts[tokens] = token_windows(self.corpus, self.tok, Mixture(budget=tokens), validation=True, n_ctx=self.n_ctx, spread=True)
        return self.texts[tokens]

    def halves(self):
        "Windows on which thresholds and coefficients are chosen, and windows of other documents' beginnings to measure on."
        windows = self.text(2*self.o.test_tokens)
        return windows[::2], windows[1::2]

    def training_text(self, seed, tokens=None):
        "Windows of training text, drawn anew for each seed; as many as a run needs."
        mixture = Mixture.paper if self.o.shares == 'paper' else Mixture
        return token_windows(self.corpus, self.tok, mixture(budget=tokens or self.per_run*self.n_ctx, seed=seed), n_ctx=self.n_ctx)

    def vectors(self, seed, batch=None):
        "The activations of a seed on disk, made when they are wanted first."
        cfg = StreamConfig(batch=self.o.batch, per_window=self.o.per_window, seed=seed, block=min(262_144, self.o.vectors))
        folder = self.out/f'activations-{seed}'
        if not (folder/'store.json').exists() or len((s := json.loads((folder/'store.json').read_text()))['blocks']) < len(s['sizes']):
            store_activations(ActivationStream(self.at, self.training_text(seed), cfg), folder)
        return ActivationStore(folder, batch or self.o.batch, seed=seed)

    def held(self, windows, n):
        "Activations in random order, from the first of some windows."
        few = windows[:-(-4*n//self.n_ctx)]
        x = torch.cat([self.at(few.ids(rows, self.at.device)).flatten(0, 1).cpu() for rows in np.array_split(np.arange(len(few)), -(-len(few)//64))])
        return x[torch.randperm(len(x), generator=make_generator(0))[:n]].to(self.at.device)

    def checkpoints(self, name): return Checkpoints(self.out/f'checkpoints-{name}', every_s=60.)

    def train(self, name, kind, seed, batch=None):
        "One run of a recipe."
        def make():
            kept = self.checkpoints(f'{name}-{seed}')
            done = train_sae(self.vectors(seed, batch), replace(self.shape, seed=seed), self.cfg, kind.callbacks(), self.at.device, name, kept, update=kind.update)
            shutil.rmtree(kept.folder, ignore_errors=True)
            return done.sae
        return self.dictionary(f'{name}-{seed}', make)


# --- the recipe ---

def variants(s):
    "Name to recipe and batch size."
    known = {k: (r, s.o.batch) for k,r in recipes(s.resample).items()}
    published = known['published'][0]
    return known | {f'batch {b:,}': (published, b) for b in (s.o.batch//4, 2*s.o.batch)}


def study_recipes(s):
    held = s.held(s.halves()[1], s.o.held)
    kinds, rows = variants(s), []
    for seed in range(s.o.seeds):
        for name,(kind, batch) in kinds.items():
            def row():
                sae = s.train(name, kind, seed, batch)
                e = evaluate(s.at, sae, s.text(s.o.eval_tokens))
                of_fired = e.density[e.density > 0]
                return dict(recipe=name, seed=seed) | held_out(sae, held)._asdict() | dict(
                    recovered=e.recovered.value, dead=e.n_dead, median_density=float(np.median(of_fired)) if len(of_fired) else 0.)
            rows.append(s.once(f'recipe-{name}-{seed}', row))
            s.say(f'{len(rows)} of {len(kinds)*s.o.seeds} recipes: ' + ', '.join(f'{k} {v:.3g}' for k,v in rows[-1].items() if k not in ('recipe', 'seed')))
    record = run_record(**{k: getattr(s.o, k) for k in ('vectors', 'seeds', 'n_feats', 'l1', 'batch', 'held', 'eval_tokens', 'shares')})
    _keep(s, 'recipe', dict(run=record, rows=rows))
    table = pd.DataFrame(rows)
    means = table.drop(columns='seed').groupby('recipe', sort=False).mean()
    print(means.round(4).to_string())
    if s.o.seeds > 1: print(pd.DataFrame({k: {n: str(e) for n,e in paired(table, k).items()} for k in ('loss', 'recovered', 'alive')}).to_string())


def _keep(s, name, parts):
    "Write parts of a result file and keep the others."
    for section, value in parts.items(): store(name, value, section, folder=s.o.results)


# --- the controls ---

def dictionaries(s, seed, chooses):
    "The published recipe and all controls of a seed, with how their L0 came about."
    trained = s.train('published', recipes(s.resample)['published'], seed)
    l0, out, found = mean_l0(trained, chooses), dict(trained=trained), {}
    folder = s.out/f'controls-{seed}'
    def make():
        batches = s.vectors(seed)
        short = list(islice(batches.batches(), max(1, s.o.short//s.o.batch)))
        made = train_controls(batches, short, chooses, replace(s.shape, seed=seed), s.cfg, l0, recipes(s.resample)['published'],
                              kept=lambda name: s.checkpoints(f'control-{seed}-{name}'))
        for name,c in made.items(): save_sae(c.sae, folder/name)
        for kept in s.out.glob(f'checkpoints-control-{seed}-*'): shutil.rmtree(kept)
        return {name: dict(l1=c.l1, tried=[list(t) for t in c.tried.items()], short=[list(t) for t in c.short.items()]) for name,c in made.items()}
    found = s.once(f'controls-{seed}', make)
    out |= {name: load_sae(folder/name, s.at.device) for name in found}
    return out | fixed_controls(chooses, l0, s.o.n_feats, seed, s.o.ica_iterations), dict(l0=l0, searches=found)


def steering(s, dictionaries):
    "Share of written characters in each context with its feature pinned at its maximum on the text; the same draws for all."
    rows = []
    for name, sae in dictionaries.items():
        tests, _ = test_contexts(s.at, sae, s.tok, s.halves()[1])
        for t in tests:
            dose = dose_response(s.at, sae, s.tok, t.feature, t.max_act, PATTERNS[t.context], doses=(0, 1, 2), n=s.o.texts)
            rows += [dict(dictionary=name, measure=f'{t.context}: share written at {m}x', value=list(d.share), difference=None) for m,d in dose.items()]
    return rows


def embeddings(s, dictionaries):
    "Mean distance of the embeddings of 20 strong examples, over features drawn among those that have as many."
    rows, windows = [], s.halves()[1]
    for name, sae in dictionaries.items():
        strong = strong_examples(features_of(s.at, sae, name), windows)
        table = polysemy(strong, windows, size=20)
        few = table['mean'].dropna().sample(min(s.o.units, len(table)), random_state=0)
        if len(few): rows.append(dict(dictionary=name, measure='neuron-embedding distance', value=list(mean_of(few)), difference=None))
    return rows


def study_controls(s):
    chooses = s.held(s.halves()[0], max(s.o.held, 4*s.at.d_in))
    rows, found = [], []
    for seed in range(s.o.seeds):
        made, how = dictionaries(s, seed, chooses)
        found.append(dict(seed=seed) | how)
        def measured():
            table = compare(made, claim_measures(s.at, s.tok, s.halves()[1]))
            table['value'] = table['value'].map(list)
            table['difference'] = table['difference'].map(lambda e: None if e is None else list(e))
            return [dict(seed=seed) | r for r in [*table.to_dict('records'), *steering(s, made), *embeddings(s, made)]]
        rows += s.once(f'claims-{seed}', measured)
        s.say(f'claims of seed {seed} measured')
    record = run_record(**{k: getattr(s.o, k) for k in ('vectors', 'short', 'seeds', 'n_feats', 'l1', 'batch', 'test_tokens', 'texts', 'units', 'shares')})
    over_seeds = claims_over_seeds(rows) if s.o.seeds > 1 else []
    _keep(s, 'controls', dict(run=record, searches=found, rows=rows, over_seeds=over_seeds))
    first = pd.DataFrame([r for r in rows if r['seed'] == 0])
    first['value'] = first['value'].map(lambda v: str(Estimate.read(v)))
    print(first.pivot(index='measure', columns='dictionary', values='value').to_string())


def claims_over_seeds(rows):
    "Trained less control for every measure, paired within seeds."
    table = pd.DataFrame([dict(r, value=r['value'][0]) for r in rows])
    out = []
    for measure, mine in table.groupby('measure', sort=False):
        wide = mine.pivot(index='seed', columns='dictionary', values='value').astype(float)
        if 'trained' not in wide: continue
        for name in wide.columns.drop('trained'):
            gap = (wide['trained']-wide[name]).dropna()
            if len(gap) > 1: out.append(dict(measure=measure, dictionary=name, difference=list(student(gap))))
    return out


# --- the density histogram ---

def study_density(s):
    def made():
        sae = load_sae(s.o.sae, s.at.device) if s.o.sae else s.train('published', recipes(s.resample)['published'], 0)
        tally, windows, n = Tally(sae.cfg.n_feats, 1), s.training_text(0, s.o.density_tokens), 0
        for tokens in windows.ids(device=s.at.device).split(32):
            x = s.at(tokens).flatten(0, 1)
            tally.add(active_set(sae, x))
            if (n := n+len(x)) % 2_000_000 < len(x): s.say(f'density: {n:,} of {windows.n_tokens:,} tokens')
        found = density_clusters(sae, tally.count/n)
        sizes = found.table.cluster.value_counts().to_dict()
        return dict(run=run_record(tokens=n, sae=s.o.sae or 'published-0'), distance=found.distance, gain=found.gain, sizes=sizes,
                    dead=int((tally.count == 0).sum()), table=found.table.round(4).to_dict('list'))
    found = s.once('density', made)
    _keep(s, 'recipe', dict(density=found))
    print(f"D = {found['distance']:.2f}; {found['sizes']}; {found['dead']} never fired")


if __name__ == '__main__':
    o = options()
    s = Study(o)
    for part in ('recipes', 'controls', 'density'):
        if part in o.parts: dict(recipes=study_recipes, controls=study_controls, density=study_density)[part](s)
    s.say('done')
