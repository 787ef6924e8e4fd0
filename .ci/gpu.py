"The steps of .ci/gpu. One process runs them one after another, a second one watches it: a step that hangs or breaks the GPU's context is ended, and a fresh process goes on."
import argparse, faulthandler, gc, json, os, signal, subprocess, sys, tarfile, tempfile, threading, time, traceback
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

top = Path(__file__).resolve().parent.parent
GRACE = 15  # seconds that a step may overrun before its process is killed
STEPS = {}  # name to (function, seconds)


def step(seconds):
    "A step and its budget"
    def add(f):
        STEPS[f.__name__.strip("_").replace("_", "-")] = f, seconds
        return f
    return add


# ---------------------------------------------------------------- time limits

class Alarm(BaseException):
    "Time is up. No Exception, or compilers would catch it and go on"


_deadlines = []

def _arm():
    signal.setitimer(signal.ITIMER_REAL, max(min(_deadlines) - time.monotonic(), .01) if _deadlines else 0)

@contextmanager
def limit(seconds, what):
    "A TimeoutError after `seconds`; in the main thread"
    mine = time.monotonic() + seconds
    _deadlines.append(mine)
    _arm()
    try: yield
    except Alarm:
        if time.monotonic() < mine - .05: raise
        raise TimeoutError(f"{what} took over {seconds:.0f} s") from None
    finally:
        _deadlines.pop()
        _arm()

def left():
    "Seconds until the step has to end"
    return min(_deadlines, default=time.monotonic() + 60) - time.monotonic()


# ---------------------------------------------------------------- what steps share

class At:
    "Where and how the steps run"
    def __init__(self, out, dry):
        self.out, self.dry, self.device = out, dry, "cpu" if dry else "cuda"
        self.cuda = not dry
        from bild_nb.bench import SHAPES
        if dry:
            tiny = dict(num_layers=2, num_heads=2, d_model=64, d_ff=64, d_kv=16)
            SHAPES["tiny"], SHAPES["mt5-tiny"] = tiny, tiny
            SHAPES["llama-tiny"] = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
                                        intermediate_size=96, vocab_size=32000)

    def pair(self, kind="t5"):
        "Names of shapes"
        if self.dry: return ("tiny", "tiny") if kind == "t5" else (f"{kind}-tiny", f"{kind}-tiny")
        return ("llama-8b", "llama-1b") if kind == "llama" else (f"{kind}-large", f"{kind}-small")

    def pick(self, full, dry): return dry if self.dry else full

    def machine(self):
        "What a figure depends on"
        from importlib.metadata import PackageNotFoundError, version
        from bild_nb import __version__
        from bild_nb.bench import hardware
        def maybe(name):
            try: return version(name)
            except PackageNotFoundError: return None
        return hardware(self.device) | dict(bild_nb=__version__, triton=maybe("triton"), ctranslate2=maybe("ctranslate2"))

    def write(self, name, run, rows=()):
        "A run folder, as the bench writes it"
        from bild_nb.bench import write_run
        from bild_nb.safe import write_json
        (self.out/name).mkdir(parents=True, exist_ok=True)
        run = dict(hardware=self.machine()) | run | dict(dry=self.dry)
        if rows: write_run(self.out/name, run, rows)
        else: write_json(self.out/name/"run.json", run)


def synchronize():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()

def each(f, n, repeats=5):
    "Median µs of a call, `n` calls in a row, the last one waited for"
    def once():
        synchronize()
        started = time.perf_counter()
        for _ in range(n): f()
        synchronize()
        return (time.perf_counter() - started)/n*1e6
    once()
    return median(once() for _ in range(repeats))

def graph(f, cuda):
    "`f` as a CUDA graph that is replayed; on a CPU just `f`"
    import torch
    if not cuda: return f
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): f()
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made): f()
    return made.replay


# ---------------------------------------------------------------- 1. the device

