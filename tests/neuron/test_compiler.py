"""Compile jobs, with the double of torch_neuronx: faults, memory, processes side by side, and the commands."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import neuron_double
import pytest
import torch
from filelock import FileLock

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.neuron import canary as canary_module
from neuron_xtts.backends.neuron import compiler, device, jobs
from neuron_xtts.backends.neuron.canary import Trial, try_canary
from neuron_xtts.backends.neuron.compiler import CompileSummary
from neuron_xtts.backends.neuron.jobs import JobError, Jobs, MemoryLimit
from neuron_xtts.backends.neuron.store import MODEL, Store
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.graphs.catalogue import GRAPHS
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.vocoder import fill_small_kernels, fold_weight_norm
from neuron_xtts.tools.cli import main

pytest.importorskip("torch_xla")


def vocoders(*sizes):
    return dataclasses.replace(BucketPlan.none(), vocoder=sizes)


@pytest.fixture
def graphs(tts_original):
    xtts = tts_original.synthesizer.tts_model
    return make_graphs(Networks.of(xtts))[0]


def test_a_complete_store(tts, neuron, compiled, small_plan, monkeypatch):
    """Nothing is started, not even the canary; the time goes into reading the weights."""
    monkeypatch.setattr(compiler, "Jobs", None)
    monkeypatch.setattr(compiler, "try_canary", None)
    summary = neuron_xtts.compile(tts, store=compiled, buckets=small_plan)
    assert {entry.status for entry in summary.entries} == {"found"}
    assert summary.ok
    assert summary.canary is None
    read = sum(parameter.numel() for parameter in tts.synthesizer.tts_model.gpt.gpt.parameters())
    assert summary.weights.bytes_read > 4 * read
    assert f"{summary.weights.bytes_read / 1e6:.0f} MB of weights read in" in str(summary)
    assert "GB/s" in str(summary)


def test_what_is_in_the_store(compiled):
    artifacts = list(Store(compiled))
    assert len(artifacts) == 8
    for artifact in artifacts:
        artifact.check()
        manifest = artifact.manifest
        assert manifest["recipe"]["target"] == "inf2"
        assert manifest["recipe"]["versions"]["neuronx-cc"] == "2.26.6360.0"
        assert manifest["verification"]["error"] < 1e-4
        assert manifest["seconds"] > 0
        assert {path.name for path in artifact.folder.iterdir()} == {MODEL, "manifest.json", "compiler.log"}
    assert list(Store(compiled).leftovers()) == []


@pytest.mark.slow
def test_the_canary_goes_first_and_alone(tts, neuron, tmp_path, monkeypatch):
    """It runs on the device before the first job of another graph begins."""
    jobs_so_far, run = [], Jobs.run

    def noted(self, mode, graph, *args, **options):
        jobs_so_far.append(f"{mode} {graph}")
        result = run(self, mode, graph, *args, **options)
        jobs_so_far.append(f"end of {mode} {graph}")
        return result

    monkeypatch.setattr(Jobs, "run", noted)
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64), progress=False)
    assert summary.ok, summary
    assert summary.canary == Trial(compiled=True)
    assert "The canary" not in str(summary)
    order = [f"{mode} {graph}" for graph, modes in JOBS.items() for mode in modes]
    assert jobs_so_far == [line for job in order for line in (job, f"end of {job}")]
    assert [artifact.manifest["recipe"]["graph"] for artifact in Store(tmp_path)] == ["vocoder"]
    assert list(Store(tmp_path).leftovers()) == []
    # A canary that fails keeps back what is not there yet, and nothing else.
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "crash:canary")
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64, 65), progress=False)
    entries = [(entry.status, entry.reason) for entry in summary.entries]
    assert entries == [("found", None), ("failed", "not tried, because the canary failed")]
    assert "does not compile (compile: died of SIGABRT)" in summary.canary.failure.what
    assert "Fatal Python error: Aborted" in summary.canary.failure.log.read_text()


JOBS = {"canary": ("compile", "verify"), "vocoder": ("lower", "compile", "verify")}


@pytest.mark.slow
def test_a_canary_that_fails_keeps_everything_back(tts, neuron, tmp_path, monkeypatch, capsys):
    """What no check of ours knows of, such as a compiler that is broken as it is reported to be."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "islpy:canary")
    monkeypatch.setattr(compiler, "Jobs", None)  # nothing else is begun
    store = tmp_path / "store"
    assert small(["compile", "--small"], store) == 1
    text = capsys.readouterr().out
    plan = BucketPlan.static()
    rows = re.findall(r"^\w+ +[\dx]+ +failed", text, re.MULTILINE)
    assert len(rows) == sum(len(plan.buckets(graph)) for graph in GRAPHS) > 10
    said = (
        "The canary, a graph of two small layers, does not compile (compile: RuntimeError: neuronx-cc failed with 70)"
    )
    assert text.count(said) == text.count("canary, ") == text.count("No other graph was tried.") == 1
    assert "  | ERROR: [NCC_ISMP902] Simplifier error: is_subset()" in text
    assert f"torch {torch.__version__}, torch-neuronx 2.9.0.2.15.32035, neuronx-cc 2.26.6360.0, " in text
    assert f"libneuronxla 2.2.17544.0, islpy not installed, Python {platform.python_version()}" in text
    assert "remedy: pip install islpy==2026.1\n" in text
    (log,) = re.findall(r"^log: (.*)$", text, re.MULTILINE)
    assert Path(log).is_relative_to(store)
    assert "[NCC_ISMP902]" in Path(log).read_text()
    assert list(Store(store)) == list(Store(store).leftovers()) == []


