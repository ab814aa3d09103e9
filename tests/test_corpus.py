"Text in, tokens out: nothing lost, nothing damaged taken for whole."
import hashlib, json, lzma, os, subprocess, sys, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from hypothesis import example, given, settings, strategies as st
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)

import monosem.corpus as corpus_module
import monosem.tokens as tokens_module
from monosem.corpus import Corpus, Document, is_validation, load_corpus, manifest
from monosem.tokens import (EOT, Mixture, TokenWindows, cache_folder, draw_documents, even_cut,
                            load_tokenizer, plain_tokenizer, show_token, token_bytes,
                            token_windows, tokenizer_hash, train_tokenizer,
                            windows_from_ids)


def a_doc(text, kind='text'): return Document(kind, '-', 'here', text)

def for_training(stem, validation=False):
    "A text that starts with `stem` and falls on the wanted side."
    tails = (f'{stem}{t}' for t in 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ')
    return next(t for t in tails if is_validation(t) == validation)

def byte_level(vocab, merges=(), special=True):
    "A byte-level tokenizer with the given vocabulary and the mark."
    tok = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_tokens([AddedToken(EOT, special=special, normalized=False)])
    return tok

def every_byte(n_filling=0, first=(EOT,)):
    "A token a byte, after `n_filling` tokens that no text contains."
    names = [*first, *(f'~{i}~' for i in range(n_filling))]
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    return byte_level({n: i for i,n in enumerate(names)})

@pytest.fixture(scope='module')
def bytewise(): return every_byte()

def text_of(tok, ids):
    names = token_bytes(tok)
    return b''.join(names[i] for i in ids).decode()

def one_kind(budget, seed=0): return Mixture({'text': 1.}, budget=budget, seed=seed)


# Documents from files

def written(tmp_path, *lines, name='own.jsonl', end=b'\n'):
    path = tmp_path/name
    raw = end.join(x if isinstance(x, bytes) else x.encode() for x in lines)
    path.write_bytes(lzma.compress(raw) if name.endswith('.xz') else raw)
    return path


@pytest.mark.parametrize('name', ['own.jsonl', 'own.jsonl.xz'])
def test_only_a_newline_ends_a_document(tmp_path, name):
    texts = [f'one{c}text' for c in '\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r\n']
    rows = [json.dumps({'text': t}, ensure_ascii=False) for t in texts]
    rows[:3] = [f'{{"text": "{t}"}}' for t in texts[:3]]  # raw, whatever json escapes
    for end in (b'\n', b'\r\n'):
        path = written(tmp_path, *rows, '{"text":\r"a"}', name=name, end=end)
        assert [d.text for d in load_corpus(path).docs] == [*texts, 'a']


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"text": "a"}', '', ' ', '{"text": "\ufeffb"}', '')
    assert [d.text for d in load_corpus(path).docs] == ['a', '\ufeffb']


def test_fields_of_a_line_and_their_defaults(tmp_path):
    path = written(tmp_path, '{"text": " a ", "kind": "k", "lang": "l", "source": "s", "n": 1}',
                   '{"text": "b"}')
    assert load_corpus(path).docs == [Document('k', 'l', 's', ' a '),
                                      Document('text', '-', 'own.jsonl', 'b')]


@pytest.mark.parametrize('line', [
    r'{"text": "half \ud800"}', r'{"text": "half \udc00 a pair"}', '{"text": null}',
    '{"text": 3}', '{"text": ["a"]}', '{"text": "a", "kind": null}',
    '{"text": "a", "kind": 1}', r'{"text": "a", "kind": "\ud800"}',
    '{"text": "a", "lang": null}', '{"text": "a", "source": ["b"]}', '{"text": " "}',
    '{"body": "a"}', '["a"]', '"text"', '3', '{"text": "cut o', b'{"text": "\xff"}'])
def test_a_line_that_is_no_document_is_named(tmp_path, line):
    path = written(tmp_path, '{"text": "a"}', '', line, '{"text": "b"}')
    with pytest.raises(ValueError, match=r'own\.jsonl line 3 .*expected'): load_corpus(path)


def test_whole_surrogate_pairs_are_text(tmp_path):
    path = written(tmp_path, r'{"text": "\ud83e\udd8a"}')
    assert load_corpus(path).docs[0].text == '🦊'


@pytest.mark.parametrize('text', [
    'one\r\ntwo\rthree\n', '\ufeffmarked twice', 'no line end', '\n\n  a\n\n', 'x\x85y\u2028z\x0c',
    'long line '*5_000, 'line\r\n'*9_000, '\n'*30_000+'a', 'a'+' \n'*30_000,
    ('a\n'+'\n'*13_000)*3, 'ü\u2029'*20_000])
def test_a_plain_text_is_unchanged(tmp_path, text):
    path = written(tmp_path, text.encode('utf-8-sig'), name='own.txt')
    docs = load_corpus(path).docs
    assert ''.join(d.text for d in docs) == text
    assert {d[:3] for d in docs} == {('text', '-', 'own.txt')}


def test_pieces_end_at_line_ends_where_there_are_any():
    pieces = corpus_module._pieces
    assert pieces('aaaa\nbbbb\ncccc\n', 10) == ['aaaa\nbbbb\n', 'cccc\n']
    assert pieces('aaaa\nbbbb\ncccc\n', 9) == ['aaaa\n', 'bbbb\n', 'cccc\n']
    assert pieces('a'*25, 10) == ['a'*10, 'a'*10, 'a'*5]
    assert pieces('aaaa\n    \n', 5) == ['aaaa\n    \n']


def test_a_plain_text_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'own\.txt .*UTF-8'):
        load_corpus(written(tmp_path, b'caf\xe9', name='own.txt'))
    with pytest.raises(ValueError, match='without text'):
        load_corpus(written(tmp_path, b' \n', name='own.txt'))