@step(30)
def device(at):
    "Bandwidth of memory; what a launch, a graph's kernel and a wait cost"
    import torch
    from bild_nb.bench import bandwidth
    n = at.pick(1000, 20)
    x, wide = torch.zeros(1, device=at.device), torch.ones(at.pick(2**28, 2**20), device=at.device)
    other = torch.empty_like(wide)
    def add(times=1):
        for _ in range(times): x.add_(1)
    copied = each(lambda: other.copy_(wide), 10)
    found = dict(read_gb_s=bandwidth(at.pick(4096, 16), device=at.device), copy_gb_s=2*wide.numel()*4/copied/1e3,
                 launch_us=each(add, n), graph_of_1_us=each(graph(add, at.cuda), n),
                 graph_of_100_us_a_kernel=each(graph(partial(add, 100), at.cuda), max(n//20, 1))/100,
                 item_us=each(lambda: (x.add_(1), x.item()), n))
    if at.cuda:
        event, pinned = torch.cuda.Event(), torch.zeros(1, pin_memory=True)
        def wait(event=event):
            x.add_(1)
            event.record()
            event.synchronize()
        def to_pinned():
            x.add_(1)
            pinned.copy_(x, non_blocking=True)
            event.record()
            event.synchronize()
        found |= dict(event_us=each(wait, n), pinned_copy_and_event_us=each(to_pinned, n))
        found["event_blocking_us"] = each(partial(wait, torch.cuda.Event(blocking=True)), n)
        found["driver_free_gb"] = torch.cuda.mem_get_info()[0]/1e9
    at.write("device", found)
    print("   ".join(f"{k} {v:.3g}" for k, v in found.items()))
    print(json.dumps(at.machine()))


# ---------------------------------------------------------------- 2. equality

POLICIES = "large", "small", "0.5,2", "paper:0.5,2", "lossless:0.5", "official:0.5,2"
NEAR = 1e-4  # decisions nearer than this may rightly differ between two machines

class Tally:
    "Counts cases and collects failures by name"
    def __init__(self): self.cases, self.near, self.failures, self.notes = 0, [], [], []
    def check(self, name, f):
        "`f()` says what is wrong, or None; an error is wrong, too"
        self.cases += 1
        try: wrong = f()
        except Exception as e: wrong = f"{type(e).__name__}: {str(e)[:300]}"
        if not wrong: return
        if wrong.startswith("near:"): self.near.append(f"{name}: {wrong}")
        else:
            self.failures.append(f"{name}: {wrong}")
            print(f"  FAILED {name}: {wrong}")
    def report(self): return dict(cases=self.cases, near=self.near, failures=self.failures, notes=self.notes)


class Text:
    "A source and what the plain backend on the CPU makes of it"
    def __init__(self, pair, policy, ids, mask=None, new=20):
        self.pair, self.policy, self.ids, self.mask, self.new = pair, policy, ids, mask, new
        self.tokens, self.log, self.events = self.run(pair, "cpu")

    def run(self, pair, device):
        from bild_nb.decode import BigLittleDecoder
        mask = None if self.mask is None else self.mask.to(device)
        out = BigLittleDecoder(*pair, self.policy).generate(self.ids.to(device), mask, max_new_tokens=self.new)
        return out.sequences[0].tolist(), out.trace[0].log, out.trace[0].events

    def differs(self, pair, device):
        "What is wrong with the text and the passes of `pair`, or None"
        tokens, log, _ = self.run(pair, device)
        if (tokens, log) == (self.tokens, self.log): return None
        margin = self.margin()
        what = first_difference("token", tokens, self.tokens) or first_difference("pass", log, self.log)
        return f"near: {what}, margin {margin:.1g}" if margin < NEAR else f"{what}, margin {margin:.1g}"

    def margin(self):
        "How near the nearest decision was to another one"
        import torch
        from bild_nb.policy import as_policy
        policy, found = as_policy(self.policy), []
        for e in self.events:
            if hasattr(policy.draft, "threshold"): found += [abs(p - policy.draft.threshold) for p in e.confidence]
            if hasattr(policy.accept, "threshold"): found += [abs(d - policy.accept.threshold) for d in e.distance]
        with torch.inference_mode():
            for model, used in zip(self.pair, (policy.uses_large, policy.uses_small)):
                if not used: continue
                cache = model.open(self.ids, self.mask)
                best = model.forward(cache, torch.tensor([self.tokens[:-1]]), [0]).float().topk(2).values
                found.append((best[..., 0] - best[..., 1]).min().item())
        return min(found)


def first_difference(what, a, b):
    "Where two lists differ, or None"
    if a == b: return None
    i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"{what} {i} is {a[i] if i < len(a) else 'missing'}, not {b[i] if i < len(b) else 'there'}"


def random_pairs():
    "Name to a large and a small model of transformers"
    from bild_nb.testing import as_mt5, noisy, random_t5
    gated, own = dict(feed_forward_proj="gated-gelu"), dict(tie_word_embeddings=False)
    made = {"gated": random_t5(2, **gated), "wide": random_t5(7, vocab_size=500, d_model=256, d_kv=64, num_heads=4, d_ff=512),
            "odd sizes": random_t5(1, vocab_size=101, num_heads=3), "mt5": as_mt5(random_t5(6, **gated, **own)),
            "own head": random_t5(5, **own), "deep decoder": random_t5(3, decoder_layers=5),
            "shallow decoder": random_t5(4, layers=4, decoder_layers=1, **gated), "relu 0": random_t5(0)}
    return {name: (large.eval(), noisy(large, 9)) for name, large in made.items()}

def moved(model, device):
    "A copy of `model` elsewhere"
    import copy
    return copy.deepcopy(model).to(device)

def sources(vocab, seed=0):
    "Two sources, and one with holes"
    import torch
    g = torch.Generator().manual_seed(seed)
    short, long = (torch.cat([torch.randint(3, vocab, (1, n), generator=g), torch.ones(1, 1, dtype=torch.int64)], 1) for n in (3, 25))
    mask = torch.ones_like(long)
    mask[0, [0, 4, 5, 11, 25]] = 0
    return dict(short=(short, None), long=(long, None), holes=(long, mask))


@step(120)
def equality(at):
    "Tokens and passes of the plain backend on the CPU, by every backend on the GPU in fp32"
    import torch
    from bild_nb.decoder import Decoder
    from bild_nb.pair import decoder_for
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tally, models = Tally(), random_pairs()
    if at.dry: models = {name: models[name] for name in ("relu 0", "mt5")}
    try:
        golden(tally, at)
        not_a_number(tally, at)
        if at.cuda: tally.check("the stream of recordings is nobody else's", partial(recording_apart, at))
        llamas(tally, at)
        for i, name in enumerate(models):
            if left() < 10:
                tally.notes.append(f"left out for time: {', '.join(list(models)[i:])}")
                break
            here = [moved(m, at.device) for m in models[name]]
            cpu = [Decoder(m) for m in models[name]]
            made = {backend: [decoder_for(m, backend=backend) for m in here] for backend in ("graphs", "engine", "plain")}
            texts(tally, name, cpu, made, at)
            if i >= at.pick(3, 1): continue
            for more in (outgrown, interleaved, in_threads): more(tally, name, cpu, made["graphs"], at)
            if i < 2: batches_of_texts(tally, name, cpu, made["graphs"], at)  # each number of rows compiles kernels of its own
    finally:
        at.write("equality", tally.report())
        print(f"{tally.cases} cases, {len(tally.failures)} wrong, {len(tally.near)} too near to call; {'; '.join(tally.notes)}")
    if len(tally.near) > .05*tally.cases: tally.failures.append(f"too many cases are too near to call: {tally.near[0]}")
    if tally.failures: raise AssertionError(f"{len(tally.failures)} of {tally.cases} cases are wrong, the first: {tally.failures[0]}")


def texts(tally, name, cpu, made, at):
    "Texts and passes of every policy"
    for policy in POLICIES:
        for kind, (ids, mask) in sources(cpu[0].words).items():
            text = Text(cpu, policy, ids, mask)
            for backend, pair in made.items():
                if backend == "plain" and kind != "holes": continue  # slow, and proves little
                tally.check(f"{name}, {policy}, {kind}, {backend}", partial(text.differs, pair, at.device))

def close(name, ours, plain, exact):
    "What is wrong with logits beside those of the CPU in fp32 and in float64, or None"
    if ours.shape != exact.shape: return f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    def error(z): return ((z.double().cpu() - exact).norm()/exact.norm()).item()
    ours, plain = error(ours), error(plain)
    allowed = min(1e-3 + 20*plain, .1)  # random weights amplify rounding
    return None if ours < allowed else f"{name}: relative error {ours:.2g}, of the CPU {plain:.2g}"  # also of NaN

def exact(decoder):
    "`decoder` in float64"
    import copy
    from bild_nb.decoder import Decoder
    return Decoder(copy.deepcopy(decoder.model).double())

def chunks(tokens, sizes):
    "Pieces of a row, and where they begin"
    at = 0
    for k in sizes:
        yield at, tokens[:, at:at + k]
        at += k

def outgrown(tally, name, cpu, pair, at):
    "Far more tokens than a cache was opened for"
    import torch
    ids = sources(cpu[0].words)["long"][0]
    tokens = torch.randint(3, cpu[0].words, (1, 700), generator=torch.Generator().manual_seed(1))
    def both(a, b):
        with torch.inference_mode():
            c = exact(a)
            ours, plain, true = b.open(ids.to(at.device), room=8), a.open(ids), c.open(ids)
            for start, piece in chunks(tokens, [1, 11, 3, 40, 1, 200, 2, 11, 1, 300, 8]):
                z = a.forward(plain, piece, [start]), c.forward(true, piece, [start])
                wrong = close(f"tokens {start} on", b.forward(ours, piece.to(at.device), [start]), *z)
                if wrong: return wrong
    for which, a, b in zip(("large", "small"), cpu, pair): tally.check(f"{name}, {which}, outgrows its cache", partial(both, a, b))
    text = Text(cpu, "0.5,2", ids, new=at.pick(280, 40))
    tally.check(f"{name}, a text of up to {text.new} tokens", partial(text.differs, pair, at.device))

def interleaved(tally, name, cpu, pair, at):
    "Two texts of one model, piece by piece in turns, with a rollback"
    import torch
    both = [sources(cpu[0].words, seed)["long"][0] for seed in (3, 4)]
    tokens = torch.randint(3, cpu[0].words, (2, 1, 40), generator=torch.Generator().manual_seed(2))
    pieces = [(0, 1), (1, 5), (4, 9), (9, 12), (11, 15), (15, 16)]  # from, to; some are read again
    def check(a, b):
        with torch.inference_mode():
            c = exact(a)
            ours = [b.open(x.to(at.device)) for x in both]
            plain, true = [a.open(x) for x in both], [c.open(x) for x in both]
            for start, end in pieces:
                for i in (0, 1):
                    piece = tokens[i, :, start:end]
                    z = a.forward(plain[i], piece, [start]), c.forward(true[i], piece, [start])
                    wrong = close(f"text {i}, tokens {start} to {end}", b.forward(ours[i], piece.to(at.device), [start]), *z)
                    if wrong: return wrong
    for which, a, b in zip(("large", "small"), cpu, pair): tally.check(f"{name}, {which}, interleaved", partial(check, a, b))

def recording_apart(at):
    "Streams that PyTorch hands out, enough to begin again"
    import torch
    from bild_nb.graphs import _apart
    mine = _apart(torch.zeros(1, device=at.device).device)
    if mine in [torch.cuda.Stream() for _ in range(70)]: return "a thread may get it"

def in_threads(tally, name, cpu, pair, at):
    "Two threads at once on one pair, without and with a stream of their own"
    import torch
    texts = [[Text(cpu, policy, *found) for found in sources(cpu[0].words, seed).values() for policy in ("0.5,2", "large")] for seed in (5, 6)]
    def work(mine, own, wrong):
        stream = torch.cuda.stream(torch.cuda.Stream()) if own and at.cuda else nullcontext()
        try:
            with stream:
                for text in mine*2:
                    found = text.differs(pair, at.device)
                    if found: wrong.append(found)
        except Exception as e: wrong.append(f"{type(e).__name__}: {str(e)[:300]}")
    def check(own):
        wrong = []
        threads = [threading.Thread(target=work, args=(mine, own, wrong), daemon=True) for mine in texts]
        for t in threads: t.start()
        for t in threads: t.join()
        real = [w for w in wrong if not w.startswith("near:")]
        return next(iter(real or wrong), None)
    for own in (False, True): tally.check(f"{name}, two threads{', a stream each' if own else ''}", partial(check, own))

def batches_of_texts(tally, name, cpu, pair, at):
    "Rows of a batch: the texts and the passes of the rows alone"
    import torch
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.graphs import GraphEngine
    pair = [GraphEngine(d.model, size=16) for d in pair]  # so that caches grow
    found = [x for seed in (7, 8) for x in sources(cpu[0].words, seed).values()][1:]
    width = max(ids.shape[1] for ids, _ in found)
    def padded(x, by=0): return torch.nn.functional.pad(x[0], (0, width - x.shape[1]), value=by)
    rows = torch.stack([padded(ids) for ids, _ in found]).to(at.device)
    mask = torch.stack([padded(torch.ones_like(ids) if m is None else m) for ids, m in found]).to(at.device)
    def check(out, i, text):
        if isinstance(out, Exception): raise out
        row, passes = out.sequences[i].tolist()[:len(text.tokens)], out.trace[i].log
        wrong = first_difference("token", row, text.tokens) or first_difference("pass", passes, text.log)
        return f"near: {wrong}" if wrong and text.margin() < NEAR else wrong
    def together(decoder, policy):
        if not decoder._joins(): return f"{policy} is decoded row by row"
    for policy, new in (("large", 20), ("0.5,2", 40), ("lossless:0.5,max_draft=14", 20)):  # a draft of 14 is longer than a graph
        texts, decoder = [Text(cpu, policy, *x, new=new) for x in found], BigLittleDecoder(*pair, policy)
        tally.check(f"{name}, {policy}, together", partial(together, decoder, policy))
        try: out = decoder.generate(rows, mask, max_new_tokens=new)
        except Exception as e: out = e
        for i, text in enumerate(texts): tally.check(f"{name}, {policy}, row {i} of a batch", partial(check, out, i, text))

def llamas(tally, at):
    "Models that continue a prompt, alone and as rows of a batch"
    import torch
    from bild_nb.causal import Causal
    from bild_nb.causal_graphs import CausalGraphEngine
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.testing import noisy, random_causal
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 39, (1, n), generator=g) for n in (3, 30, 12)]
    rows = torch.cat([torch.nn.functional.pad(x, (30 - x.shape[1], 0)) for x in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(x), (30 - x.shape[1], 0)) for x in prompts])
    for kind in ("llama", "qwen3", "gemma")[:at.pick(3, 1)]:
        models = [random_causal(kind, 2, eos_token_id=39)]
        models.append(noisy(models[0], 1, .2))
        cpu, pair = [Causal(m) for m in models], [CausalGraphEngine(moved(m, at.device), size=16) for m in models]
        for policy in ("large", "0.5,2"):
            texts = [Text(cpu, policy, x) for x in prompts]
            for text in texts: tally.check(f"{kind}, {policy}, a prompt of {text.ids.shape[1]}", partial(text.differs, pair, at.device))
            out = BigLittleDecoder(*pair, policy).generate(rows.to(at.device), mask.to(at.device), max_new_tokens=20)
            for i, text in enumerate(texts): tally.check(f"{kind}, {policy}, row {i} of a batch", partial(behind, out, i, text))

