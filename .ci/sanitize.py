"What .ci/sanitize runs: texts of every shape through the native engine, and some golden cases"
import json, os, random, sys
os.environ.pop("LD_PRELOAD")  # for this process only, not for the compiler that it starts
import torch
from concurrent.futures import ThreadPoolExecutor
from transformers import T5ForConditionalGeneration
from bild_nb import native
from bild_nb.native import KV, library
from bild_nb.rows import NativeEngine
from bild_nb.policy import Fixed, Policy
from bild_nb.testing import random_t5

quick, rng = "quick" in sys.argv, random.Random(0)
cases = 0
# each piece of memory for itself, as long as was asked for: a step across its end is found
native.CHUNK, native.space = 0, lambda size: torch.empty(size, dtype=torch.uint8)
NativeEngine._lend = lambda self, kind, n: torch.empty(n)


def row(n, vocab=40):
    return torch.tensor([[rng.randrange(2, vocab) for _ in range(n)]], dtype=torch.int64)


def text(d, source, tokens, settings=None):
    "A text read in odd pieces with wrong turns, then verified and drafted; the memory grows on the way"
    mask = (torch.rand(source.shape) < 0.8).long()
    cache, at = d.open(source, mask if rng.random() < 0.5 else None, settings=settings, room=16), 0
    while at < tokens.shape[1]:
        k = rng.randrange(1, 14)
        piece = tokens[:, at:at + k]
        d.verify(cache, piece, [at], piece[:, 1:])
        d.forward(cache, piece, [at], rng.randrange(1, piece.shape[1] + 1))
        d.judge_ids(cache, piece[0].tolist(), at, rng.randrange(piece.shape[1]), 2.)
        at = max(at + piece.shape[1] - rng.randrange(0, 2), 1)
        if at >= tokens.shape[1] - 1: break
    d.propose(cache, tokens[:, :1], [at], Fixed(40), None, 40)
    d.draft_ids(cache, tokens[0].tolist(), 0, 0.3, 7)
    for bad in (-1, 2**40):  # refused before anything is read
        for call in (d.forward, lambda c, t, a: d.propose(c, t, a, Fixed(4), None, 4),
                     lambda c, t, a: d.judge_ids(c, [3, *t[0].tolist()], a[0], 1, 2.)):
            try: call(cache, torch.tensor([[bad]]), [at])
            except IndexError: continue
            raise SystemExit(f"id {bad} was taken")


def shapes():
    yield random_t5(0)
    if quick: return
    yield random_t5(1, feed_forward_proj="gated-gelu")
    yield random_t5(2, num_heads=3, d_kv=7, d_model=30, d_ff=37, vocab_size=33, feed_forward_proj="gated-silu")
    yield random_t5(3, num_heads=2, d_kv=64, layers=1, decoder_layers=3)
    yield random_t5(4, num_heads=1, d_kv=100, feed_forward_proj="gelu", dense_act_fn="gelu")
    yield random_t5(5, num_heads=2, d_kv=32, d_ff=1030, vocab_size=700)


for model in shapes():
    vocab = model.config.vocab_size
    for int8 in (False, True)[:1 + bool(library().int8_top())]:
        d = NativeEngine(model, int8=int8)
        for d.shares, kv in ((False, 'fp32'), (True, 'fp32'), (True, 'bf16'), (False, 'int8'))[:2 if quick else 4]:
            d.keep_kv(kv)  # one thread, two threads
            for n in (3,) if quick else (1, 2, 15, 16, 17, 31, 193, 300, 577, 1100):
                text(d, row(n, vocab), row(rng.choice([2, 15, 33, 70]), vocab))
                cases += 1

def rows(d, lengths, vocab):
    "Texts of several lengths, drafted and judged together, each with wrong turns; their memory grows on the way"
    caches = [d.open(row(n, vocab), room=16) for n in lengths]
    at, ends = [0]*len(caches), (7, 1, 40, 23, 2)
    for _ in range(4):
        ids = [[rng.randrange(2, vocab) for _ in range(rng.randrange(1, 9))] for _ in caches]
        found = d.draft_rows(caches, ids, at, .1, [ends[i % 5] for i in range(len(caches))])
        g = [len(tokens) for tokens, *_ in found]
        d.judge_rows(caches, [x + tokens for x, (tokens, *_) in zip(ids, found)], at, g, 2.)
        at = [max(c.length - rng.randrange(0, 3), 0) for c in caches]
    for bad in (-1, 2**40):
        try: d.judge_rows(caches, [[3, 4]]*(len(caches) - 1) + [[3, bad]], at, [1]*len(caches), 2.)
        except IndexError: continue
        raise SystemExit(f'id {bad} was taken')


if not quick:
    for model, vocab in ((random_t5(7, num_heads=2, d_kv=64, d_ff=1030), 40),
                         (random_t5(8, num_heads=3, d_kv=7, d_model=30, d_ff=37, vocab_size=33), 33)):
        for int8 in (False, True)[:1 + bool(library().int8_top())]:
            for kv in KV:
                d = NativeEngine(model, int8=int8, kv=kv)
                for d.shares in (False, True):
                    for lengths in ((1, 2, 3), (193, 15, 1100, 97), (5,), tuple(range(29, 42))):
                        rows(d, lengths, vocab)
                        cases += len(lengths)
    model = random_t5(6, layers=1, decoder_layers=1)
    for int8, kv in ((False, 'fp32'), (True, 'bf16'))[:1 + bool(library().int8_top())]:
        d = NativeEngine(model, int8=int8, kv=kv)
        d.shares = True
        for n in (*range(1, 100), *range(100, 1101, 13)):  # every rest of a tile of queries, of keys, of rows
            d.forward(d.open(row(n)), row(3), [0])
            cases += 1
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda n: text(d, row(n), row(20)), range(1, 9)))
    from bild_nb.decode import BigLittleDecoder
    pair = [NativeEngine(T5ForConditionalGeneration.from_pretrained(f"nbs/golden/pair0/{w}").eval()) for w in ("large", "small")]
    with open("nbs/golden/pair0/official.json") as f: golden = json.load(f)["cases"]
    for c in golden[::5]:
        out = BigLittleDecoder(*pair, Policy.official(c["fallback"], c["rollback"])).generate(torch.tensor([c["input_ids"]]), max_length=c["max_length"])
        assert out.sequences[0].tolist() == c["output_ids"]
        cases += 1
print(f"{cases} texts, nothing found")