def test_files_are_read_alike_whatever_the_machine_prefers():
    "An encoding that is left to the machine is another one on Windows."
    code = ('from monosem.corpus import load_corpus, manifest\nfrom monosem.tokens import load_tokenizer\n'
            'import pathlib, tempfile; p = pathlib.Path(tempfile.mkdtemp())/"a.txt"\n'
            'p.write_bytes(b"a"); load_corpus(p); load_corpus(); load_tokenizer(); manifest()')
    flags = ['-X', 'warn_default_encoding', *(a for module in ('corpus', 'tokens')
             for a in ('-W', f'error::EncodingWarning:monosem.{module}'))]
    subprocess.run([sys.executable, *flags, '-c', code], check=True)


def test_altered_and_truncated_files_are_refused(tmp_path, root):
    c, bad = corpus_module, tmp_path/'mini.jsonl.xz'
    raw = (root/'monosem/assets/mini.jsonl.xz').read_bytes()
    sha = next(f['sha256'] for f in manifest()['files'] if f['file'] == 'mini.jsonl.xz')
    for content in (raw[:-1000], raw[:100]+b'x'+raw[101:]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match='SHA-256'): c._read_jsonl(bad, sha)
        with pytest.raises(ValueError, match='cannot read'): c._read_jsonl(bad)


def test_missing_files_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match='no document'):
        load_corpus(written(tmp_path, '', name='none.jsonl'))
    for name in (tmp_path, tmp_path/'no.jsonl', 'nowhere'):
        with pytest.raises(FileNotFoundError, match='got the corpus'): load_corpus(name)


# A data set of the hub's form, in a folder

@pytest.fixture
def data_set(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    def write(name, rows):
        path = tmp_path/'set'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
        return f'hf:{tmp_path/"set"}'
    return write


def test_a_local_data_set_streams_like_a_hub_one(data_set):
    name = data_set('train.jsonl', [{'text': f'line {i}', 'kind': 'k'} for i in range(20)])
    docs = load_corpus(name, n_docs=7).docs
    assert docs == [Document('k', '-', name, f'line {i}') for i in range(7)]
    assert len(load_corpus(name)) == 20
    with pytest.raises(ValueError, match='n_docs=0'): load_corpus(name, n_docs=0)


def test_configuration_split_and_column_are_chosen_in_the_name(data_set):
    for config in ('en', 'de'):
        for split in ('train', 'validation'):
            rows = [{'text': 'no', 'content': f'{config} {split}'}]
            name = data_set(f'{config}/{split}.jsonl', rows)
    card = ['configs:']
    for config in ('en', 'de'):
        files = [f'  - split: {s}\n    path: {config}/{s}.jsonl' for s in ('train', 'validation')]
        card += [f'- config_name: {config}', '  data_files:', *files]
    data_set('README.md', [])
    with open(f'{name[3:]}/README.md', 'w', encoding='utf-8') as f:
        f.write('\n'.join(['---', *card, '---', '']))
    read = lambda query: [d[2:] for d in load_corpus(name+query).docs]
    assert read('?config=de&split=validation&column=content') == [(name, 'de validation')]
    assert read('?column=content&config=en') == [(name, 'en train')]


def test_rows_without_text_are_passed_over_and_other_values_refused(data_set):
    name = data_set('train.jsonl', [{'text': t, 'n': i, 'l': ['x'], 'kind': k} for i,(t,k) in
                                    enumerate([('a', 'k'), (None, 'k'), ('  ', 'k'), ('b', None)])])
    assert [d[::3] for d in load_corpus(name).docs] == [('k', 'a'), ('text', 'b')]
    for column in ('n', 'l'):
        with pytest.raises(ValueError, match='row 1 with .* as its text'):
            load_corpus(f'{name}?column={column}')
    with pytest.raises(ValueError, match=r"row 1 .*'kind', 'l', 'n', 'text'.* 'body'"):
        load_corpus(f'{name}?column=body')
    name = data_set('train.jsonl', [{'text': None, 'n': None}, {'text': 'a', 'n': 5}])
    with pytest.raises(ValueError, match='row 2 with 5'): load_corpus(f'{name}?column=n')


@pytest.mark.parametrize('query, says', [('revision=main', 'revision'), ('split', 'one value'),
                                         ('split=', 'one value'), ('split=a&split=b', 'one value')])
def test_an_address_that_says_something_else_is_refused(query, says):
    with pytest.raises(ValueError, match=says): corpus_module._hub_address(f'me/set?{query}')


def test_core_is_whole_where_it_is(root):
    if not (root/'data').is_dir(): pytest.skip('no data/ here: a wheel')
    core = load_corpus('core')
    parts = [f for f in manifest()['files'] if f['file'].startswith('core/')]
    assert len(core) == sum(f['docs'] for f in parts)
    assert {d.source for d in core.docs} <= set(manifest()['sources'])


# A corpus

def test_the_hash_of_a_corpus_is_that_of_its_kinds_and_texts():
    two = [a_doc('x', 'a'), a_doc('y', 'b')]
    others = [two[:1], two[::-1], [a_doc('x', 'b'), a_doc('y', 'b')],
              [a_doc('x', 'a'), a_doc('z', 'b')], [a_doc('x\0b\0y', 'a')],
              [a_doc('x', 'a'), a_doc('y\0', 'b')]]
    hashes = {Corpus('c', d).hash for d in [two, *others]}
    assert len(hashes) == 7 and {len(h) for h in hashes} == {12}
    assert Corpus('d', [d._replace(lang='l', source='s') for d in two]).hash in hashes


def test_a_corpus_counts_documents_and_bytes():
    c = Corpus('c', [a_doc('ab', 'x'), a_doc('äöü', 'y'), a_doc('c', 'x')])
    assert c.table().to_dict('index') == {'y': {'documents': 1, 'bytes': 6},
                                          'x': {'documents': 2, 'bytes': 3}}
    assert list(c.table().index) == ['y', 'x'] and len(c) == 3


def test_a_corpus_of_what_is_no_text_is_refused():
    for bad in (a_doc(''), a_doc(' \n\u2003'), a_doc(None), a_doc(3), a_doc('\ud800'),
                a_doc('a', None), a_doc('a', '\udfff'), Document('k', None, 's', 'a')):
        with pytest.raises(ValueError, match=r"'mine' docs\[1\]"):
            Corpus('mine', [a_doc('a'), bad])
    with pytest.raises(ValueError, match='no document'): Corpus('mine', [])


def test_the_side_of_a_text_is_decided_by_its_hash():
    # SHA-256 of these begins with ca978112, 3e23e816, 2e7d2c03, 18ac3e73, 3f79bb7b, 252f10c8
    assert [is_validation(t) for t in 'abcdef'] == [False, False, True, True, False, True]
    assert not is_validation('a', 0xca978112/2**32) and is_validation('a', 0xca978113/2**32)
    assert is_validation('a', 1.) and not is_validation('a', 0.)


# The mixture

def test_shares_are_the_weights_of_present_kinds():
    m = Mixture({'a': 3., 'b': 1., 'absent': 50., 'never': 0.}, other=2.)
    assert m.shares(['b', 'a', 'a']) == {'a': .75, 'b': .25}
    assert m.shares(['a', 'never', 'c']) == {'a': .6, 'c': .4}
    assert Mixture({'a': 3.}, other=0.).shares('ab') == {'a': 1.}
    with pytest.raises(ValueError, match='no weight'): m.shares(['never'])
    assert Mixture.from_dict(json.loads(json.dumps(m.to_dict()))) == m


@pytest.mark.parametrize('bad', [dict(budget=0), dict(budget=-1), dict(other=-.1),
                                 dict(weights={'a': -1.}), dict(other=float('nan')),
                                 dict(weights={'a': float('inf')})])
def test_impossible_mixtures_are_refused(bad):
    with pytest.raises(ValueError): Mixture(**bad)


def test_the_last_document_is_cut_to_what_is_left():
    docs = [a_doc('x', k) for k in 'aab']
    drawn = dict(draw_documents(docs, [4, 30, 1000], {'a': .4, 'b': .6}, 50))
    assert drawn[0]+drawn[1] == 20 and drawn[2] == 30 if 0 in drawn else drawn == {1: 20, 2: 30}
    for seed in range(10):
        drawn = draw_documents([a_doc('x')]*3, [4, 4, 4], {'text': 1.}, 6, seed)
        assert sorted(n for _,n in drawn) == [2, 4]


def test_a_kind_is_read_again_only_when_it_runs_out():
    docs, shares = [a_doc('x')]*3, {'text': 1.}
    for seed in range(5):
        drawn = draw_documents(docs, [2, 2, 2], shares, 13, seed)
        count = Counter(i for i,_ in drawn)
        assert sorted(count.values()) == [2, 2, 3] and sum(n for _,n in drawn) == 13
        once = draw_documents(docs, [2, 2, 2], shares, 13, seed, repeat=False)
        assert sorted(once) == [(0, 2), (1, 2), (2, 2)]
        assert len(draw_documents(docs, [2, 2, 2], shares, 6, seed)) == 3  # exactly enough


def test_documents_come_in_random_order_by_seed():
    docs = [a_doc('x', k) for k in 'a'*30+'b'*30]
    order = lambda seed: [i for i,_ in draw_documents(docs, [1]*60, {'a': .5, 'b': .5}, 60, seed)]
    assert order(0) == order(0) != order(1) and sorted(order(0)) == list(range(60))
    kinds = ''.join(docs[i].kind for i in order(0))
    assert 15 < kinds.count('ab')+kinds.count('ba') < 45  # mixed, not one kind after the other
    few = draw_documents(docs[:3]+docs[30:33], [1]*6, {'a': .5, 'b': .5}, 4)
    assert few == [(1, 1), (5, 1), (2, 1), (4, 1)]  # the same on every machine


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 50)), min_size=1, max_size=30),
       st.integers(1, 500), st.dictionaries(st.sampled_from('abc'), st.integers(1, 9), min_size=1))
