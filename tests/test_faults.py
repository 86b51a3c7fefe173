"""Runs that are interrupted, killed, starved and fed damaged or hostile files, in real processes.

The trainers are forks of this process, which has imported everything, so that dozens of them start in seconds. What is
promised stands in docs/reliability.md. The stream alone is tested in test_stream.py, plain runs in test_train.py.
"""

import ast
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    FORK,
    QUICK_VALIDATION,
    SCRIPT,
    assert_same_end,
    differences,
    ends_with,
    make_shards,
    read_checkpoint,
    read_metrics,
    renew_threads,
    run_main,
    tiny_args,
    write_shard,
)
from test_stream import PNG, Fleet, Payload, bomb, numbers, outcome
from tqdm.auto import tqdm

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
TERMINATED = 128 + signal.SIGTERM


class Trainer(FORK.Process):
    """main(arguments) in a fork of this process; hook(script, rank) may change the script there before it starts."""

    def __init__(self, script, arguments, log, hook=None, **environment):
        super().__init__()
        self.script, self.arguments, self.log = script, arguments, Path(log)
        self.hook, self.environment = hook, environment

    def run(self):
        sys.stdout = sys.stderr = open(self.log, "a", buffering=1)
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
        os.environ.update(self.environment)
        renew_threads()
        tqdm.set_lock(threading.RLock())  # its own one is shared with all forks, and a killed fork would keep it
        if self.hook:
            self.hook(self.script, int(self.environment.get("RANK", 0)))
        run_main(self.script, self.arguments)

    def text(self):
        return self.log.read_text(errors="replace")


