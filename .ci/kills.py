"""Every long command, killed at ten random moments and given again, ends as the unbroken one.

`python .ci/kills.py [COMMAND...]`: all of train, calibrate, align, eval, tune without a word; about half an hour.
"""
import json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from datasets import Dataset
from pyarrow import parquet
from bild_nb.corpus import help_de_en

KILLS, top = 10, Path(tempfile.mkdtemp())
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(*words):
    "The command in a process group of its own, its progress in a file."
    with open(top/"log.txt", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "bild_nb.cli", *map(str, words), "--threads", "1"],
                                stdout=log, stderr=log, env=ENV, start_new_session=True)


def end(*words):
    "Run to the end; the exit status."
    return start(*words).wait()


def broken(seconds, out, *words):
    "Kill once at a random moment of the time that an unbroken run takes, then run to the end; whether it was killed, and the end."
    job, late = start(*words, "--out", out), time.monotonic() + random.uniform(.3, .9)*seconds
    while job.poll() is None and time.monotonic() < late: time.sleep(.02)
    killed = job.poll() is None
    if killed: os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    return killed, end(*words, "--out", out)


def timeless(found):
    "What a run wrote, without what depends on the clock."
    clock = "ms", "seconds", "pass_times", "speed", "speedup", "predicted", "time", "stats_time"
    if isinstance(found, dict): return {k: timeless(v) for k, v in found.items() if k not in clock}
    return [timeless(v) for v in found] if isinstance(found, list) else found


def lines(file):
    "The records of a run, in any order."
    return sorted(json.dumps(timeless({k: v for k, v in json.loads(line).items() if k != "sum"}), sort_keys=True)
                  for line in file.read_text(encoding="utf-8").splitlines())


def weights(*files): return lambda out: [(out/f).read_bytes() for f in files]
def table(out): return parquet.read_table(out/"data/train-00000-of-00001.parquet").to_pylist()
def records(out): return lines(out/"records.jsonl")


def tuned(out):
    "Trials, without the speeds that they were chosen by, and all generated texts."
    trials = json.loads((out/"tune.json").read_text(encoding="utf-8"))["trials"]
    return [(t["policy"], t["examples"], t["drop"], t["chosen"]) for t in trials], records(out)


def check(name, words, result, code=0, before=lambda out: None):
    "One command: unbroken, and ten times broken."
    one, began, killed, wrong = top/f"{name}-unbroken", time.monotonic(), 0, 0
    status = end(*words, "--out", one)
    seconds = time.monotonic() - began
    for n in range(KILLS):
        other = top/f"{name}-{n}"
        before(other)
        hit, again = broken(seconds, other, *words)
        killed += hit
        wrong += not (status == again or {status, again} <= {0, code}) or result(one) != result(other)
        if not wrong: shutil.rmtree(other)
    print(f"{'FAILED ' if wrong else 'ok     '} {name}: {seconds:.0f} s unbroken, killed {killed} of {KILLS} times, {wrong} ended otherwise", flush=True)
    if wrong: print("\n".join((top/"log.txt").read_text(errors="replace").splitlines()[-15:]))
    return not wrong


def same_times(out):
    "A tuning goes by pass times that it measures once; all shall have the same."
    out.mkdir()
    shutil.copy(top/"tune-unbroken/run.json", out/"run.json")


def main(asked):
    rows = help_de_en("train").select(range(400))
    Dataset.from_dict({k: rows[k] for k in ("source", "target")}).to_parquet(top/"pairs.parquet")
    data, train = top/"pairs.parquet", ("train", top/"pairs.parquet", "--size", "xs", "--vocab", 400, "--epochs", 3)
    models = top/"train-unbroken"
    calibrate = "calibrate", "text", "--data", data, "--large", models/"large", "--max-new-tokens", 24, "--max-tokens", 512
    if not {"train"} & set(asked): end(*train, "--out", models)
    if "align" in asked and "calibrate" not in asked: end(*calibrate, "--out", top/"calibrate-unbroken")
    align = ("align", "--calibration", top/"calibrate-unbroken", "--small", models/"small", "--large", models/"large",
             "--epochs", 3, "--examples", 40, "--objective", "tv", "--finalists", 2)
    shipped = "--data", top/"pairs.parquet", "--large", "shipped", "--small", "shipped/aligned"
    commands = dict(
        train=(train, weights("large/model.safetensors", "small/model.safetensors", "small/tokenizer.json")),
        calibrate=(calibrate, table),
        align=(align, weights("model.safetensors")),
        eval=(("eval", "text", *shipped, "--limit", 60, "--no-timing"), records),
        tune=(("tune", "text", *shipped, "--limit", 30, "--held-out", 30, "--max-drop", 1, "--repeats", 1, "--no-save"), tuned, 1, same_times))
    return all([check(name, *commands[name]) for name in commands if name in asked])


if __name__ == "__main__":
    ok = main(sys.argv[1:] or ["train", "calibrate", "align", "eval", "tune"])
    if ok: shutil.rmtree(top)
    sys.exit(not ok)