def test_a_draw_is_exactly_the_budget(rows, budget, weights):
    docs, sizes = [a_doc('x', k) for k,_ in rows], [s for _,s in rows]
    shares = {k: w/sum(weights.values()) for k,w in weights.items()}
    drawn = draw_documents(docs, sizes, shares, budget)
    assert all(0 <= n <= sizes[i] for i,n in drawn)
    for k,share in shares.items():
        mine = [(i, n) for i,n in drawn if docs[i].kind == k]
        if not any(s for kind,s in rows if kind == k): assert mine == []; continue
        assert abs(sum(n for _,n in mine)-share*budget) < 1
        assert sum(n < sizes[i] for i,n in mine) <= 2  # the last one, or one more left out
    if {k for k,s in rows if s} >= set(shares): assert sum(n for _,n in drawn) == budget


# Tokenizers

@pytest.fixture(scope='module')
def shipped(): return load_tokenizer(), token_bytes(load_tokenizer())


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=['Cs'])))
@example(text='a <|endoftext|> b')
def test_any_text_survives_the_tokenizer(shipped, text):
    tok, names = shipped
    ids = tok.encode(text).ids
    assert tok.decode(ids) == text and 0 not in ids
    assert b''.join(names[i] for i in ids) == text.encode()


def test_every_byte_is_a_token(tok):
    assert {bytes([i]) for i in range(256)} <= set(token_bytes(tok))
    assert len(token_bytes(tok)) == tok.get_vocab_size() == 8192


def test_the_tokenizer_is_reproducible(mini):
    make = lambda seed: train_tokenizer(mini, Mixture(seed=seed), 600, 200_000).to_str()
    assert make(0) == make(0) != make(1)


def test_a_trained_tokenizer_reads_a_spelt_out_mark_as_text():
    tok = train_tokenizer(Corpus('c', [a_doc(for_training('some words '*20))]), d_vocab=260)
    ids = tok.encode(f'a {EOT} b', add_special_tokens=False).ids
    assert tok.token_to_id(EOT) == 0 not in ids and text_of(tok, ids) == f'a {EOT} b'
    assert tok.get_vocab_size() == 260


