"What the shipped run has to show, read from the stored results."
import json



def test_features_beat_neurons_on_held_out_documents(root):
    rows = json.loads((root/'nbs/results/proxies.json').read_text())
    get = lambda c, what: next(r for r in rows if r['note'].startswith(f'{c}: {what}'))
    for contexts in (['arabic'], ['hebrew', 'cyrillic'], ['dna']):
        assert any(get(c, 'specificity')['ours'] >= .8 and get(c, 'difference')['low'] > 0 for c in contexts), contexts
    assert all(r['low'] <= r['ours'] <= r['high'] and r['n'] > 100_000 for r in rows)