@pytest.fixture
def canary(neuron, tmp_path):
    """Tries the canary."""

    def run(precision="fp32", target="inf2", **options):
        (tmp_path / "scratch").mkdir()
        found = dataclasses.replace(device.find_neuron(), target=target)
        chosen = neuron_xtts.Precision(precision, {"decode": "--nonsense"})  # which is another graph
        return try_canary(tmp_path / "scratch", Store(tmp_path), precision=chosen, neuron=found, **options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            "miscompile",
            "compiles and runs, but not as on the host (wrong results in call 1 after the first write of its state: ",
        ),
        ("oom", "compiles, but does not run (verify: RuntimeError: Failed to allocate "),
    ],
)
def test_a_canary_that_fails_on_the_device(canary, monkeypatch, fault, says):
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", f"{fault}:canary")
    trial = canary()
    assert trial.compiled
    assert says in trial.failure.what
    assert trial.failure.remedy == "please report it, with the log and what neuron-xtts doctor prints"
    assert trial.failure.log.is_file()


@pytest.mark.slow
def test_a_canary_for_other_machines(canary, monkeypatch):
    """With the compiler's arguments of decoding there; and nobody's draws change for it."""
    given, compile_artifact = [], canary_module.compile_artifact

    def noted(jobs, recipe, store):
        given.append(recipe.arguments)
        return compile_artifact(jobs, recipe, store)

    monkeypatch.setattr(canary_module, "compile_artifact", noted)
    before = torch.get_rng_state()
    trial = canary("bf16", target="trn2")
    assert trial == Trial(True, "it is compiled for trn2, and this machine is an inf2.xlarge")
    assert given == [neuron_xtts.Precision("bf16").compiler_arguments("decode", "trn2", "2.26.6360.0")]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_runtime_without_a_device(canary, tmp_path, monkeypatch):
    """The device file is there, and the runtime does not start."""
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(tmp_path / "nothing"))
    trial = canary()
    assert trial == Trial(True, "Neuron's runtime finds no device that it can use; dmesg and neuron-ls may say why")