def behind(out, i, text):
    "What is wrong with row `i` behind its prompt, or None"
    row, n = out.sequences[i].tolist(), text.ids.shape[1]
    wrong = first_difference("token", row[30:30 + len(text.tokens) - n], text.tokens[n:]) or first_difference("pass", out.trace[i].log, text.log)
    return f"near: {wrong}" if wrong and text.margin() < NEAR else wrong

def not_a_number(tally, at):
    "Weights with NaN end a text with an error, by every policy that asks that model"
    import torch
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.pair import decoder_for
    from bild_nb.testing import random_t5
    ids = sources(40)["short"][0].to(at.device)
    for sick in ("large", "small"):
        models = dict(large=random_t5(0), small=random_t5(1))
        with torch.no_grad(): models[sick].decoder.block[1].layer[1].EncDecAttention.o.weight[3, 3] = torch.nan
        for backend in ("graphs", "engine"):
            pair = [decoder_for(m.to(at.device), backend=backend) for m in models.values()]
            for policy in ("0.0,2", "lossless:0", sick):
                def check():
                    try: text = BigLittleDecoder(*pair, policy).generate(ids, max_new_tokens=20).sequences[0].tolist()
                    except FloatingPointError as e: return None if sick in str(e) else f"the error names another model: {e}"
                    return f"no error, but the text {text[:8]}"
                tally.check(f"NaN in the {sick} model, {policy}, {backend}", check)

