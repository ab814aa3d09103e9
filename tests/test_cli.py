"The command: exit codes, one-line errors, interrupts, reuse."
import json, signal, subprocess, sys, time

import pytest

RUN = [sys.executable, '-m', 'monosem']


def _monosem(*args, **kw): return subprocess.run([*RUN, *args], capture_output=True, text=True, **kw)


@pytest.mark.parametrize('args,what', [
    (['reproduce', '--scale', 'tiny', '--no-site', '--corpus', 'huge'], 'huge'),
    (['reproduce', '--scale', 'tiny', '--no-site', '--out', '/proc/no'], 'folder'),
    (['results', '--run', 'no/such/run'], 'no/such/run')])
def test_mistakes_end_with_2_and_one_line(args, what, tmp_path):
    args = args if '--out' in args or args[0] != 'reproduce' else [*args, '--out', str(tmp_path)]
    r = _monosem(*args)
    lines = [l for l in r.stderr.splitlines() if l.strip()]
    assert r.returncode == 2 and 'Traceback' not in r.stderr and lines[-1].startswith('monosem:') and what in lines[-1]


def test_an_empty_corpus_leaves_nothing_behind(tmp_path):
    (tmp_path/'none.jsonl').write_text('')
    r = _monosem('reproduce', '--scale', 'tiny', '--no-site', '--corpus', str(tmp_path/'none.jsonl'), '--out', str(tmp_path/'out'))
    assert r.returncode == 2 and not (tmp_path/'out').exists() or not any((tmp_path/'out').rglob('*.json'))


def test_interrupt_keeps_finished_stages_and_continues(tmp_path):
    args = [*RUN, 'reproduce', '--scale', 'tiny', '--no-site', '--out', str(tmp_path)]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if '[A] ...' in line: break
    time.sleep(1.5)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err and not (tmp_path/'tiny/A').exists()
    r = subprocess.run(args, capture_output=True, text=True, check=True)
    assert '[tokenizer.json] reused' in r.stdout and '[A] done' in r.stdout and 'arabic' in r.stdout
    results = json.loads((tmp_path/'tiny/results.json').read_text())
    assert {t['context'] for t in results['features']} == {'arabic', 'hebrew', 'cyrillic', 'dna', 'base64'}