def learnt(corpus, *args, **kwargs):
    "The tokens of several letters that a tokenizer learns from a corpus."
    return {b for b in token_bytes(train_tokenizer(corpus, *args, **kwargs)) if len(b) > 1}


def test_the_tokenizer_never_sees_validation_documents():
    seen, hidden = for_training('qqqq '*50), for_training('zzzz '*50, validation=True)
    assert learnt(Corpus('c', [a_doc(seen)])) == learnt(Corpus('c', [a_doc(seen), a_doc(hidden)]))
    with pytest.raises(ValueError, match='no training document'):
        train_tokenizer(Corpus('c', [a_doc(hidden)]))


def test_the_tokenizer_follows_the_mixture_and_its_budget():
    both = Corpus('c', [a_doc(for_training('qqqq '*50), 'a'), a_doc(for_training('zzzz '*50), 'b')])
    assert any(b'z' in t for t in learnt(both, Mixture({'a': 1., 'b': 1.})))
    assert not any(b'z' in t for t in learnt(both, Mixture({'a': 1., 'b': 0.})))
    long = Corpus('c', [a_doc(for_training('qqqq '*50+'zzzz '*5_000))])  # starts with 250 bytes of q
    assert not any(b'z' in t for t in learnt(long, n_bytes=250))
    assert any(b'z' in t for t in learnt(long, n_bytes=500))
    assert b'\xc3\xbc\xc3\xbc' in learnt(Corpus('c', [a_doc(for_training('ü'*50))]), n_bytes=51)


def test_impossible_vocabularies_are_refused(mini):
    with pytest.raises(ValueError, match='d_vocab=257'): train_tokenizer(mini, d_vocab=257)
    with pytest.raises(ValueError, match='n_bytes=0'): train_tokenizer(mini, n_bytes=0)
    assert train_tokenizer(mini, d_vocab=258, n_bytes=1000).get_vocab_size() == 258


def test_a_replaced_file_is_another_tokenizer(tmp_path, tok):
    path = tmp_path/'tokenizer.json'
    tok.save(str(path))
    assert tokenizer_hash(load_tokenizer(str(path))) == tokenizer_hash(tok)
    every_byte().save(str(path))
    assert load_tokenizer(path).get_vocab_size() == 257
    assert 0 not in load_tokenizer(path).encode(EOT).ids
    for damaged in ('{"model": ', '{}', ''):
        path.write_text(damaged, encoding='utf-8')
        with pytest.raises(ValueError, match='cannot read tokenizer.json'): load_tokenizer(path)
    path.unlink()
    with pytest.raises(FileNotFoundError): load_tokenizer(path)


def test_switches_of_a_loaded_tokenizer_stay_with_it():
    load_tokenizer().enable_truncation(2)
    assert len(load_tokenizer().encode('one two three four').ids) > 2


def with_dropout(tok): tok.model.dropout = .9

SWITCHES = {
    'truncation': lambda t: t.enable_truncation(5),
    'padding': lambda t: t.enable_padding(pad_id=7, pad_token='pad', length=50),
    'marks around a text': lambda t: setattr(t, 'post_processor', processors.TemplateProcessing(
        f'{EOT} $A {EOT}', None, [(EOT, t.token_to_id(EOT))])),
    'dropout': with_dropout,
    'marks found in a text': lambda t: setattr(t, 'encode_special_tokens', False)}


@pytest.mark.parametrize('switch', SWITCHES)
def test_windows_do_not_depend_on_switches(mini, switch):
    some = Corpus('some', [*mini.docs[:40], a_doc(for_training(f'spelt out: {EOT} '))])
    tok, same = load_tokenizer(), Mixture(budget=5_000, other=1., weights={})
    want = token_windows(some, tok, same, n_ctx=16)
    SWITCHES[switch](tok)
    before = tok.to_str()
    got = token_windows(some, tok, same, n_ctx=16)
    assert (got.tokens == want.tokens).all() and got.tokenizer == want.tokenizer
    assert plain_tokenizer(tok).encode('The cat sat on the mat.').ids == \
        load_tokenizer().encode('The cat sat on the mat.').ids
    assert tok.to_str() == before and tokenizer_hash(tok) == tokenizer_hash(load_tokenizer())
    assert tok.encode_special_tokens == (switch != 'marks found in a text')


def test_a_mark_that_is_no_special_token_stays_text():
    tok = byte_level(every_byte().get_vocab(), special=False)
    assert tok.encode(EOT).ids == [0]
    plain = plain_tokenizer(tok)
    assert 0 not in plain.encode(EOT).ids and plain.decode(plain.encode(EOT).ids) == EOT
    assert tokenizer_hash(tok) == tokenizer_hash(every_byte())


def char_level():
    tok = Tokenizer(models.BPE(vocab={EOT: 0, 'a': 1, 'b': 2}, merges=[]))
    tok.add_special_tokens([EOT])
    return tok

def pieces_with(model, pre=None):
    tok = Tokenizer(model)
    tok.pre_tokenizer = pre or pre_tokenizers.Whitespace()
    tok.add_special_tokens([EOT])
    return tok

NOT_BYTES = {
    'WordPiece': lambda: pieces_with(models.WordPiece({'[UNK]': 0, 'a': 1, '##b': 2}, unk_token='[UNK]')),
    'WordPiece over bytes': lambda: pieces_with(
        models.WordPiece({'[UNK]': 0, 'a': 1, '##b': 2}, unk_token='[UNK]'),
        pre_tokenizers.ByteLevel()),
    'WordLevel': lambda: pieces_with(models.WordLevel({'[UNK]': 0, 'a': 1}, unk_token='[UNK]')),
    'Unigram': lambda: pieces_with(models.Unigram([('▁a', -1.), ('b', -2.)], unk_id=1)),
    'characters': char_level,
    'SentencePiece': lambda: pieces_with(models.BPE(vocab={'▁': 0, 'a': 1, '▁a': 2}, merges=[('▁', 'a')]),
                                         pre_tokenizers.Metaspace()),
    'names outside the alphabet': lambda: byte_level({'a': 0, '▁': 1, 'ث': 2}),
    'ends of words': lambda: pieces_with(models.BPE(vocab={'a': 0, 'a</w>': 1}, merges=[],
                                                    end_of_word_suffix='</w>'),
                                         pre_tokenizers.ByteLevel())}