def launch(script, arguments, ranks=1, hook=None):
    """Starts a run of one process, or of several as torchrun would; returns its Trainers."""
    output = arguments[arguments.index("--output_dir") + 1]
    environments = [{"ACCELERATE_USE_CPU": "true"}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environments = [{"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                         "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
                        for rank in range(ranks)]  # fmt: skip
    arguments = [str(argument) for argument in arguments]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    trainers = [Trainer(script, arguments, f"{output}-rank{rank}.log", hook, **environment)
                for rank, environment in enumerate(environments)]  # fmt: skip
    for trainer in trainers:
        trainer.start()
    return trainers


def finish(trainers, seconds=300):
    """Waits for the trainers and returns their exit codes; none may hang."""
    deadline = time.monotonic() + seconds
    for trainer in trainers:
        trainer.join(max(0.0, deadline - time.monotonic()))
    hanging = [trainer for trainer in trainers if trainer.is_alive()]
    for trainer in hanging:
        trainer.kill()
        trainer.join()
    assert not hanging, "hangs:\n" + "\n".join(trainer.text()[-2000:] for trainer in hanging)
    return [trainer.exitcode for trainer in trainers]


@pytest.fixture
def start(lcm):
    """start(arguments, ranks, hook): as launch; what still runs at the end of the test is killed."""
    started = []

    def run(arguments, ranks=1, hook=None):
        started.extend(found := launch(lcm, arguments, ranks, hook))
        return found

    yield run
    for trainer in started:
        trainer.kill()
        trainer.join()


def complete(trainers, seconds=300):
    """Waits for trainers that are to succeed."""
    codes = finish(trainers, seconds)
    assert codes == [0] * len(trainers), "\n".join(trainer.text()[-3000:] for trainer in trainers)
    return trainers


def before_call(script, name, number, action):
    """Runs an action before that call (1, 2, …) of one of the script's functions. For hooks."""
    plain, calls = getattr(script, name), itertools.count(1)

    @functools.wraps(plain)
    def wrapper(*args, **kwargs):
        if next(calls) == number:
            action()
        return plain(*args, **kwargs)

    setattr(script, name, wrapper)


def send_self(number):
    return functools.partial(os.kill, os.getpid(), number)


def last_error(trainer):
    """The one line that tells the user why the run ended."""
    text = trainer.text()
    assert "Traceback" not in text, text[-3000:]
    errors = re.findall(r"error: .*", text)
    assert errors, text[-3000:]
    return errors[-1]


def record_captions(folder):
    """A hook: writes the captions of every batch that the trainer takes to folder/captions-<rank>."""

    def hook(script, rank):
        plain = script.BatchReader.next_batch

        def next_batch(reader):
            batch = plain(reader)
            with open(folder / f"captions-{rank}", "a") as file:
                file.write("".join(f"{caption}\n" for caption in batch["captions"]))
            return batch

        script.BatchReader.next_batch = next_batch

    return hook


def read_captions(folder, rank=0):
    path = folder / f"captions-{rank}"
    return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------------------------------------------- exact resume


@pytest.fixture(scope="module")
def fours(tmp_path_factory):
    """Three shards of four samples."""
    return make_shards(tmp_path_factory.mktemp("fours"), [4, 4, 4])


def place(checkpoint):
    """Where a run over `fours` stopped: with some shard half read, or else with whole epochs read or not."""
    stream = json.loads((checkpoint / "state.json").read_text())["stream"]
    used = Counter()
    for worker, (item, sample, held) in enumerate(stream["cursors"]):
        used.update({position: 4 for position in range(worker, item, stream["stride"])})
        used[item] += sample
        assert not held  # all pictures have one size
    positions = {position for position, count in used.items() if count}
    if any(used[position] != 4 for position in positions):
        return "inside a shard"
    is_epoch = positions == {*range(len(positions))} and len(positions) % 3 == 0
    return "at an epoch's end" if is_epoch else "at a shard's end"


def record_weights(script, rank):
    """A hook: writes a digest of what every rank holds at the end beside the output folder."""
    plain = script.train

    def train(run):
        plain(run)
        tensors = {f"{part} {name}": value for part in ("student", "target")
                   for name, value in script.network_state(run.models, part).items()}  # fmt: skip
        torch.save({name: value.detach().clone() for name, value in tensors.items()},
                   f"{run.args.output_dir}-rank{rank}.pt")  # fmt: skip

    script.train = train


# every pair of two columns' values stands in some line; SIGTERM reaches the last rank only
@pytest.mark.parametrize(
    "workers, accumulation, ranks, validated, where",
    [
        (0, 1, 1, "before", "inside a shard"),
        (3, 2, 2, "after", "inside a shard"),
        (0, 1, 2, "after", "at a shard's end"),
        (3, 2, 1, "before", "at a shard's end"),
        (0, 2, 1, "after", "at an epoch's end"),
        (3, 1, 2, "before", "at an epoch's end"),
    ],
)
def test_interrupted_and_resumed_runs_end_bitwise_equal(
    tiny, fours, start, tmp_path, workers, accumulation, ranks, validated, where
):
    batch, step = {"inside a shard": (3, 1), "at a shard's end": (4, 1), "at an epoch's end": (4 // accumulation, 3)}[
        where
    ]
    flags = ["--dataloader_num_workers", workers, "--gradient_accumulation_steps", accumulation, "--train_batch_size",
             batch, "--max_train_steps", step + 2, "--checkpointing_steps", 100, "--lr_scheduler", "cosine",
             "--lr_warmup_steps", 1, "--random_flip", "--proportion_empty_prompts", 0.3, "--resume_from_checkpoint",
             "latest"]  # fmt: skip
    validation = ["--validation_steps", 1, *QUICK_VALIDATION]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def interrupt(script, rank):
        if rank == ranks - 1:
            before_call(script, "train_step", step, send_self(signal.SIGTERM))

    complete(start(tiny_args(tiny, fours, whole, *flags), ranks, record_weights))
    trainers = start(tiny_args(tiny, fours, parts, *flags, *validation * (validated == "before")), ranks, interrupt)
    assert finish(trainers) == [TERMINATED] * ranks, trainers[-1].text()[-2000:]
    assert "--resume_from_checkpoint latest" in trainers[0].text()
    assert [path.name for path in parts.glob("*checkpoint-*")] == [f"checkpoint-{step}"]
    assert place(parts / f"checkpoint-{step}") == where
    complete(start(tiny_args(tiny, fours, parts, *flags, *validation * (validated == "after")), ranks, record_weights))
    assert_same_end(parts, whole, step + 2)
    ends = [torch.load(f"{run}-rank{rank}.pt") for run in (whole, parts) for rank in range(ranks)]
    assert len(ends[0]) > 100 and not any(differences(ends[0], end) for end in ends[1:])


def test_two_ranks_take_other_samples_and_one_rank_goes_on_with_the_rest(tiny, fours, start, tmp_path):
    """Also: --max_train_steps ends a run on every rank after whole accumulations; a warning is given by one of them."""
    flags = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 1]
    output, hook = tmp_path / "run", record_captions(tmp_path)
    first = [*flags, "--max_train_steps", 1, "--lr_warmup_steps", 2]  # of the constant rate
    trainers = complete(start(tiny_args(tiny, fours, output, *first), 2, hook))
    assert [trainer.text().count("--lr_warmup_steps is not used") for trainer in trainers] == [1, 0]
    ranks = [read_captions(tmp_path, rank) for rank in (0, 1)]
    assert [len(captions) for captions in ranks] == [2, 2] and not {*ranks[0]} & {*ranks[1]}
    resumed = tiny_args(tiny, fours, output, *flags, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    (trainer,) = complete(start(resumed, 1, hook))
    assert "no sample is repeated or lost" in trainer.text()
    used = read_captions(tmp_path, 0) + read_captions(tmp_path, 1)
    assert Counter(used) == Counter(numbers(12))  # the epoch


def test_resume_reads_at_most_one_shard_again(lcm, shards, monkeypatch):
    opened, plain = [], lcm.read_shard
    monkeypatch.setattr(lcm, "read_shard", lambda url, *rest: opened.append(url) or plain(url, *rest))
    urls = lcm.expand_shards([shards])
    fleet, again = Fleet(lcm, urls), []
    for _ in range(9):  # inside the first epoch
        fleet.step()
        known = list(opened)
        Fleet(lcm, urls, state=fleet.state()).step()
        again.append(len({*known} & {*opened[len(known) :]}))
        opened[:] = known
    assert max(again) == 1, again


# ---------------------------------------------------------------------------------------------------------- kill -9


def newest(output):
    return max((int(path.name[11:]) for path in output.glob("checkpoint-*")), default=0)


def wait_for(is_true, trainer, seconds=200):
    deadline = time.monotonic() + seconds
    while not is_true() and trainer.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)


@pytest.mark.parametrize("workers, kills", [(0, 12), (2, 6)])
def test_kill_9_at_random_moments(tiny, shards, start, tmp_path, workers, kills):
    """A third of the kills while the run starts, a third in a step or its logs, a third while a checkpoint is written.

    Every start removes what the last one left behind and goes on; the end is that of a run that nobody killed.
    """
    rng, steps, done = random.Random(workers), 5 * kills // 2, 0
    flags = ["--max_train_steps", steps, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2,
             "--dataloader_num_workers", workers, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2,
             "--resume_from_checkpoint", "latest"]  # fmt: skip
    whole, output = tmp_path / "whole", tmp_path / "run"
    complete(start(tiny_args(tiny, shards, whole, *flags)))
    for number in range(kills):
        (trainer,) = start(tiny_args(tiny, shards, output, *flags))
        moment, goal = ("start", "step", "save")[number % 3], newest(output) + rng.randint(1, 2)
        if moment == "start":
            time.sleep(rng.uniform(0, 1.5))
        elif moment == "step":
            wait_for((output / f"checkpoint-{goal}").exists, trainer)
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for((output / f"tmp-checkpoint-{goal}").exists, trainer)
            time.sleep(rng.uniform(0, 0.015))
        trainer.kill()
        trainer.join()
        if trainer.exitcode == 0:  # a machine so fast, or this process so slow, that the run came to its end
            break
        assert trainer.exitcode == -signal.SIGKILL, trainer.text()[-3000:]
        done += 1
    (trainer,) = complete(start(tiny_args(tiny, shards, output, *flags)))
    assert_same_end(output, whole, steps)
    assert {path.name for path in output.glob("*checkpoint-*")} == {f"checkpoint-{steps - 1}", f"checkpoint-{steps}"}
    assert "damaged" not in trainer.text()
    assert done >= 3  # of each kind, however slow this process is beside the trainer's


@pytest.fixture(scope="module")
def straight(lcm, tiny, shards, tmp_path_factory):
    """straight[ranks]: the output of an undisturbed run of four steps, with checkpoints 2 and 4."""
    folder, found = tmp_path_factory.mktemp("straight"), {}
    for ranks in (1, 2):
        found[ranks] = folder / f"run-{ranks}"
        complete(launch(lcm, tiny_args(tiny, shards, found[ranks], "--checkpointing_steps", 2), ranks))
    return found


@pytest.fixture
def resume(tiny, shards, start, tmp_path):
    """resume(ranks, hook): goes on with tmp_path/run as `straight` was made; returns the trainers."""

    def run(ranks=1, hook=None, checkpoint="latest"):
        flags = ["--checkpointing_steps", 2, "--resume_from_checkpoint", checkpoint]
        return start(tiny_args(tiny, shards, tmp_path / "run", *flags), ranks, hook)

    return run


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_rank_ends_the_other(straight, resume, tmp_path, victim):
    def kill(script, rank):
        if rank == victim:
            before_call(script, "train_step", 4, send_self(signal.SIGKILL))

    codes = finish(resume(2, kill))
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    if victim == 1:
        complete(resume(2))
        assert_same_end(tmp_path / "run", straight[2])


# ----------------------------------------------------------------------------------- checkpoints that cannot be used


def cut(name, share=0.5):
    def damage(folder):
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return damage


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "student cut": cut("student.safetensors"),
    "student cut in its header": cut("student.safetensors", 0.0001),
    "target gone": remove("target.safetensors"),
    "optimizer cut": cut("optimizer.pt"),
    "optimizer empty": cut("optimizer.pt", 0),
    "optimizer gone": remove("optimizer.pt"),
    "state gone": remove("state.json"),
    "state cut": cut("state.json"),
    "state empty": cut("state.json", 0),
    "state without entries": replace("state.json", "{}"),
    "state of another kind": replace("state.json", "[1, 2]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_checkpoint(lcm, straight, tmp_path, caplog, kind):
    output = shutil.copytree(straight[1], tmp_path / "run")
    DAMAGE[kind](output / "checkpoint-4")

    def find(checkpoint):
        return lcm.find_checkpoint(lcm.parse_args(tiny_args("a", "b", output, "--resume_from_checkpoint", checkpoint)))

    with ends_with("checkpoint-4"):
        find("checkpoint-4")
    with caplog.at_level("WARNING"):
        assert find("latest")["path"] == output / "checkpoint-2"
    assert "checkpoint-4 is damaged or not there" in caplog.text


def test_damaged_newest_checkpoint_of_two_ranks(straight, resume, tmp_path):
    output = shutil.copytree(straight[2], tmp_path / "run")
    cut("optimizer.pt")(output / "checkpoint-4")
    trainers = complete(resume(2))
    assert "checkpoint-4" in trainers[0].text()
    assert_same_end(output, straight[2])


def test_run_does_not_start_afresh_when_every_checkpoint_is_damaged(lcm, tiny, shards, straight, tmp_path):
    output = shutil.copytree(straight[1], tmp_path / "run")
    for name in ("checkpoint-2", "checkpoint-4"):
        cut("student.safetensors")(output / name)
    with ends_with("checkpoint-[24]"):
        run_main(lcm, tiny_args(tiny, shards, output, "--resume_from_checkpoint", "latest"))
    assert len(read_metrics(output)) == 4


@pytest.mark.parametrize("ranks, share", [(1, 0.5), (1, 1.5), (2, 1.5)])
def test_disk_that_fills_up_in_the_middle_of_a_file(straight, resume, tmp_path, ranks, share):
    """The limit on a file's size stands in for the disk's: safetensors, torch.save and Python each fail their own way.

    1.5 sizes of the student: the two networks fit, the optimizer's two moments do not.
    """
    size = int((straight[1] / "checkpoint-4" / "student.safetensors").stat().st_size * share)
    output = tmp_path / "run"

    def limit(script, _rank):
        before_call(script, "save_checkpoint", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    trainers = resume(ranks, limit)
    assert 0 not in finish(trainers)
    assert not (output / "checkpoint-4").exists() and (output / "checkpoint-2").exists()
    assert not differences(*(read_checkpoint(run / "checkpoint-2") for run in (output, straight[ranks])))
    message = last_error(trainers[0])
    assert "checkpoint-4" in message and "--resume_from_checkpoint" in message
    complete(resume(ranks))
    assert_same_end(output, straight[ranks])
    assert not list(output.glob("tmp-*"))


@pytest.mark.parametrize("name", ["optimizer.pt", "student.safetensors", "state.json"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_hostile_checkpoint_is_refused_and_runs_nothing(lcm, tiny, shards, straight, tmp_path, name, is_zip):
    output, mark = shutil.copytree(straight[1], tmp_path / "run"), tmp_path / "mark"
    bait = tmp_path / "bait"
    torch.save({"state": {}, "param_groups": [Payload(mark)]}, bait, _use_new_zipfile_serialization=is_zip)
    torch.load(bait, weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    bait.rename(output / "checkpoint-4" / name)
    with pytest.raises(SystemExit, match="^error: .*checkpoint-4") as end:
        run_main(lcm, tiny_args(tiny, shards, output, "--resume_from_checkpoint", "checkpoint-4"))
    assert "\n" not in end.value.code and not mark.exists()


def test_script_holds_nothing_that_runs_what_it_reads():
    tree = ast.parse(SCRIPT.read_text())
    nodes = list(ast.walk(tree))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names} | {node.module.split(".")[0] for node in nodes
                                            if isinstance(node, ast.ImportFrom)}  # fmt: skip
    assert {"json", "torch", "PIL"} <= imported
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "yaml"}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    names = Counter(ast.unparse(call.func) for call in calls)
    assert names["torch.load"] and names["torch.save"]
    assert not names.keys() & {"eval", "exec", "compile", "np.load", "numpy.load", "torch.jit.load", "os.system"}
    for call in calls:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert ast.unparse(call.func) != "torch.load" or keywords.get("weights_only") == "True"
        assert (
            keywords.get("allow_pickle", "False") == "False" and keywords.get("trust_remote_code", "False") == "False"
        )


# ------------------------------------------------------------------------------------------- shards, pipes, workers


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("more", [0, 300, 512, 2048, 2048 + 300, 3072])
def test_a_local_shard_cut_between_or_inside_its_members(lcm, tmp_path, samples, more):
    """At a member's end, and inside a header, tarfile takes the end of the file for that of the archive."""
    make_shards(tmp_path, [5])
    shard = tmp_path / "00000.tar"
    os.truncate(shard, 4096 * samples + more)
    captions, reasons = outcome(lcm, shard)
    assert reasons == {"unreadable shard": 1}
    # a sample is known to be whole when a member of the next one has been read, which is an image of 2,048 bytes
    assert captions in ([numbers(samples)] if more >= 2048 else [numbers(samples), numbers(samples - 1)])


def test_a_shard_cut_at_a_member_is_counted_in_the_metrics(tiny, start, tmp_path):
    shards = make_shards(tmp_path / "shards", [4, 4])
    os.truncate(tmp_path / "shards" / "00001.tar", 4096 * 3)
    (trainer,) = complete(start(tiny_args(tiny, shards, tmp_path / "run", "--train_batch_size", 6,
                                          "--max_train_steps", 3), hook=record_captions(tmp_path)))  # fmt: skip
    counts = [line["skipped"].get("unreadable shard", 0) for line in read_metrics(tmp_path / "run")]
    assert 2 <= counts[-1] <= 3 and trainer.text().count("unreadable shard") == 1
    assert {*numbers(6)} <= {*read_captions(tmp_path)} <= {*numbers(7)}


def test_samples_split_over_shards_are_two_bad_ones(lcm, tmp_path):
    first = [("0.png", PNG), ("0.txt", b"0"), ("1.png", PNG)]
    second = [("1.txt", b"1"), ("2.png", PNG), ("2.txt", b"2")]
    assert outcome(lcm, write_shard(tmp_path / "0.tar", first)) == (["0"], {"no caption": 1})
    assert outcome(lcm, write_shard(tmp_path / "1.tar", second)) == (["2"], {"no image": 1})


def test_keys_that_come_again(lcm, tmp_path):
    sample = [("0.png", PNG), ("0.txt", b"a")]
    twice = write_shard(tmp_path / "0.tar", sample * 2)
    assert outcome(lcm, twice) == (["a"], {"duplicate member": 2})
    apart = write_shard(tmp_path / "1.tar", [*sample, ("1.png", PNG), ("1.txt", b"b"), *sample])
    assert outcome(lcm, apart) == (["a", "b", "a"], {})  # two samples, as webdataset has it


BAD = {
    "no image": [[("txt", b"?")]],
    "no caption": [[("png", PNG)]],
    "broken image": [[("jpg", PNG[:60]), ("txt", b"?")], [("png", b""), ("txt", b"?")], [("webp", b"?"), ("txt", b"")]],
    "image too large": [[("png", bomb(9000, 9000)), ("txt", b"?")]],
    "other resolution": [[("png", PNG), ("txt", b"?"), ("json", b'{"crop": [0, 0, 99, 99]}')]],
    "duplicate member": [],  # a second caption of a good sample
    "unreadable shard": [],  # a shard that is no tar
    "below min_image_size": [[("png", PNG), ("txt", b"?"), ("json", b'{"width": 9, "height": 90}')]],
    "above max_pwatermark": [[("png", PNG), ("txt", b"?"), ("json", b'{"pwatermark": 0.9}')]],
}
GOOD = [[("png", PNG), ("txt", b"caf\xe9")], [("png", PNG), ("txt", b"")],
        [("png", PNG), ("txt", b"a"), ("json", b"{")],
        [("png", PNG), ("txt", b"b"), ("npy", b"?"), ("txt", b"twice")]]  # fmt: skip


def test_every_kind_of_bad_sample_in_the_metrics_of_a_resumed_run(lcm, tiny, start, tmp_path):
    others = {"broken encoding", "other encoding", "no time_ids"}  # for which see test_data.py
    assert {*lcm.FAULTS, *lcm.FILTERS} == {*BAD, *others}
    samples = [*GOOD, *(sample for kind in BAD.values() for sample in kind)]
    members = [(f"{key}.{name}", data) for key, sample in enumerate(samples) for name, data in sample]
    shards = [write_shard(tmp_path / "0.tar", members), str(tmp_path / "1.tar")]
    Path(shards[1]).write_bytes(b"<html>404</html>" * 100)
    flags = ["--train_batch_size", 4, "--min_image_size", 10, "--dataloader_num_workers", 1, "--checkpointing_steps", 1,
             "--resume_from_checkpoint", "latest"]  # fmt: skip
    runs = {}
    for name, ends in {"whole": [4], "parts": [2, 4]}.items():
        for end in ends:
            arguments = tiny_args(tiny, shards[0], tmp_path / name, *flags, "--max_train_steps", end)
            arguments.insert(arguments.index(shards[0]) + 1, shards[1])
            (trainer,) = complete(start(arguments, hook=record_captions(tmp_path)))
        named = [trainer.text().count(f"({reason};") for reason in BAD]  # once in the log, after each start
        assert 1 <= min(named) <= max(named) <= len(ends)
        runs[name] = [line["skipped"] for line in read_metrics(tmp_path / name)]
    assert runs["whole"] == runs["parts"]  # line by line
    for reason, kind in BAD.items():
        count = len(kind) or 1
        assert 3 * count <= runs["whole"][-1][reason] <= 4 * count, reason
    assert Counter(read_captions(tmp_path)) == {"caf�": 8, "": 8, "a": 8, "b": 8}


def processes_with(text):
    """Command lines of the living processes that name something."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_stalled_pipe_is_given_up_and_leaves_no_process_behind(tiny, start, tmp_path):
    make_shards(tmp_path, [4, 4])
    nap = f"1000.{os.getpid()}"  # seconds, and a name to find it by
    stalled = f"pipe:cat {tmp_path / '00000.tar'}; sleep {nap}"
    flags = ["--max_train_steps", 5, "--shard_timeout", 0.5, "--shuffle_buffer_size", 2]
    arguments = tiny_args(tiny, stalled, tmp_path / "run", *flags)
    arguments.insert(arguments.index(stalled) + 1, str(tmp_path / "00001.tar"))
    begin, most = time.monotonic(), 0
    trainers = start(arguments, hook=record_captions(tmp_path))
    while trainers[0].is_alive() and time.monotonic() < begin + 200:
        most = max(most, len(processes_with(f"sleep {nap}")))
        time.sleep(0.05)
    complete(trainers)
    assert {*read_captions(tmp_path)} == {*numbers(8)}
    assert 1 <= read_metrics(tmp_path / "run")[-1]["skipped"]["unreadable shard"] <= 2
    assert most and "no data for 0.5 s" in trainers[0].text()
    assert not processes_with(f"sleep {nap}")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_pipe_that_is_closed_while_its_shell_starts_a_command_leaves_no_process_behind(lcm, tmp_path):
    make_shards(tmp_path, [4])
    nap = f"1001.{os.getpid()}"
    for _ in range(40):  # most of them hit the moment
        samples = lcm.read_shard(f"pipe:cat {tmp_path / '00000.tar'}; sleep {nap}", 5, tries=1)
        assert next(samples)["txt"] == b"0"
        samples.close()
    time.sleep(0.2)
    assert not processes_with(f"sleep {nap}")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_loader_workers_that_wait_for_a_pipe_take_it_with_them(tiny, start, tmp_path):
    make_shards(tmp_path, [8])
    nap = f"1002.{os.getpid()}"
    flags = ["--max_train_steps", 2, "--dataloader_num_workers", 1, "--shuffle_buffer_size", 1]
    shard = f"pipe:cat {tmp_path / '00000.tar'}; sleep {nap}"
    (trainer,) = start(tiny_args(tiny, shard, tmp_path / "run", *flags))
    wait_for(lambda: processes_with(f"sleep {nap}"), trainer)
    complete([trainer])
    assert not processes_with(f"sleep {nap}")


def test_a_dead_loader_worker_ends_the_run_with_one_line(tiny, shards, start, tmp_path):
    def kill(script, rank):
        def action():
            os.kill(min(multiprocessing.active_children(), key=lambda child: child.pid).pid, signal.SIGKILL)

        if rank == 1:
            before_call(script, "train_step", 3, action)

    flags = ["--max_train_steps", 100_000, "--dataloader_num_workers", 2, "--checkpointing_steps", 1]
    trainers = start(tiny_args(tiny, shards, tmp_path / "run", *flags), 2, kill)
    codes = finish(trainers)
    assert codes[-1] == 1 and 0 not in codes
    assert re.search("loader worker .*died.*--resume_from_checkpoint latest", last_error(trainers[-1]))
    assert 2 <= newest(tmp_path / "run") < 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_leaves_time_for_a_slow_checkpoint(tiny, shards, start, tmp_path, number):
    """Batch systems and Ctrl-C signal the loader's workers too. Their patience is counted in twentieths of a second."""

    def hook(script, _rank):
        signal.alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 20)
        before_call(script, "save_checkpoint", 1, lambda: time.sleep(2))  # 40 seconds

    flags = ["--max_train_steps", 100_000, "--dataloader_num_workers", 2]
    (trainer,) = start(tiny_args(tiny, shards, tmp_path / "run", *flags), hook=hook)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, trainer)
    for process in (*psutil.Process(trainer.pid).children(recursive=True), trainer):
        os.kill(process.pid, number)
    assert finish([trainer]) == [128 + number], trainer.text()[-3000:]
    assert newest(tmp_path / "run") == len(read_metrics(tmp_path / "run"))


# -------------------------------------------------------------------------------------------------- two processes


def test_one_rank_that_runs_dry_ends_the_run_on_all(tiny, start, tmp_path):
    """The second rank finds its shard good once, and afterwards without an image."""
    make_shards(tmp_path, [4])
    bad, mark = write_shard(tmp_path / "bad.tar", [("0.txt", b"a")]), tmp_path / "mark"
    is_dry = f'[ "$RANK" = 1 ] && ! mkdir {mark} 2> {tmp_path / "noise"}'
    pipe = f"pipe:if {is_dry}; then cat {bad}; else cat {tmp_path / '00000.tar'}; fi"
    output = tmp_path / "run"
    flags = ["--max_train_steps", 100_000, "--checkpointing_steps", 1, "--shuffle_buffer_size", 4]
    trainers = start(tiny_args(tiny, pipe, output, *flags), 2)
    codes = finish(trainers)
    assert codes[1] == 1 and codes[0] not in (0, None)
    assert re.search("no usable sample.*no image", last_error(trainers[1]))
    assert [path.name for path in sorted(output.glob("*checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    assert [line["step"] for line in read_metrics(output)] == [1, 2]