@pytest.mark.slow
def test_cores_that_a_compiler_wants(canary, tmp_path, monkeypatch):
    """If torch_neuronx takes one to compile with, which is not documented, graphs have their own attempt."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "alone")
    monkeypatch.setenv("NEURON_DOUBLE_ALONE", str(tmp_path / "alone"))
    with (tmp_path / "alone").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        trial = canary()
    assert (trial.compiled, trial.failure) == (False, None)
    assert trial.obstacle.startswith("another process has the NeuronCores; end it")


@pytest.mark.slow
def test_a_compiler_that_hangs(canary, tmp_path, monkeypatch):
    """A store that cannot be written keeps no log, and stops nothing."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "hang:canary")
    (tmp_path / "logs").touch()
    trial = canary(timeout=2)
    assert "does not compile (compile: stopped after 2 s" in trial.failure.what
    assert trial.failure.log is None
    assert "log: " not in str(trial)


@pytest.mark.slow
def test_versions_that_go_together_are_the_remedy(canary, tmp_path, monkeypatch):
    neuron_double.install(tmp_path / "site", neuronx_cc="2.25.3371.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "fail:canary")
    assert canary().failure.remedy == device.INSTALL


@pytest.mark.slow
def test_jobs_that_fail_leave_the_others_alone(tts, neuron, tmp_path, monkeypatch, voice):
    """A crash, an error and one that the operating system kills; nothing half-made is left."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "crash:vocoder-64,fail:vocoder-65,killed:vocoder-66")
    store = tmp_path / "store"
    summary = neuron_xtts.compile(tts, store=store, buckets=vocoders(64, 65, 66, 67), jobs=2, progress=False)
    status = {entry.bucket: entry.status for entry in summary.entries}
    assert status == {(64,): "failed", (65,): "failed", (66,): "failed", (67,): "compiled"}
    assert not summary.ok
    reasons = {entry.bucket[0]: entry.reason for entry in summary.entries}
    assert reasons[64].startswith("compile: died of SIGABRT\n")
    assert reasons[65].startswith("compile: RuntimeError: neuronx-cc failed with 70\n  | ")
    assert reasons[66].startswith("compile: RuntimeError: neuronx-cc failed with -9\n")
    assert "Fatal Python error: Aborted" in summary.entries[0].log.read_text()
    for entry in summary.entries[:3]:
        assert str(entry.log) in str(summary)
    assert [artifact.manifest["recipe"]["bucket"] for artifact in Store(store)] == [[67]]
    assert list(Store(store).leftovers()) == []
    assert not list((store / "scratch").iterdir())
    # What was made serves; once the cause is gone, the rest is made.
    neuron_xtts.patch(tts, store=store, buckets=vocoders(64, 67))
    latents = torch.randn(1, 12, 64)
    with torch.no_grad():
        ours = tts.synthesizer.tts_model.hifigan_decoder(latents, g=voice[1])
    assert neuron_xtts.report(tts).missing == {"vocoder 64": "not compiled"}
    neuron_xtts.unpatch(tts)
    with torch.no_grad():
        theirs = tts.synthesizer.tts_model.hifigan_decoder(latents, g=voice[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    neuron_double.forget()  # lets go of the core, as the end of a process does
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    summary = neuron_xtts.compile(tts, store=store, buckets=vocoders(64, 67), progress=False)
    assert [entry.status for entry in summary.entries] == ["compiled", "found"]


@pytest.mark.slow
def test_a_frontend_that_dies_outside_of_the_compiler(tts, tmp_path, monkeypatch, caplog):
    """It keeps a graph from being looked at before it is compiled, not from being compiled."""
    neuron_double.install(tmp_path / "site")
    neuron_double.machine(tmp_path / "root")
    neuron_double.spoil_frontend(tmp_path / "site")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)  # which an import of the double left here
    for _ in neuron_double.on_neuron(tmp_path, monkeypatch):
        summary = neuron_xtts.compile(tts, store=tmp_path / "store", buckets=vocoders(64), progress=False)
    assert [(entry.status, entry.reason) for entry in summary.entries] == [("compiled", None)]
    assert "vocoder-64" in caplog.text
    assert "cannot be looked at before it is compiled: lower: died of SIGABRT" in caplog.text


@pytest.mark.slow
def test_jobs_that_take_each_others_cores(tts, neuron, tmp_path, monkeypatch):
    """Those that were told so are compiled once more, one after another."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "alone")
    monkeypatch.setenv("NEURON_DOUBLE_ALONE", str(tmp_path / "alone"))
    summary = neuron_xtts.compile(tts, store=tmp_path / "store", buckets=vocoders(64, 65, 66), jobs=3, progress=False)
    assert [(entry.status, entry.reason) for entry in summary.entries] == [("compiled", None)] * 3


@pytest.mark.slow
def test_a_miscompiled_graph_is_quarantined(tts, neuron, tmp_path, monkeypatch, voice):
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "miscompile:vocoder-64")
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64), progress=False)
    (entry,) = summary.entries
    assert entry.status == "quarantined"
    assert entry.reason.startswith("wrong results in call 1: error ")
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    again = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64), progress=False)
    assert again.entries[0].status == "quarantined"  # not made again: it would be the same
    assert again.canary is None
    assert "neuron-xtts graphs --prune removes it" in again.entries[0].reason
    neuron_xtts.patch(tts, store=tmp_path, buckets=vocoders(64))
    assert neuron_xtts.report(tts).missing == {"vocoder 64": entry.reason}