@pytest.mark.parametrize('kind', NOT_BYTES)
def test_a_tokenizer_that_is_not_byte_level_is_refused(kind):
    tok, some = NOT_BYTES[kind](), Corpus('c', [a_doc(for_training('ab'*20))])
    for use in (token_bytes, plain_tokenizer, lambda t: token_windows(some, t, n_ctx=4)):
        with pytest.raises(ValueError, match='expected .*byte.*; use '): use(tok)


def test_a_tokenizer_without_the_mark_is_refused(bytewise):
    vocab = {n: i for i,n in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    some = Corpus('c', [a_doc(for_training('ab'*20))])
    for use in (plain_tokenizer, lambda t: token_windows(some, t, n_ctx=4)):
        with pytest.raises(ValueError, match='without the mark'): use(tok)
    assert sorted(token_bytes(tok)) == [bytes([i]) for i in range(256)]


def test_text_that_a_tokenizer_would_drop_is_refused():
    tok = byte_level({EOT: 0, 'a': 1, 'b': 2})
    fits, does_not = 'a'*9+'b'*9, for_training('ab'*9+'c')
    while is_validation(fits): fits += 'b'
    w = token_windows(Corpus('c', [a_doc(fits)]), tok, one_kind(16), n_ctx=4)
    assert text_of(tok, w.tokens.ravel())
    with pytest.raises(ValueError, match='every byte'):
        token_windows(Corpus('c', [a_doc(does_not)]), tok, one_kind(16), n_ctx=4)


def test_bytes_of_added_tokens_and_of_gaps():
    spec = json.loads(every_byte().to_str())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec['added_tokens'] += [dict(id=259, content='<pad> ü', **flags),
                             dict(id=257, content='    ', **flags)]
    spec['added_tokens'].sort(key=lambda t: t['id'])
    tok = Tokenizer.from_str(json.dumps(spec))
    at = {i: b for i,b in enumerate(token_bytes(tok))}
    assert at[0] == b'' and sorted(at[i] for i in range(1, 257)) == [bytes([i]) for i in range(256)]
    assert at[257] == b'    ' and at[tok.token_to_id('<pad> ü')] == '<pad> ü'.encode()
    assert len(at) == max(tok.get_vocab().values())+1
    if tok.token_to_id('<pad> ü') == 259: assert at[258] == b'<258>'


def test_the_hash_of_a_tokenizer_is_that_of_what_makes_ids(tmp_path):
    base = every_byte().get_vocab()
    swapped = {**base, 'a': base['b'], 'b': base['a']}
    merged = {**base, 'ab': 257, 'bc': 258}
    lower, regex, extra = (byte_level(base) for _ in range(3))
    lower.normalizer = normalizers.Lowercase()
    regex.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    extra.add_special_tokens(['<pad>'])
    others = [byte_level(swapped), byte_level(merged, [('a', 'b'), ('b', 'c')]),
              byte_level(merged, [('b', 'c'), ('a', 'b')]), lower, regex, extra]
    hashes = [tokenizer_hash(t) for t in [byte_level(base), *others]]
    assert len(set(hashes)) == 7 and all(len(h) == 12 for h in hashes)
    others[1].save(str(tmp_path/'t.json'), pretty=True)
    assert tokenizer_hash(load_tokenizer(tmp_path/'t.json')) == hashes[2]


# Tokens to read

NO_INK = {*'\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u180f\u2800\u3164\uffa0',
          *map(chr, range(0xfe00, 0xfe10)), *map(chr, range(0xe0100, 0xe01f0))}

def is_seen(text):
    "Every character leaves ink, and none leans on what comes before the token."
    return (all(category(c)[0] not in 'CZ' and c not in NO_INK for c in text)
            and text != '' and category(text[0])[0] != 'M')


def test_every_character_is_shown_and_shown_as_itself():
    every = [chr(i) for i in range(0x110000) if not 0xd800 <= i < 0xe000]
    every = [c for c in every if category(c) not in ('Cn', 'Co') or ord(c) % 50 == 0]
    shown = [show_token(c.encode()) for c in every]
    assert all(map(is_seen, shown))
    assert len(set(shown)) == len(shown)-3  # space, line end and tab have signs that exist as such
    plain = [c for c in every if is_seen(c)]
    assert len(plain) > 130_000 and all(show_token(c.encode()) == c for c in plain)


def test_every_shipped_token_is_seen(shipped):
    assert all(is_seen(show_token(b)) for b in shipped[1])
    assert show_token(shipped[1][0]) == EOT


def test_how_tokens_are_shown():
    for b, want in [(b'', EOT), (b' a\n\t', '␣a⏎⇥'), (b'\xd8', r'\xd8'), (b'a\xffb', r'a\xffb'),
                    (b'\r', r'\u000d'), ('\u202e'.encode(), r'\u202e'), ('\x85'.encode(), r'\u0085'),
                    ('\u00a0x'.encode(), r'\u00a0x'), ('e\u0301'.encode(), 'e\u0301'),
                    ('\u0301e'.encode(), '\u25cc\u0301e'), ('\ufe0f'.encode(), r'\ufe0f'),
                    ('\U000e0100'.encode(), r'\U000e0100'), ('نص'.encode(), 'نص')]:
        assert show_token(b) == want


# Windows

def exact(docs, tok, budget, n_ctx, seed=0, **kwargs):
    return token_windows(Corpus('c', docs), tok, Mixture({}, 1., budget, seed), n_ctx=n_ctx, **kwargs)


def test_windows_are_marked_documents_laid_end_to_end(bytewise):
    texts = [for_training(s) for s in ('ab', 'cdefg', 'hü', 'klm')]
    total = sum(len(t.encode())+1 for t in texts)
    w = exact([a_doc(t) for t in texts], bytewise, total, total)  # a single window
    ids, doc = w.tokens[0].tolist(), w.doc[0].tolist()
    assert w.tokens.shape == w.doc.shape == (1, total)
    starts = [i for i,t in enumerate(ids) if t == bytewise.token_to_id(EOT)]
    found = [text_of(bytewise, ids[a+1:b]) for a,b in zip(starts, [*starts[1:], total])]
    assert starts[0] == 0 and sorted(found) == sorted(texts)
    for a,b,text in zip(starts, [*starts[1:], total], found):
        assert {w.docs[i].text for i in doc[a:b]} == {text}
    assert w.epochs == {'text': 1.} and w.tokenizer == tokenizer_hash(bytewise)


def test_what_fills_no_window_is_dropped(bytewise):
    text = for_training('abcdefghijklm')
    flat = [0, *bytewise.encode(text).ids]
    w = exact([a_doc(text)], bytewise, 11, 4)
    assert sorted(w.tokens.tolist()) == sorted([flat[:4], flat[4:8]]) and w.n_tokens == 8
    assert exact([a_doc(text)], bytewise, 12, 4).tokens.shape == (3, 4)
    with pytest.raises(ValueError, match='got 3 tokens .*one window of 4'):
        exact([a_doc(text)], bytewise, 3, 4)


def test_windows_come_in_random_order_by_seed(bytewise):
    text = for_training(''.join(chr(33+i) for i in range(90)))
    places = lambda seed: [bytewise.encode(text).ids.index(r[1]) for r in
                           exact([a_doc(text)], bytewise, 88, 2, seed).tokens.tolist()]
    assert places(0) == places(0) != places(1)
    assert sorted(places(0)) == list(range(0, 88, 2)) != places(0)


def test_tokens_and_documents_move_together(bytewise):
    docs = [a_doc(for_training(c*20)) for c in 'pqrs']
    w = exact(docs, bytewise, 500, 8)
    of_letter = {bytewise.token_to_id(c): c for c in 'pqrs'}
    for t,i in zip(w.tokens.ravel().tolist(), w.doc.ravel().tolist()):
        if t in of_letter: assert w.docs[i].text[0] == of_letter[t] or w.docs[i].text[-1] == of_letter[t]


def test_one_long_document_does_not_outgrow_the_budget(bytewise):
    long, short = for_training('x'*5_000), for_training('yy')
    w = exact([a_doc(long, 'long'), a_doc(short, 'short')], bytewise, 200, 10)
    assert w.n_tokens == 200 and w.table().tokens.to_dict() == {'long': 100, 'short': 100}
    assert w.epochs == {'long': 100/5_002, 'short': 100/4}
    assert exact([a_doc(long)], bytewise, 200, 10).epochs == {'text': 200/5_002}


def test_spread_takes_the_beginnings_of_all(bytewise):
    texts = [for_training(s) for s in ('abcdefgh', 'A', 'ijklmnop')]  # 10, 3 and 10 tokens
    w = exact([a_doc(t) for t in texts], bytewise, 13, 13, spread=True)
    found = ''.join(text_of(bytewise, [t]) or '|' for t in w.tokens[0])
    assert sorted(found.split('|')) == sorted(['', 'abcd', texts[1], 'ijkl'])
    assert w.epochs == {'text': 13/23}
    w = exact([a_doc(t) for t in texts], bytewise, 1_000, 23, spread=True)
    assert w.n_tokens == 23 and w.epochs == {'text': 1.}  # none twice


def test_spread_gives_each_kind_its_share(bytewise):
    docs = [a_doc(for_training(c*40), k) for c,k in ('ax', 'bx', 'cy', 'dy')]
    w = token_windows(Corpus('c', docs), bytewise, Mixture({'x': 3., 'y': 1.}, 0., 40),
                      n_ctx=40, spread=True)
    assert w.table().tokens.to_dict() == {'x': 30, 'y': 10}
    assert Counter(w.doc.ravel().tolist()) == {0: 15, 1: 15, 2: 5, 3: 5}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.floats(0, 400))