def golden(tally, at):
    "Recordings of the authors' program and of Algorithm 1"
    import torch
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.pair import decoder_for, load_model
    from bild_nb.policy import Policy
    folder = top/"nbs"/"golden"/"pair0"
    models = [load_model(str(folder/w), w, at.device)[0] for w in ("large", "small")]
    named = dict(nll=Policy.paper, nll_disagree=Policy.bild, argmax=lambda fallback, rollback, cap: Policy.lossless(fallback, cap))
    def policy(c):
        if "criterion" not in c: return Policy.official(c["fallback"], c["rollback"])
        return named[c["criterion"]](c["fallback"], c["rollback"], c["draft_cap"])
    def compare(decoder, c):
        decoder.policy = policy(c)
        out = decoder.generate(torch.tensor([c["input_ids"]], device=at.device), max_length=c["max_length"])
        t = out.trace[0]
        ours = {k: v for k, v in vars(t).items() if k in c} | dict(output_ids=out.sequences[0].tolist())
        if "trace" in c: ours["trace"] = t.passes
        bad = [k for k in ours if ours[k] != c[k]]
        near = "near: " if c.get("min_margin", 1) < NEAR else ""
        return f"{near}{bad[0]} is {ours[bad[0]]}, not {c[bad[0]]}"[:400] if bad else None
    for backend, stride in dict(graphs=at.pick(4, 60), engine=at.pick(24, 120), plain=at.pick(96, 120)).items():
        decoder = BigLittleDecoder(*[decoder_for(m, backend=backend) for m in models])
        for name in ("official", "algorithm1"):
            for i, c in list(enumerate(json.loads((folder/f"{name}.json").read_text())["cases"]))[::stride]:
                tally.check(f"golden {name} {i}, {backend}", partial(compare, decoder, c))


# ---------------------------------------------------------------- 3. passes

@step(60)
def passes(at):
    "A source and passes over k tokens of both models, with the time that memory needs"
    from bild_nb.bench import KINDS, KS, bandwidth, bench_sources, both_passes, open_model, quiet
    names = at.pair()
    models = [open_model(name, which, at.device)[0] for name, which in zip(names, ("large", "small"))]
    speed, rows = bandwidth(at.pick(4096, 16), device=at.device), []
    for length in at.pick((32, 800), (8, 20)):
        source = bench_sources(None, 1, length, at.device)[0]
        with quiet(): found = both_passes(*models, source, speed, at.pick(15, 1), KINDS["cuda"])
        rows += [dict(source=length) | row for row in found]
        for r in found:
            reads = "".join(f"{r[f'read_{k}_ms']:8.3f}" for k in KS)
            print(f"{r['model']:6}{r['backend']:8}source {length:4}: floor {r['floor_ms']:.3f}, source {r['prefill_ms']:.3f}, reads of {KS}{reads} ms; "
                  f"step/floor {r['step_x_floor']:.2f}, (2-8)/1 {r['verify_x_step']:.2f}")
        at.write("passes", dict(large=names[0], small=names[1], bandwidth=speed, passes=rows))


# ---------------------------------------------------------------- 4. texts beside peers

def tries(seconds, static):
    "Tries a system; a compiled one three times: it compiles, then records"
    def attempt(f):
        name = getattr(f.func, "__qualname__", "").split(".")[0]
        if name == "hf_static" and not static: raise RuntimeError("compiled for short sources only, of mT5 for none")
        started = time.perf_counter()
        with limit(seconds, "its warm-up"):
            for _ in range(3 if name == "hf_static" else 1): f()
        if name == "hf_static": print(f"static cache: compiled in {time.perf_counter() - started:.0f} s")
    return attempt

def beside_peers(at, kind, first):
    "The bench at two lengths of a source; the folders are `first` and `first`-800"
    from bild_nb.bench import KINDS, bench, bench_table
    from bild_nb.safe import write_json
    large, small = at.pair(kind)
    plans = [(first, at.pick(32, 8), 2, at.pick(3, 1)), (f"{first}-800", at.pick(800, 20), 1, at.pick(3, 1))]
    if at.dry and kind != "t5": plans.pop()  # for time
    wrong = []
    for folder, length, n, repeats in plans:
        out = at.out/folder
        out.mkdir(parents=True, exist_ok=True)
        attempt = tries(60, static=folder in ("t5-large", "llama"))  # compiling takes long
        run = bench(large, small, out=out, n=n, length=length, new=at.pick(45, 9), repeats=repeats,
                    device=at.device, kinds=KINDS["cuda"], attempt=attempt)
        run |= dict(hardware=at.machine(), length=length, batch=1, dry=at.dry)
        write_json(out/"run.json", run)
        print(f"source of {length} tokens")
        print(bench_table(run))
        wrong += [note for note in run["notes"] if note.startswith(("large,", "BiLD,", "lossless,"))]
        clean(at)
    if wrong: raise AssertionError(wrong[0])

@step(150)
def t5_large(at): beside_peers(at, "t5", "t5-large")


# ---------------------------------------------------------------- 5. batches

@step(45)
def batches(at):
    "ms a step of the large model alone, in batches"
    import torch
    from bild_nb import graphs
    from bild_nb.bench import bench_sources, endless, greedy_settings, open_model, quiet
    name, (few, many), length = at.pair()[0], at.pick((8, 40), (2, 6)), at.pick(32, 8)
    model, rows, notes = endless(open_model(name, "large", at.device)[0]), [], []
    ours = getattr(graphs, "batch_steps", None)
    if ours is None: notes.append("bild_nb.graphs.batch_steps: not there")
    def seconds(source, new):
        settings = greedy_settings(model, new, forced=True)
        synchronize()
        started = time.perf_counter()
        with torch.inference_mode(): model.generate(source, generation_config=settings)
        synchronize()
        return time.perf_counter() - started
    for batch in at.pick((1, 8, 32), (1, 2)):
        source, row = torch.cat(bench_sources(None, batch, length, at.device)), dict(batch=batch, source=length)
        with quiet():
            seconds(source, few)
            times = [(seconds(source, many) - seconds(source, few))/(many - few)*1e3 for _ in range(at.pick(3, 1))]
        row["transformers_ms"] = median(times)
        if ours:
            try: row["ours_ms"] = ours(model, batch, length, many)
            except Exception as e: notes.append(f"batch_steps at {batch}: {type(e).__name__}: {str(e)[:300]}")
        rows.append(row)
        print(json.dumps(row))
        at.write("batches", dict(large=name, steps=rows, notes=notes))
    print("; ".join(notes))
    wrong = [note for note in notes if "not there" not in note]
    if wrong: raise AssertionError(wrong[0])