@pytest.mark.slow
def test_a_compiler_with_the_small_kernel_defect(tts, neuron, tmp_path, monkeypatch):
    """It computes kernel 3 with dilation 5 wrongly; the graph for it has no such convolution."""
    neuron_double.install(tmp_path / "site", neuronx_cc="2.24.8799.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    summary = neuron_xtts.compile(tts, store=tmp_path / "store", buckets=vocoders(64), progress=False)
    assert summary.ok, summary
    assert summary.entries[0].reason is None
    monkeypatch.setattr(compiler, "has_small_kernel_defect", lambda version: False)
    summary = neuron_xtts.compile(tts, store=tmp_path / "other", buckets=vocoders(64), progress=False)
    assert summary.entries[0].status == "quarantined", summary


@torch.no_grad()
def test_filled_kernels_compute_the_same(graphs):
    folded = fold_weight_norm(graphs["vocoder"])
    inputs = folded.example(40).values()
    expected = folded(*inputs)[0]
    small = [conv for conv in folded.modules() if getattr(conv, "kernel_size", (9,)) < getattr(conv, "dilation", (1,))]
    assert len(small) == 4
    fill_small_kernels(folded)
    assert not any(conv.kernel_size < conv.dilation for conv in folded.modules() if isinstance(conv, torch.nn.Conv1d))
    torch.testing.assert_close(folded(*inputs)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_graph_that_does_not_lower(tts, neuron, tmp_path, monkeypatch):
    """It is found before the compiler starts."""
    real = jobs.traceable
    put = {"vocoder": Interpolating()}
    monkeypatch.setattr(jobs, "traceable", lambda graphs, **how: put if "vocoder" in graphs else real(graphs, **how))
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64), progress=False)
    assert summary.entries[0].reason == "aten::upsample_linear1d has no lowering; frames is not connected"


class Interpolating(Graph):
    def forward(self, frames):
        return (torch.nn.functional.interpolate(frames, scale_factor=2.0, mode="linear"),)

    def example(self, size):
        return {"frames": torch.randn(1, 4, size)}


