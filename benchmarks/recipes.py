"""Learning rates and batch sizes of the transformer, each tried on a small budget of the `full` mixture; what is shipped is trained with the best of them.
Run: python benchmarks/recipes.py [--tokens 2000000]. One seed each; validation text of 100,000 tokens, studied kinds enriched. What is stored already is not run again."""
import argparse, json
from dataclasses import replace
from pathlib import Path

OUT = Path(__file__).parent/'recipes.json'
TRIALS = [dict(batch=16, lr=2e-3), dict(batch=16, lr=4e-3), dict(batch=16, lr=8e-3), dict(batch=32, lr=4e-3), dict(batch=32, lr=8e-3)]


def try_transformer(scale, tok, windows, validation, trial):
    "A transformer trained with other settings; what its log ends with."
    from monosem.transformer import build_transformer, train_transformer
    model = build_transformer(replace(scale.model, d_vocab=tok.get_vocab_size()), 'cpu')
    done = train_transformer(model, windows, validation, replace(scale.lm, eval_every=10**9, **trial))
    return dict(trial, tokens=windows.n_tokens, validation_nats=round(float(done.log.validation_nats.iloc[-1]), 4), precision=done.precision)


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--tokens', type=int, default=2_000_000)
    args = ask.parse_args()
    from monosem.core import write_json
    from monosem.corpus import load_corpus
    from monosem.reproduce import SCALES
    from monosem.tokens import token_windows, train_tokenizer
    scale = SCALES['full']
    corpus = load_corpus(scale.corpus)
    tok = train_tokenizer(corpus, scale.mixture, scale.d_vocab, scale.tokenizer_bytes)
    windows = token_windows(corpus, tok, replace(scale.mixture, budget=args.tokens))
    validation = token_windows(corpus, tok, replace(scale.held, budget=100_000), validation=True, spread=True)
    rows = json.loads(OUT.read_text())['transformer'] if OUT.exists() else []
    for trial in TRIALS:
        if any(trial.items() <= r.items() and r['tokens'] == windows.n_tokens for r in rows): continue
        rows.append(try_transformer(scale, tok, windows, validation, trial))
        write_json(OUT, dict(transformer=rows))
        print(rows[-1], flush=True)


if __name__ == '__main__': main()