@step(150)
def rows(at):
    "Texts in batches, rows that draft and roll back on their own, beside transformers"
    in_batches(at, "t5", "rows", at.pick(32, 8))

def in_batches(at, kind, folder, length):
    "Texts of a pair in batches of sources or prompts of `length` tokens"
    import torch
    from bild_nb.bench import as_graphs, bench_sources, endless, greedy_settings, open_model, quiet
    from bild_nb.policy import Policy
    names, new, found, causal = at.pair(kind), at.pick(45, 5), [], kind == "llama"
    models = [endless(open_model(name, which, at.device)[0]) for name, which in zip(names, ("large", "small"))]
    pair = [as_graphs(m) for m in models]
    settings = greedy_settings(models[0], new, forced=True)
    def hf(sources, first):
        more = {}  # a prompt ends with a token of its own
        if not causal: more["decoder_input_ids"] = torch.tensor([[settings.decoder_start_token_id, token] for token in first], device=at.device)
        with torch.inference_mode(): out = models[0].generate(sources, generation_config=settings, **more)
        return out.tolist(), dict()
    policies = {"large": Policy.large(), "BiLD": Policy.bild(.5, 2), "BiLD, at most 4": Policy.bild(.5, 2, max_draft=4), "lossless": Policy.lossless(.5)}
    systems = {f"{name}, graphs": partial(in_batch, pair, policy, new) for name, policy in policies.items()} | {"transformers large": hf}
    for batch in at.pick((1, 32, 8), (1, 3)):  # eight rows compile more kernels than 32 do
        sources = torch.cat(bench_sources(None, batch, length, at.device))
        first = [None if causal else token for token in range(3, 3 + 9*batch, 9)]  # the planted text is a circle: each row begins elsewhere
        runs, ms = {name: partial(f, sources, first) for name, f in systems.items()}, {name: [] for name in systems}
        with quiet():
            opening = None if causal else each(lambda: [m.read_sources([m.open(source[None]) for source in sources]) for m in pair], 1, at.pick(3, 1))/1e3
            for f in runs.values(): f()  # records graphs
            for turn in range(at.pick(3, 1)):
                for name, f in runs.items():
                    synchronize()
                    started = time.perf_counter()
                    texts, facts = f()
                    synchronize()
                    ms[name].append((time.perf_counter() - started)*1e3)
                    if name == "large, graphs": base = texts
                    same = sum(a == b for a, b in zip(texts, base))/batch
                    if turn == 0: found.append(dict(batch=batch, source=length, new=new, system=name, same=same, **facts))
        for row in found:
            if row["batch"] != batch: continue
            took = median(ms[row["system"]])
            row |= dict(ms=took, repeats=ms[row["system"]], ms_a_token=took/new, tokens_s=batch*new/took*1e3, sources_ms=opening)
            if at.cuda: row |= dict(memory_gb=torch.cuda.max_memory_reserved()/1e9, captures=[m.captures for m in pair])
            print(f"batch {batch:2}, {row['system']:24} {took:9.2f} ms, {row['ms_a_token']:7.3f} ms a step of text, {row['tokens_s']:9.0f} tokens/s, same text {row['same']:.0%}")
        at.write(folder, dict(large=names[0], small=names[1], systems=found))
    wrong = [row for row in found if row["same"] < .9 and row["system"].startswith("lossless")]
    if wrong: raise AssertionError(f"batch {wrong[0]['batch']}: lossless writes another text than the large model alone")

def in_batch(pair, policy, new, sources, first):
    "Our texts of a batch, each behind a first token of its own, if it has one; their passes, and rows that rode along"
    from collections import deque
    from bild_nb.decode import BigLittleDecoder
    decoder = BigLittleDecoder(*pair, policy)
    batch = decoder._batch(sources, None, (new, None), False, None, 0, {})
    for run, token in zip(batch.runs, first):
        if token is None: continue
        run.tokens.append(token)
        run.limit += 1
    with decoder._running(batch): deque(decoder._write(batch), 0)
    passes = {f"{which}_passes": sum(getattr(run.trace, f"{which}_passes") for run in batch.runs) for which in ("large", "small")}
    return [run.tokens for run in batch.runs], dict(passes, wasted=batch.wasted)


# ---------------------------------------------------------------- 6. the shipped pair

@step(120)
def shipped(at):
    "Quality and time of the shipped pair on the test split, in bf16 beside fp32"
    import gzip
    from pyarrow import parquet
    from bild_nb.bench import quiet
    from bild_nb.cost import measure
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.metrics import Bleu
    from bild_nb.pair import SHIPPED, load_pair
    from bild_nb.tasks import decode
    table = parquet.read_table(SHIPPED/"help-de-en"/"test.parquet").to_pylist()[:at.pick(None, 2)]
    bleu, rows = Bleu(), []
    bleu.load()
    with gzip.open(top/"nbs"/"runs"/"help-de-en-aligned-plain"/"records.jsonl.gz", "rt") as f:
        known = {(r["id"], r["policy"]): r["output"] for r in map(json.loads, f)}
    for dtype, spare in (("bf16", 60), ("fp32", 6)):  # seconds left for what follows
        pair = load_pair(device=at.device, dtype=dtype, backend="graphs")
        decoders = {f"{policy}, {dtype}": BigLittleDecoder(pair.large, pair.small, policy) for policy in ("large", "0.3,3")}
        ids, new = pair.encode([r["source"] for r in table], 256), at.pick(128, 24)
        with quiet():
            for i in range(at.pick(8, 0)): measure(decoders, ids[i], new)  # records graphs
            for i, x in enumerate(ids):
                if left() < at.pick(spare, 2): break
                for name, found in measure(decoders, x, new, first=i).items():
                    if found["error"]: raise FloatingPointError(f"{name}, example {i}: {found['error']}")
                    text, trace = decode(pair.tokenizer, found["tokens"]), found["trace"]
                    rows.append(dict(id=table[i]["id"], policy=name, output=text, ms=[round(ms, 4) for ms in found["ms"]], tokens=len(found["tokens"]) - 1,
                                     large_passes=trace.large_passes, small_passes=trace.small_passes,
                                     stats=bleu.stats(text, table[i]["target"])))
        scored = shipped_scores(table, rows, known, bleu)
        at.write("shipped", dict(of=len(table), systems=scored), rows)
    for name, found in scored.items():
        if "fp32" in name and found["same_as_recorded_on_cpu"] < .97: raise AssertionError(f"{name}: only {found['same_as_recorded_on_cpu']:.1%} of the texts are those recorded on a CPU")