@pytest.mark.slow
def test_a_device_that_is_busy_after_compiling(tts, neuron, tmp_path, monkeypatch):
    """Verification waits for the first load. The compiler is not to blame, so that the canary keeps nothing back."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "busy")
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64), progress=False)
    assert summary.ok
    assert (summary.canary.compiled, summary.canary.failure) == (True, None)
    assert "The canary, a graph of two small layers, was compiled, but not run: another process has" in str(summary)
    assert summary.entries[0].reason.startswith("not verified yet, patch() will: verify: RuntimeError")
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    neuron_xtts.patch(tts, store=tmp_path, buckets=vocoders(64))
    (artifact,) = Store(tmp_path)
    assert artifact.manifest["verification"]["machine"] == "inf2.xlarge"


@pytest.mark.slow
def test_a_build_machine(tts, neuron_root, tmp_path, monkeypatch):
    """Compiled for a named target without a driver; the instance finds it under the same key."""
    for name in [name for name in os.environ if name.startswith("NEURON_")]:
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(neuron_root / "site")
    monkeypatch.setattr(device, "ROOT", tmp_path / "nothing")
    store = tmp_path / "store"
    summary = neuron_xtts.compile(tts, target="inf2", store=store, buckets=vocoders(64), progress=False)
    assert summary.ok, summary
    assert "was compiled, but not run: Neuron's driver is not loaded" in str(summary.canary)
    (artifact,) = Store(store)
    assert artifact.manifest["verification"] is None
    monkeypatch.setattr(device, "ROOT", neuron_root / "root")
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(neuron_root / "root"))
    neuron_xtts.patch(tts, store=store, buckets=vocoders(64))
    assert neuron_xtts.report(tts).missing == {}
    neuron_double.forget()


CONCURRENT = """
import sys
from pathlib import Path
import neuron_xtts, neuron_xtts.backends.neuron.device
neuron_xtts.backends.neuron.device.ROOT = Path(sys.argv[1])
from neuron_xtts.coqui.models import random_tts
tts = random_tts(Path(sys.argv[2]), small=True)
plan = neuron_xtts.BucketPlan(prefill=(), decode=(), slots=(), latents=(), vocoder=(64,), conditioning=())
summary = neuron_xtts.compile(tts, target="inf2", store=sys.argv[3], buckets=plan, progress=False)
print(summary.entries[0].status)
"""


@pytest.mark.slow
def test_four_processes_make_it_once(neuron_root, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT, str(tmp_path / "no-root"), str(tmp_path / f"{i}"),
             str(tmp_path / "store")],
            env=neuron_double.environment(neuron_root / "site"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    statuses = [process.communicate()[0].split()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(statuses) == ["compiled", "found", "found", "found"]
    (artifact,) = Store(tmp_path / "store")
    artifact.check()
    assert list(Store(tmp_path / "store").leftovers()) == []


def test_weights_that_are_not_exact(tts, neuron, tmp_path):
    tts.synthesizer.tts_model.gpt.half()
    with pytest.raises(
        neuron_xtts.ModelNotReadyError, match=r"weights of torch\.float16 on cpu; expected torch\.float32"
    ):
        neuron_xtts.compile(tts, store=tmp_path)
    assert not list(tmp_path.iterdir())


def workers(store):
    """Processes that work for a store."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if "neuron_xtts.backends.neuron.worker" in command and str(store) in command:
            found.append(process.name)
    return found


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_made(neuron_root, tmp_path, capsys):
    """Its worker ends with it, its lock is free, and what it left can be pruned."""
    store, site = tmp_path / "store", neuron_root / "site"
    command = [sys.executable, "-c", CONCURRENT, str(tmp_path / "no-root"), str(tmp_path / "model"), str(store)]
    environment = neuron_double.environment(site, NEURON_DOUBLE_FAULT="hang:vocoder")
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(store.glob("scratch/*/*-compile/job.json")) and workers(store))
    process.kill()
    process.wait()
    wait_for(lambda: not workers(store))
    assert list(Store(store)) == []
    assert len(list(Store(store).leftovers())) == 1
    done = subprocess.run(command, env=neuron_double.environment(site), capture_output=True, text=True)
    assert done.stdout.split()[-1] == "compiled"
    assert small(["graphs", "--prune"], store) == 0
    assert capsys.readouterr().out.count("removed") == 1
    assert list(Store(store).leftovers()) == []
    assert len(list(Store(store))) == 1


@contextlib.contextmanager
def all_locks(root):
    """Every lock of a store, held."""
    with contextlib.ExitStack() as stack:
        locks = [FileLock(path, timeout=1) for path in (root / "locks").iterdir()]
        for lock in locks:
            stack.enter_context(lock)
        yield locks