@example([10, 2, 10], 12.)
@example([3, 3], 6.)
def test_even_cut_is_the_smallest_that_suffices(sizes, total):
    enough = [c for c in range(1, max(sizes)+1) if sum(min(s, c) for s in sizes) >= total]
    assert even_cut(sizes, total) == (enough[0] if enough else max(sizes))


def test_training_and_validation_are_kept_apart(bytewise):
    docs = [a_doc(for_training(f'train {i} ')) for i in range(5)]
    docs += [a_doc(for_training(f'held {i} ', validation=True)) for i in range(3)]
    for side,n,word in ((False, 5, 'train'), (True, 3, 'held')):
        w = exact(docs, bytewise, 40, 8, validation=side)
        assert len(w.docs) == n and all(d.text.startswith(word) for d in w.docs)
        with pytest.raises(ValueError, match='no (validation|training) document'):
            exact(w.docs, bytewise, 40, 8, validation=not side)


def test_windows_keep_kind_and_split(mini, tok):
    a, b = (token_windows(mini, tok, Mixture(budget=100_000), validation=v) for v in (False, True))
    assert not {d.text for d in a.docs} & {d.text for d in b.docs}
    assert not any(is_validation(d.text) for d in a.docs)
    names, row = token_bytes(tok), a.tokens[5]
    for i in np.unique(a.doc[5]):  # the tokens attributed to a document are a piece of it
        piece = b''.join(names[t] for t in row[a.doc[5] == i])
        assert piece in a.docs[i].text.encode()
    assert token_windows(mini, tok, Mixture(budget=100_000)).hash == a.hash


def test_the_mixture_gets_its_shares(mini, tok):
    w = token_windows(mini, tok, Mixture(budget=1_000_000))
    want, got = Mixture().shares(d.kind for d in mini.docs), w.table().share
    assert w.n_tokens == 1_000_000//256*256
    for kind in want: assert abs(want[kind]-got[kind])*1_000_000 <= 257, kind  # a window, a token