def shipped_scores(table, rows, known, bleu):
    "Quality and time by system"
    def total(name, what): return sum(what(r) for r in rows if r["policy"] == name)
    def ms(r): return r["ms"][0]
    scored = {}
    for name in dict.fromkeys(r["policy"] for r in rows):
        policy, dtype = name.split(", ")
        own = [r for r in rows if r["policy"] == name]
        cpu = [known.get((r["id"], policy)) for r in own]
        stats = dict(bleu=own, bleu_recorded_on_cpu=[dict(stats=bleu.stats(text, table[i]["target"])) for i, text in enumerate(cpu) if text is not None])
        scores = {k: float(bleu.score([sum(column) for column in zip(*(r["stats"] for r in found))])[0]) for k, found in stats.items() if found}
        tokens = total(name, lambda r: r["tokens"])
        scored[name] = scores | dict(examples=len(own), ms=total(name, ms), tokens=tokens, ms_a_token=total(name, ms)/tokens,
                                     speed=total(f"large, {dtype}", ms)/total(name, ms),
                                     large_passes_a_token=total(name, lambda r: r["large_passes"])/tokens,
                                     small_passes_a_token=total(name, lambda r: r["small_passes"])/tokens,
                                     same_as_recorded_on_cpu=sum(r["output"] == text for r, text in zip(own, cpu))/len(own))
        print(f"{name:14} {len(own)} examples, BLEU {scored[name]['bleu']:.2f} (of the recorded texts {scores.get('bleu_recorded_on_cpu', 0):.2f}), "
              f"{scored[name]['ms_a_token']:.3f} ms a token, {scored[name]['speed']:.2f} x large, text as recorded on a CPU in fp32: {scored[name]['same_as_recorded_on_cpu']:.1%}")
    return scored


# ---------------------------------------------------------------- 7. a second pair, and where the time goes

@step(120)
def mt5_large(at): beside_peers(at, "mt5", "mt5-large")

@step(150)
def llama(at):
    "Llama 8B with 1B: batches, one text beside those of peers, batches of long prompts"
    in_batches(at, "llama", "llama-rows", at.pick(32, 8))
    clean(at)
    beside_peers(at, "llama", "llama")
    in_batches(at, "llama", "llama-rows-800", at.pick(800, 20))

@step(150)
def rows_800(at):
    "As rows, with sources of 800 tokens"
    in_batches(at, "t5", "rows-800", at.pick(800, 20))

@step(150)
def mt5_rows(at):
    "As rows, of mT5-large with mT5-small"
    in_batches(at, "mt5", "mt5-rows", at.pick(32, 8))

@step(40)
def profile(at):
    "Kernels of passes and of texts, and how long the GPU works in them"
    import torch
    from torch.profiler import ProfilerActivity, profile as recorder
    from bild_nb.bench import backends, bench_sources, endless, open_model, quiet, recorded, replayed
    from bild_nb.cost import Opened
    from bild_nb.decode import BigLittleDecoder
    from bild_nb.policy import Policy
    names, found = at.pair(), {}
    kinds = ("plain", "graphs")
    made = [backends(endless(open_model(name, which, at.device)[0]), kinds) for name, which in zip(names, ("large", "small"))]
    source = bench_sources(None, 1, at.pick(32, 8), at.device)[0]
    activities = [ProfilerActivity.CUDA] if at.cuda else [ProfilerActivity.CPU]
    def look(what, f, times):
        f()
        f()
        synchronize()
        started = time.perf_counter()
        for _ in range(times): f()
        synchronize()
        wall = (time.perf_counter() - started)/times*1e3  # the profiler would add to it
        with recorder(activities=activities) as p:
            for _ in range(times): f()
            synchronize()
        events = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in events)/times/1e3
        kernels = sum(e.count for e in events if e.self_device_time_total)/times
        first = [dict(name=e.key[:90], us=e.self_device_time_total/times, count=e.count/times) for e in events[:8] if e.self_device_time_total]
        found[what] = dict(wall_ms=wall, busy_ms=busy, kernels=kernels, largest=first)
        print(f"{what:28} {wall:9.3f} ms, of which the GPU works {busy:9.3f}, {kernels:.0f} kernels")
        for e in first[:4]: print(f"      {e['us']:9.1f} us in {e['count']:6.1f} calls of {e['name']}")
        at.write("profile", dict(large=names[0], small=names[1], found=found))
    with quiet():
        for kind in kinds[::-1]:
            pair = [models[kind] for models in made]
            for policy, name in ((Policy.large(), "large alone"), (replayed(recorded()), "BiLD")):
                decoder = BigLittleDecoder(*pair, policy)
                look(f"a text, {name}, {kind}", lambda: decoder.generate(source, max_new_tokens=at.pick(45, 9), trace=False), 2)
        for which, models in zip(("large", "small"), made):
            for kind in kinds[::-1]:
                with torch.inference_mode():
                    text = Opened(models[kind], source)
                    for k in (1, 8): look(f"{which}, {kind}, read {k}", partial(text.forward, k), at.pick(10, 1))


# ---------------------------------------------------------------- 8. tiles of the kernels

PRODUCTS = dict(large=dict(qkv=(3072, 1024, True), o=(1024, 1024, False), wi=(4096, 1024, True), wo=(1024, 4096, False)),
                small=dict(qkv=(1536, 512, True), o=(512, 512, False), wi=(2048, 512, True), wo=(512, 2048, False)))
FEW = [(4, 1024, 4), (8, 1024, 8), (4, 2048, 8), (2, 1024, 4), (8, 1024, 4), (4, 512, 4), (8, 512, 4), (2, 2048, 8)]  # BN, BK, warps
SOME = [(16, 128, 8, 4), (16, 128, 8, 8), (16, 128, 4, 4), (16, 128, 4, 8), (32, 128, 8, 8), (16, 256, 4, 4),
        (32, 256, 4, 8), (32, 64, 4, 4), (16, 64, 16, 8), (16, 64, 4, 4)]  # BN, BK, G, warps

def tried(M, K):
    "Sizes of tiles for a product of `M` rows"
    if M <= 8: yield from (dict(BM=1 << (M - 1).bit_length(), BN=BN, BK=BK, G=0, num_warps=w, num_stages=2) for BN, BK, w in FEW if BK <= K)
    BM = max(8, 1 << (M - 1).bit_length())
    yield from (dict(BM=BM, BN=BN, BK=BK, G=G, num_warps=w, num_stages=1) for BN, BK, G, w in SOME if G*BK <= K)