def test_timeout(graphs, tmp_path):
    with (
        Jobs(tmp_path, graphs, workers=1, timeout=0.3, fill=False) as jobs,
        pytest.raises(JobError, match=r"lower: stopped after 0 s; a longer limit: .*--timeout SECONDS"),
    ):
        jobs.run("lower", "vocoder", (64,), {})
    assert not jobs._running


def test_leaving_ends_what_runs(graphs, tmp_path):
    """As Ctrl-C does."""
    with Jobs(tmp_path, graphs, workers=1, timeout=600, fill=False) as jobs:
        future = jobs.pool.submit(jobs.run, "lower", "vocoder", (64,), {})
        while not jobs._running:
            time.sleep(0.01)
    with pytest.raises(JobError, match="killed"):
        future.result(timeout=0)


@pytest.fixture
def recipe(graphs, neuron):
    (recipe,) = compiler.make_recipes(
        graphs, vocoders(64), neuron_xtts.Precision(), device.find_neuron(), compiler.Digester()
    )
    return recipe


def test_waiting_for_another_process_can_be_ended(graphs, recipe, tmp_path):
    """By Ctrl-C, too: nobody waits for a lock that may be held for an hour."""
    store = Store(tmp_path)
    with (
        store.lock(recipe),
        store.scratch() as scratch,
        Jobs(scratch, graphs, workers=1, timeout=600, fill=False) as jobs,
    ):
        future = jobs.pool.submit(compiler._compile, jobs, recipe, store)
        time.sleep(1)
        assert not future.done()
    assert (future.result(timeout=0).status, future.result().reason) == ("failed", "stopped")