def test_impossible_windows_are_refused(bytewise):
    docs = [a_doc(for_training('abc'))]
    with pytest.raises(ValueError, match='n_ctx=1'): exact(docs, bytewise, 10, 1)
    with pytest.raises(ValueError, match='n_ctx=0'): exact(docs, bytewise, 10, 0)
    assert exact(docs, bytewise, 10, 2).tokens.shape == (5, 2)
    with pytest.raises(ValueError, match='window of 11'): exact(docs, bytewise, 10, 11)


@pytest.mark.parametrize('size, dtype', [(2**16, np.uint16), (2**16+1, np.uint32),
                                         (70_000, np.uint32)])
def test_large_vocabularies_lose_no_bit(size, dtype):
    tok, text = every_byte(size-257), for_training('Large ÿ vocabularies ')
    n = len(text.encode())+1
    w = exact([a_doc(text)], tok, n, n)
    assert w.tokens.dtype == dtype and text_of(tok, w.tokens[0].tolist()) == text
    assert w.tokens.max() > 60_000 and w.ids().tolist() == w.tokens.tolist()


# Kept on disk

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache that keeps small texts too."
    monkeypatch.setenv('MONOSEM_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(tokens_module, '_WORTH_IT', 0)
    return tmp_path/'cache'

def tokenised(monkeypatch):
    "The documents that are tokenised from now on."
    seen, real = [], tokens_module._encode
    monkeypatch.setattr(tokens_module, '_encode', lambda docs, tok: seen.append(docs) or real(docs, tok))
    return seen

def same_windows(a, b):
    same = all(np.array_equal(x, y) and x.dtype == y.dtype for x,y in ((a.tokens, b.tokens), (a.doc, b.doc)))
    return same and (a.docs, a.epochs, a.tokenizer) == (b.docs, b.epochs, b.tokenizer)

def windows_of(docs, tok, **how): return token_windows(Corpus('c', docs), tok, Mixture(budget=3_000), n_ctx=16, **how)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('filling', [0, 2**16])
def test_windows_from_the_cache_are_those_computed(mini, tok, cache, monkeypatch, filling):
    docs, tok, hows = mini.docs[:60], every_byte(filling) if filling else tok, [dict(), dict(spread=True), dict(validation=True)]
    with monkeypatch.context() as m:
        m.setenv('MONOSEM_CACHE', 'off')
        want = [windows_of(docs, tok, **how) for how in hows]
    assert not cache.exists()
    seen = tokenised(monkeypatch)
    for _ in range(2):
        for how, w in zip(hows, want): assert same_windows(windows_of(docs, tok, **how), w)
    assert len(seen) == len(list(cache.iterdir())) == 2  # a text each: for training, for validation
    assert not token_windows(Corpus('other', docs), tok, Mixture({}, 1., 999, 5), n_ctx=8) is None and len(seen) == 2


def test_another_text_or_tokenizer_is_not_taken_for_the_same(mini, tok, cache, monkeypatch):
    docs, seen = [d for d in mini.docs[:60] if not is_validation(d.text)], tokenised(monkeypatch)
    corpus = Corpus('c', list(docs))
    assert corpus.hash and len(token_windows(corpus, tok, n_ctx=16))
    corpus.docs[3] = corpus.docs[3]._replace(text=for_training('changed in place '))  # its hash is of before
    assert corpus.docs[3].text in {d.text for d in token_windows(corpus, tok, n_ctx=16).docs} and len(seen) == 2
    windows_of([d._replace(text=t) for d,t in zip(docs, [d.text for d in docs][::-1])], tok)
    fewer = json.loads(tok.to_str())
    fewer['model']['merges'].pop()
    windows_of(docs, Tokenizer.from_str(json.dumps(fewer)))
    monkeypatch.setattr('tokenizers.__version__', '0')
    windows_of(docs, tok)
    assert len(seen) == 5
    windows_of([d._replace(kind='text') for d in docs], tok)  # a kind decides what is drawn, not how it is cut
    assert len(seen) == 5


def test_texts_do_not_run_together_in_the_name(tok, cache):
    lists = ['ab', 'c'], ['a', 'bc'], ['abc'], ['c', 'ab'], ['ab', 'c', 'ab'], ['é', 'x'], ['éx']
    assert len({tokens_module._cache_file([a_doc(t) for t in texts], tok) for texts in lists}) == len(lists)


def flipped(raw): return raw[:-9]+bytes([raw[-9]^1])+raw[-8:]

DAMAGE = {'truncated': lambda p: p.write_bytes(p.read_bytes()[:-50]), 'empty': lambda p: p.write_bytes(b''),
          'a bit': lambda p: p.write_bytes(flipped(p.read_bytes())), 'no safetensors': lambda p: p.write_text('[1, 2]'*50),
          'another file': lambda p: save_file({'x': np.arange(3)}, p), 'no checksum': lambda p: save_file(load_file(p), p)}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_noticed_and_made_anew(mini, tok, cache, monkeypatch, damage):
    docs = mini.docs[:60]
    want, seen = windows_of(docs, tok), tokenised(monkeypatch)
    path, = cache.iterdir()
    whole = path.read_bytes()
    DAMAGE[damage](path)
    with pytest.warns(UserWarning, match='is damaged') as said: assert same_windows(windows_of(docs, tok), want)
    assert len(said) == len(seen) == 1 and path.read_bytes() == whole
    with warnings.catch_warnings(action='error'): assert same_windows(windows_of(docs, tok), want)
    assert len(seen) == 1


@pytest.mark.parametrize('where', ['a file', 'under a file', 'full'])
def test_a_text_is_tokenised_without_a_cache_where_none_can_be(mini, tok, cache, monkeypatch, where):
    docs, blocker = mini.docs[:60], cache.with_name('blocker')
    blocker.write_text('no folder')
    def no_space(*a): raise OSError(28, 'No space left on device')
    if where == 'full': monkeypatch.setattr(tokens_module, 'save_file', no_space)
    else: monkeypatch.setenv('MONOSEM_CACHE', str(blocker/'c' if where == 'under a file' else blocker))
    with pytest.warns(UserWarning, match='the tokens are not kept: .*MONOSEM_CACHE=off') as said: got = windows_of(docs, tok)
    assert len(said) == 1 and blocker.read_text() == 'no folder' and not list(cache.glob('*') if cache.exists() else [])
    monkeypatch.setenv('MONOSEM_CACHE', 'off')
    with warnings.catch_warnings(action='error'): assert same_windows(windows_of(docs, tok), got)


def test_small_texts_are_not_kept(mini, tok, cache, monkeypatch):
    monkeypatch.setattr(tokens_module, '_WORTH_IT', sum(len(d.text) for d in mini.docs[:60]))
    windows_of(mini.docs[:60], tok)
    assert not cache.exists()


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    for given, want in (('off', None), ('/x/y', '/x/y'), ('~/z', '/home/someone/z'), ('', '/home/someone/.cache/monosem')):
        monkeypatch.setenv('MONOSEM_CACHE', given)
        assert cache_folder() == (want and Path(want))
    monkeypatch.setattr(os.path, 'expanduser', lambda p: p)  # nobody's home
    assert cache_folder() is None


TOGETHER = """
import sys, warnings
import monosem.tokens as t
from monosem.corpus import Corpus, load_corpus
warnings.simplefilter('error')
t._WORTH_IT, corpus, tok = 0, Corpus('c', load_corpus('mini').docs[:40]), t.load_tokenizer()
for _ in range(15):
    w = t.token_windows(corpus, tok, t.Mixture(budget=3000), n_ctx=16)
    for path in t.cache_folder().glob('tokens-*'): path.unlink(missing_ok=True)
print(w.hash)
"""


def test_processes_share_a_cache(cache):
    "Two write and remove the same file over and over: neither fails, warns or reads half of it."
    runs = [subprocess.Popen([sys.executable, '-c', TOGETHER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (a, said_a), (b, said_b) = (p.communicate(timeout=300) for p in runs)
    assert [p.returncode for p in runs] == [0, 0], said_a+said_b
    assert a == b and len(a) == 13 and not list(cache.iterdir())


# What windows can be asked

@pytest.fixture
def six():
    docs = [a_doc('x', 'b'), a_doc('y', 'a'), a_doc('z', 'b'), a_doc('v', 'c')]
    tokens, doc = np.arange(6, dtype=np.uint16).reshape(3, 2), np.array([[0, 0], [1, 2], [2, 2]])
    return TokenWindows(tokens, doc.astype(np.int32), docs, {'b': 2.5, 'a': .5}, 'abc')


def test_kinds_and_the_table_count_tokens(six):
    assert six.kinds == ['a', 'b', 'c'] and six.kind.tolist() == [[1, 1], [0, 1], [1, 1]]
    table = six.table()
    assert list(table.index) == ['b', 'a', 'c'] and list(table.tokens) == [5, 1, 0]
    assert list(table.share) == [5/6, 1/6, 0] and list(table.epochs[:2]) == [2.5, .5]
    assert np.isnan(table.epochs['c']) and len(six) == 3 and six.n_tokens == 6


def test_some_of_the_windows(six):
    for rows in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        some = six[np.asarray(rows)]
        assert some.tokens.tolist() == six.ids(rows).tolist() == [[4, 5], [0, 1]]
        assert some.doc.tolist() == [[2, 2], [0, 0]] and some.tokenizer == 'abc'
        assert some.docs is six.docs and some.epochs == six.epochs and some.hash != six.hash
    assert six[1].tokens.tolist() == six.ids(1).tolist() == [[2, 3]]
    assert six[1].kind.tolist() == [[0, 1]]
    assert six.ids(slice(1, 3)).tolist() == six[1:].tokens.tolist() == [[2, 3], [4, 5]]
    assert six.ids().dtype == torch.int64 and six.ids(device='meta').device.type == 'meta'


def test_the_hash_of_windows_is_that_of_their_tokens(six):
    assert six.hash == hashlib.sha256(bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])).hexdigest()[:12]
    for dtype in (np.int32, np.uint32, np.int64, '>i8'):
        assert replace(six, tokens=six.tokens.astype(dtype)).hash == six.hash
    assert replace(six, tokens=six.tokens[:, ::-1]).hash != six.hash
    assert replace(six, tokens=six.tokens+np.uint32(2**16)).hash != six.hash
    assert replace(six, tokenizer=None).tokenizer is None


def test_windows_of_ids_of_ones_own(bytewise):
    for ids in ([[5, 3, 2], [1, 0, 4]], np.array([[5, 3, 2], [1, 0, 4]]),
                torch.tensor([[5, 3, 2], [1, 0, 4]]), np.array([[5, 3, 2], [1, 0, 4]], np.int8)):
        w = windows_from_ids(ids)
        assert w.tokens.dtype == np.uint16 and w.ids().tolist() == [[5, 3, 2], [1, 0, 4]]
        assert w.doc.tolist() == [[0]*3, [1]*3] and w.doc.dtype == np.int32
        assert w.kinds == ['text'] and len({d.text for d in w.docs}) == 2 and w.tokenizer is None
    assert windows_from_ids([[65_535]]).tokens.dtype == np.uint16
    assert windows_from_ids([[65_536]]).tokens.tolist() == [[65_536]]
    known = windows_from_ids([[256, 0]], bytewise)
    assert known.tokenizer == windows_from_ids([[1]], known.tokenizer).tokenizer \
        == tokenizer_hash(bytewise)
    with pytest.raises(ValueError, match='0 to 256'): windows_from_ids([[257, 0]], bytewise)


@pytest.mark.parametrize('ids', [[[.5]], [[1., 2.]], [[True]], [['a']], [[0, -1]], [1, 2], [],
                                 [[]], [[[1]]], 3, [[2**32]], np.zeros((0, 4), int)])
def test_arrays_that_are_no_windows_are_refused(ids):
    with pytest.raises(ValueError, match='ids'): windows_from_ids(ids)