@step(150)
def tiles(at):
    "µs of a layer's products by the sizes of their tiles, in a graph of many layers"
    import torch
    from torch.nn.functional import linear
    from bild_nb.kernels import project, triton
    rows, shapes = [], PRODUCTS if at.cuda else {}  # nothing to compile for on a CPU
    for which, products in shapes.items():
        for product, (N, K, norm) in products.items():
            layers = dict(large=24, small=72)[which]  # more than the cache holds
            weights = [torch.randn(N, K, device=at.device).bfloat16()*.03 for _ in range(layers)]
            scale = torch.rand(K, device=at.device).bfloat16()
            for M in (1, 2, 5, 8, 11, 32):
                x = torch.randn(M, K, device=at.device).to(torch.float32 if norm else torch.bfloat16)
                y, plain = torch.zeros(M, N, device=at.device, dtype=torch.bfloat16 if norm else torch.float32), x.bfloat16()
                def us(f): return each(graph(lambda: [f(w) for w in weights], at.cuda), 6)/layers
                library = us(partial(linear, plain))
                for block in tried(M, K):
                    took = us(lambda w: project(x, w, y, scale if norm else None, add=not norm, **block))
                    rows.append(dict(model=which, product=product, rows=M, us=round(took, 2), library_us=round(library, 2), **block))
            at.write("tiles", dict(products=rows))


# ---------------------------------------------------------------- 9. attention by ourselves and by a library

class Attends:
    "Attention in the layers of a pass over `k` tokens: to `n` before them and themselves (`itself`), or to a source of `n`"
    def __init__(self, at, over, n, k):
        import torch
        layers, heads, d = at.pick((24, 16, 64), (2, 2, 16))  # of T5-large, whose keys and values no cache holds
        g, dtype = torch.Generator(at.device).manual_seed(n + k), torch.bfloat16 if at.cuda else torch.float32
        def normal(*shape): return torch.randn(shape, generator=g, device=at.device).to(dtype)
        self.over, self.n, self.k, self.size = over, n, k, max(256, 1 << (n + k - 1).bit_length())  # as the engine's buffers
        self.kv = [normal(2, 1, heads, self.size, d) for _ in range(layers)]
        self.qkv, self.line = normal(k, 3*heads*d), normal(heads, 2*self.size - 1)
        self.qkv[:, :heads*d] *= d**-.5
        self.line[:, self.size:] = -torch.inf  # what comes later
        self.asked = self.qkv[:, :heads*d].contiguous()
        self.q, *new = self.qkv.view(k, 3, 1, heads, d).permute(1, 2, 3, 0, 4)
        self.new, self.out = torch.stack(new), torch.empty(k, heads*d, device=at.device, dtype=dtype)
        self.at, self.slots, self.tokens = (torch.arange(start, stop, device=at.device) for start, stop in ((n, n + 1), (0, self.size), (0, k)))
        self.mask = torch.zeros(1, self.size, device=at.device, dtype=dtype).masked_fill_(self.slots >= n, -torch.inf)

    def bias(self):
        "What is added to the scores, once for all layers"
        if self.over == "source": return self.mask[:, None, None]
        return self.line[:, self.slots - (self.at + self.tokens)[:, None] + self.size - 1][None]
    def held(self, kv):
        "Keys and values, with those of the new tokens"
        return kv.index_copy_(3, self.at + self.tokens, self.new) if self.over == "itself" else kv
    def kernels(self, kv, bias):
        from bild_nb import kernels
        if self.over == "itself": kernels.attend(self.qkv, kv, self.line, self.at, self.out)
        else: kernels.look(self.asked, kv, self.mask, self.at, self.out)
        return self.out
    def operations(self, kv, bias):
        keys, values = self.held(kv)
        return self.flat((self.q @ keys.transpose(-1, -2) + bias).softmax(-1) @ values)
    def sdpa(self, kv, bias):
        from torch.nn.functional import scaled_dot_product_attention
        return self.flat(scaled_dot_product_attention(self.q, *self.held(kv), attn_mask=bias, scale=1.))
    def sdpa_cut(self, kv, bias):
        from torch.nn.functional import scaled_dot_product_attention
        return self.flat(scaled_dot_product_attention(self.q, *kv[..., :self.n, :], scale=1.))
    def flex(self, kv, bias):
        line, mask, first, middle = self.line, self.mask[0], self.at[0], self.size - 1
        def mod(score, row, head, i, j): return score + (mask[j] if self.over == "source" else line[head, j - i - first + middle])
        return self.flat(self.attention(self.q, *self.held(kv), score_mod=mod, scale=1.))
    def flat(self, y): return y[0].transpose(0, 1).reshape(self.k, -1)

    def systems(self, at):
        "What is timed, by name"
        from bild_nb import kernels
        from torch.nn.attention.flex_attention import flex_attention
        import torch
        self.attention = torch.compile(flex_attention, dynamic=False) if at.cuda else flex_attention
        found = {"PyTorch's operations": self.operations, "SDPA": self.sdpa, "FlexAttention": self.flex}
        if self.over == "source": found["SDPA, source cut to its length"] = self.sdpa_cut  # needs a graph for each length
        return {"our kernel": self.kernels} | found if at.cuda and kernels.triton else found

    def error(self, f):
        "Relative, beside float64"
        kv, bias = self.kv[0].clone(), self.bias()
        ours = f(kv, bias).double()
        keys, values = self.held(self.kv[0].clone()).double()
        want = self.flat((self.q.double() @ keys.transpose(-1, -2) + bias.double()).softmax(-1) @ values)
        return ((ours - want).norm()/want.norm()).item()

    def us(self, f, at):
        "Time of a layer, in a graph of all"
        def whole():
            bias = self.bias() if f in (self.operations, self.sdpa) else None
            for kv in self.kv: f(kv, bias)
        return each(graph(whole, at.cuda), at.pick(6, 1), at.pick(5, 1))/len(self.kv)

@step(30)
def attention(at):
    "µs of a layer's attention at T5-large's heads: our kernel, PyTorch's operations, SDPA, FlexAttention"
    import torch
    found, notes = [], []
    cases = [(over, n, k) for n in at.pick((800, 32), (20, 8)) for over in ("itself", "source") for k in (8, 1, 2, 4, 11)]
    def measure(case, only):
        made = Attends(at, *case)
        for name, f in made.systems(at).items():
            if (name == "FlexAttention") != only: continue
            try:
                with limit(left() - 1 if only else min(10, left() - 1), name), torch.no_grad():
                    row = dict(zip(("over", "tokens", "k"), case), system=name, error=made.error(f), us=made.us(f, at))
            except Exception as e: notes.append(f"{name} {case}: {type(e).__name__}: {str(e)[:200]}")
            else: found.append(row)
        at.write("attention", dict(rows=found, notes=notes))
    for case in cases: measure(case, False)
    some = [case for case in cases if case[2] in (1, 8)]
    for i, case in enumerate(some):  # each is compiled, which takes seconds
        if left() < at.pick(6, 1):
            notes.append(f"FlexAttention, left out for time: {some[i:]}")
            break
        measure(case, True)
    at.write("attention", dict(rows=found, notes=notes))
    for row in found: print(f"{row['over']:7} {row['tokens']:4} tokens, k = {row['k']:2}, {row['system']:31} {row['us']:9.2f} us, error {row['error']:.1g}")
    print("; ".join(notes))
    wrong = [row for row in found if not row["error"] < at.pick(.03, 1e-4)]
    if wrong: raise AssertionError(f"{wrong[0]['system']} is wrong: {wrong[0]}")
    if not {row["system"] for row in found} >= {"SDPA"} | ({"our kernel"} if at.cuda else {"FlexAttention"}): raise AssertionError(f"missing: {notes[:1]}")