def test_a_full_disk(tts, neuron, tmp_path, monkeypatch):
    """It is the graph's failure, not that of all."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler, "_make", full)
    monkeypatch.setattr(compiler, "try_canary", lambda *_, **__: Trial(compiled=True))
    summary = neuron_xtts.compile(tts, store=tmp_path, buckets=vocoders(64, 65), progress=False)
    assert [entry.reason for entry in summary.entries] == ["[Errno 28] No space left on device"] * 2
    with all_locks(tmp_path) as locks:
        assert len(locks) == 2  # and they are free


def test_graphs_that_cannot_be_handed_over(graphs, tmp_path):
    graphs["latents"].register_forward_hook(lambda *_: None)
    jobs = Jobs(tmp_path, graphs, workers=1, timeout=1, fill=False)
    with pytest.raises(JobError, match=r"cannot be handed to another process .* remove hooks"):
        jobs.__enter__()


def test_memory_limits_what_runs_at_a_time():
    """Four jobs of 4 in 10: two at a time; one that needs more than there is runs alone."""
    limit, lock, two = MemoryLimit(10), threading.Lock(), threading.Event()
    running, seen = [], []

    def job(needed):
        with limit.taken(needed):
            with lock:
                running.append(needed)
                seen.append(tuple(running))
                if len(running) > 1:
                    two.set()
            if needed == 4:
                two.wait(60)
            time.sleep(0.05)
            with lock:
                running.remove(needed)

    threads = [threading.Thread(target=job, args=(needed,)) for needed in (4, 4, 4, 4, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(map(len, seen)) == 2
    assert all(len(alongside) == 1 for alongside in seen if 30 in alongside)


def small(command, store, *options):
    return main([*command, "--store", str(store), *options])


def test_commands(neuron, compiled, tmp_path, capsys):
    """compile, graphs, verify, prune and doctor on one store."""
    store = shutil.copytree(compiled, tmp_path / "store")
    sizes = ["prefill=64", "decode=80,128", "latents=128", "vocoder=64,96", "conditioning=259"]
    sizes = [f"--sizes={size}" for size in sizes]
    assert small(["compile", "--small"], store, *sizes) == 0
    assert capsys.readouterr().out.count("found") == 8
    assert small(["graphs"], store) == 0
    out = capsys.readouterr().out
    assert "8 artifacts" in out
    assert out.count("verified") == 8
    assert small(["doctor", "--small"], store, *sizes) == 0
    out = capsys.readouterr().out
    assert out.count("ready") == 8
    assert "inf2.xlarge" in out
    assert "no problems found" in out
    assert "Whether graphs compile and run here was not tried" in out
    assert small(["doctor", "--small"], store, "--sizes=decode=99") == 0
    assert "1x99    not compiled" in capsys.readouterr().out

    artifacts = {artifact.folder.name.rpartition("-")[0]: artifact for artifact in Store(store)}
    artifacts["vocoder-64"].model.write_bytes(b"nonsense")
    artifacts["decode-1x80"].record(quarantined="wrong results")
    assert small(["graphs", "--verify"], store) == 1
    assert "is corrupt" in capsys.readouterr().out
    assert small(["graphs", "--json"], store) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {(entry["recipe"]["graph"], entry["state"]) for entry in listed} >= {("decode", "wrong results")}
    assert small(["graphs", "--prune"], store) == 0
    assert capsys.readouterr().out.count("removed") == 2
    assert len(list(Store(store))) == 6


def test_the_command_keeps_no_weights_in_memory(tmp_path, monkeypatch):
    """While it compiles, they are in files without a name; and they are the same."""
    found = []

    def compile(model, **options):
        for parameter in model.synthesizer.tts_model.parameters():
            begin = parameter.data_ptr()
            lines = Path("/proc/self/maps").read_text().splitlines()
            ranges = [(*(int(end, 16) for end in line.split()[0].split("-")), line) for line in lines]
            (line,) = (line for low, high, line in ranges if low <= begin < high)
            found.append((parameter.detach().clone(), line))
        return CompileSummary()

    monkeypatch.setattr(neuron_xtts, "compile", compile)
    assert small(["compile", "--small"], tmp_path) == 0
    assert all(f"{tmp_path}/aside/" in line and line.endswith("(deleted)") for _, line in found)
    theirs = random_tts(tmp_path / "model", small=True).synthesizer.tts_model.parameters()
    for (ours, _), parameter in zip(found, theirs, strict=True):
        assert torch.equal(ours, parameter)


def test_prune_what_other_versions_made(neuron, compiled, tmp_path, monkeypatch, capsys):
    store = shutil.copytree(compiled, tmp_path / "store")
    assert small(["graphs", "--prune", "stale"], store) == 0
    assert len(list(Store(store))) == 8
    neuron_double.install(tmp_path / "site", neuronx_cc="2.25.3371.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert small(["graphs", "--prune"], store) == 0
    assert len(list(Store(store))) == 8
    assert small(["graphs", "--prune", "stale"], store) == 0
    assert len(list(Store(store))) == 0


def test_commands_without_neuron(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert small(["compile", "--small"], tmp_path) == 1
    assert "torch-neuronx is not installed" in capsys.readouterr().err
    for options in ([], ["--canary"]):
        assert small(["doctor", *options], tmp_path) == 0
        out = capsys.readouterr().out
        assert "nothing of Neuron is here" in out
        assert out.endswith("\n\nNothing of Neuron is here; patch() runs graphs on the host.\n")


def test_the_traps_that_doctor_names(tmp_path, monkeypatch, capsys):
    from neuron_xtts.tools import doctor

    real = doctor.installed
    installed = {"coqui-tts": "0.27.3", "transformers": "5.1.0", "six": None}
    monkeypatch.setattr(doctor, "installed", lambda package: installed.get(package, real(package)))
    neuron_double.install(tmp_path / "site", torch_neuronx="1.0", neuronx_cc="1.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert small(["doctor"], tmp_path) == 1
    out = capsys.readouterr().out
    assert "cannot import name 'isin_mps_friendly'" in out
    assert "six is not installed, which coqui-tts imports without saying so: pip install six" in out
    assert "torch-neuronx 1.0 is the empty package of that name on PyPI" in out
    assert "\n\nNot ready: coqui-tts 0.27.3 does not work with transformers 5.1.0 " in out
    neuron_double.forget()
