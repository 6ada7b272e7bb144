"""Threads of torch on the host: as many as there are CPUs, and the user's own number before and after."""

import os

import pytest
import torch
from helpers import speak

import neuron_xtts
from neuron_xtts.backends.host.threads import usable_cpus

CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, CPUS),
        ({"cpu.max": "max 100000\n"}, CPUS),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, min(CPUS, 2)),
        ({"cpu.max": "99900000 100000\n"}, CPUS),
        ({"cpu.max": "what?\n"}, CPUS),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CPUS),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "50000\n"}, CPUS),
    ],
)
def test_quotas(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


@pytest.fixture
def threads():
    """More than there are CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(CPUS + 3)
    yield CPUS + 3
    torch.set_num_threads(before)


@pytest.fixture
def seen(xtts):
    """What the trunk's first norm runs on."""
    counts = []
    xtts.gpt.gpt.h[0].ln_1.register_forward_hook(lambda *_: counts.append(torch.get_num_threads()))
    return counts


def test_graphs_run_on_the_cpus_there_are(xtts, voice, threads, seen):
    neuron_xtts.patch(xtts, strict=True)
    speak(xtts, voice, max_new_tokens=5)
    assert set(seen) == {usable_cpus()}
    assert torch.get_num_threads() == threads


def test_fewer_threads_are_the_users_choice(xtts, voice, threads, seen):
    torch.set_num_threads(1)
    neuron_xtts.patch(xtts, strict=True)
    speak(xtts, voice, max_new_tokens=5)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 1


def test_what_falls_back_runs_as_it_always_did(xtts, voice, threads, seen):
    neuron_xtts.patch(xtts, buckets=neuron_xtts.BucketPlan.none())
    speak(xtts, voice, max_new_tokens=5)
    assert set(seen) == {threads}
    assert torch.get_num_threads() == threads


def test_between_the_chunks_of_a_stream(xtts, voice, threads, seen):
    neuron_xtts.patch(xtts, strict=True)
    for _ in xtts.inference_stream("hello", "en", *voice, stream_chunk_size=4, max_new_tokens=12):
        assert torch.get_num_threads() == threads
    assert set(seen) == {usable_cpus()}