# ---------------------------------------------------------------- 10. with what time is left

@step(600)
def train(at):
    "Ten minutes for a pair of size l on the shipped corpus; with the same --out a second call goes on"
    try:
        from bild_nb.corpus import help_de_en
        rows, valid = (help_de_en(split) for split in ("train", "validation"))
    except ImportError as e: raise RuntimeError(f"{e}: to train, give datasets and what it needs as --wheels, too") from None
    from bild_nb.train import train_pair
    if at.dry: rows, valid = rows.select(range(60)), valid.select(range(20))
    made = train_pair(rows, at.out/"train"/"pair", valid, size=at.pick("l", "xs"), epochs=at.pick(None, 1), vocab=at.pick(None, 300), max_hours=(left() - at.pick(60, 5))/3600)
    at.write("train", made)
    print("finished" if made["finished"] else f"stopped by the clock in the training of the {made['stage']} model")


def clean(at):
    "Give memory back"
    import torch
    torch._dynamo.reset()
    gc.collect()
    if at.cuda: torch.cuda.empty_cache()


# ---------------------------------------------------------------- running and watching

def write_state(file, state):
    part = file.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1))
    part.replace(file)

def last_lines(n=14):
    "The end of the traceback, without what belongs to the compiler"
    return "\n".join(traceback.format_exc().strip().splitlines()[-n:])

def work(args, names):
    "The process that runs steps; `steps.json` says where it is"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    def ring(*_): raise Alarm
    signal.signal(signal.SIGALRM, ring)
    sys.path.insert(0, str(top))
    file = args.out/"steps.json"
    def told(name, **state): write_state(file, json.loads(file.read_text()) | {name: state})
    told("start", state="running", since=time.time(), limit=120)
    import torch
    torch.set_num_threads(1)
    at = At(args.out, args.dry)
    if at.cuda: torch.zeros(1, device="cuda")
    print(f"torch, transformers and the {at.device} are there")
    told("start", state="ok", since=time.time(), limit=0)
    for name in names:
        rest = args.until - time.time()
        if rest < 1:
            told(name, state="skipped", seconds=0, why="no time is left")
            continue
        f, budget = STEPS[name]
        allowed, started, state, why = min(budget, rest), time.time(), "ok", ""
        told(name, state="running", since=started, limit=allowed)
        print(f"\n== {name}: {f.__doc__ or 'texts beside those of peers'} (at most {allowed:.0f} s)")
        try:
            with limit(allowed, name): f(at)
            synchronize()
        except (Exception, Alarm) as e:
            state, why = "failed", (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            print(last_lines())
        seconds = time.time() - started
        told(name, state=state, seconds=seconds, why=why)
        print(f"== {name}: {state}, {seconds:.1f} s")
        if state == "failed":
            try: synchronize()
            except Exception as e:
                print(f"the GPU's context is broken ({str(e).splitlines()[0]}): a fresh process goes on")
                return
        clean(at)

def pack(args):
    "All that was written, as one file"
    if not args.pack: return
    part = args.pack.with_suffix(".part")
    def small(file): return file if file.size < 50 << 20 else None  # weights of `train` stay in --out
    with tarfile.open(part, "w:gz") as t: t.add(args.out, arcname="gpu", filter=small)
    part.replace(args.pack)

def watch(args, names):
    "Run `names` in processes that may hang or die; their states"
    file, mine = args.out/"steps.json", [sys.executable, __file__, "--out", str(args.out)] + ["--dry"]*args.dry
    write_state(file, {})
    def states(): return json.loads(file.read_text())
    def end(name, why):
        s = states()
        write_state(file, s | {name: dict(state="failed", seconds=time.time() - s[name]["since"], why=why)})
        print(f"== {name}: failed, {why}")
    while todo := [n for n in names if n not in states()]:
        child = subprocess.Popen([*mine, "--steps", ",".join(todo), "--until", str(args.until), "--child"])
        killed = packed = None
        while child.poll() is None:
            time.sleep(.2)
            found = states()
            running = next((n for n, s in found.items() if s["state"] == "running"), None)
            done = [n for n, s in found.items() if s["state"] in ("ok", "failed")]
            if done != packed:
                packed = done
                pack(args)
            if running and time.time() > found[running]["since"] + found[running]["limit"] + args.grace:
                child.send_signal(signal.SIGUSR1)  # says where it hangs
                time.sleep(1)
                child.kill()
                killed = running
        running = next((n for n, s in states().items() if s["state"] == "running"), None)
        if running: end(running, "it hung and its process was killed" if killed else f"its process ended with {child.returncode}")
        if running == "start" or "start" not in states() or not [n for n in todo if n in states()]:
            for n in todo:
                if n not in states(): write_state(file, states() | {n: dict(state="failed", seconds=0, why="the process did not start")})
        write_state(file, {n: s for n, s in states().items() if n != "start"})
    pack(args)
    return states()

def table(names, states):
    "step, state, seconds, why"
    print(f"\n{'step':12}{'':10}{'seconds':>8}")
    for name in names:
        s = states[name]
        print(f"{name:12}{s['state']:10}{s['seconds']:8.1f}  {s.get('why', '')}".rstrip())

def main():
    listed = "\n".join(f"  {name:12} at most {seconds:3} s  {f.__doc__ or 'whole texts beside those of peers'}" for name, (f, seconds) in STEPS.items())
    p = argparse.ArgumentParser(prog=".ci/gpu", description="Check and measure bild_nb on a GPU.", epilog=f"steps, in this order:\n{listed}",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="gets a run folder for each step; none: they are thrown away")
    p.add_argument("--steps", default=",".join(STEPS), help="some of them, as a,b,c")
    p.add_argument("--seconds", type=float, default=470, help="for all; steps that are left then are skipped")
    p.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, no graphs")
    p.add_argument("--pack", type=Path, help="a .tgz of the run folders, written anew after each step")
    p.add_argument("--grace", type=float, default=GRACE, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, help=argparse.SUPPRESS)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    names = args.steps.split(",")
    unknown = [n for n in names if n not in STEPS]
    if unknown: p.error(f"there is no step {unknown[0]!r}: the steps are {', '.join(STEPS)}")
    if args.child: return work(args, names)
    args.until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        args.out = (args.out or Path(folder)/"gpu").resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        if args.pack: args.pack = args.pack.resolve()
        states = watch(args, names)
    table(names, states)
    return int(any(s["state"] == "failed" for s in states.values()))


if __name__ == "__main__": sys.exit(main())
