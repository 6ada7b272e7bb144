"""Turns by themselves: one thread at a time, the most pressing next, and no team of threads left behind."""

import contextlib
import os
import sys
import threading
import time

import pytest
import torch

from neuron_xtts import turns as turns_module
from neuron_xtts.backends.host.threads import end_team
from neuron_xtts.turns import AllTurns, Turns, later, now


@pytest.fixture
def turns():
    return Turns()


def waiting(turns, count):
    """Return once so many threads wait."""
    for _ in range(1000):
        if len(turns._waiting) == count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{len(turns._waiting)} wait")


def queue_up(turns, *urgencies, order):
    """Threads that wait for turns, and put down in which order they had them."""

    def work(number, urgency):
        with turns.take(urgency):
            order.append(number)

    threads = []
    for number, urgency in enumerate(urgencies):
        threads.append(threading.Thread(target=work, args=(number, urgency)))
        threads[-1].start()
        waiting(turns, number + 1)
    return threads


def test_the_most_pressing_is_next(turns):
    order = []
    with turns.take():
        threads = queue_up(turns, later, lambda: 0.7, now, later, lambda: -1.0, now, order=order)
        assert turns.wanted
    for thread in threads:
        thread.join(10)
    assert order == [4, 2, 5, 1, 0, 3]
    assert not turns.wanted
    assert not turns.mine


def test_a_turn_inside_of_a_turn(turns):
    with turns.take(), turns.take(now):
        assert turns.mine
        with pytest.raises(ZeroDivisionError), turns.take():
            raise ZeroDivisionError
        assert turns.mine
    assert not turns.mine


def test_an_offer(turns):
    """Is taken by whoever is at least as pressing, and gives the turn back."""
    order = []
    with turns.take():
        threads = queue_up(turns, lambda: 0.5, later, order=order)
        turns.offer(lambda: 0.1)
        assert order == []
        turns.offer(lambda: 0.5)
        assert order == [0]
        assert turns.mine
        turns.offer(later)
        assert order == [0, 1]
    for thread in threads:
        thread.join(10)


def test_as_urgent_as_the_thread(turns):
    order = []

    def pressing():
        with turns.pressing(now), turns.take():
            order.append("pressing")

    with turns.take():
        threads = queue_up(turns, later, order=order)
        threads.append(threading.Thread(target=pressing))
        threads[-1].start()
        waiting(turns, 2)
    for thread in threads:
        thread.join(10)
    assert order == ["pressing", 0]


class Interrupted(threading.Event):
    def wait(self, timeout=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("offered", [False, True])
def test_whoever_is_interrupted_while_it_waits(turns, monkeypatch, offered):
    """Nobody else's turn is taken from it, and none is lost."""
    order = []
    began, go_on = threading.Event(), threading.Event()

    def work():
        with turns.take():
            began.set()
            go_on.wait(10)
            order.append("worked")

    def wait_in_vain():
        if not offered:
            thread.start()
            began.wait(10)
        with monkeypatch.context() as patching, turns.take() if offered else turns.pressing(now):
            if offered:
                thread.start()
                waiting(turns, 1)
            patching.setattr(turns_module, "_Waiting", lambda urgency: real(urgency, go=Interrupted()))
            if offered:
                turns.offer(later)
            else:
                turns.take().__enter__()

    thread, real = threading.Thread(target=work), turns_module._Waiting
    with pytest.raises(KeyboardInterrupt):
        wait_in_vain()
    began.wait(10)
    assert not turns.wanted
    assert turns._owner == thread.ident
    go_on.set()
    thread.join(10)
    assert order == ["worked"]
    with turns.take():
        assert turns.mine


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
@pytest.mark.parametrize("how", ["by itself", "with a turn"])
def test_no_team_is_left(turns, how):
    """Not even that of a thread that goes on living."""
    done, leave = threading.Event(), threading.Event()
    counts = []

    def work():
        torch.set_num_threads(2)
        x = torch.randn(600, 600)
        x @ x
        torch.exp(x)
        counts.append(len(os.listdir("/proc/self/task")))
        if how == "by itself":
            end_team()
        else:
            with turns.take():
                torch.exp(x)
        for _ in range(1000):  # the kernel forgets a thread a moment after it was joined
            if len(os.listdir("/proc/self/task")) < counts[0]:
                break
            time.sleep(0.005)
        counts.append(len(os.listdir("/proc/self/task")))
        done.set()
        leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert done.wait(60)
    leave.set()
    thread.join()
    assert counts[1] == counts[0] - 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_no_team_waits(turns):
    """Whoever computed without a turn, and now waits for one, has no team that would slow down the one that has it."""
    counts = []

    def work():
        torch.set_num_threads(2)
        torch.exp(torch.randn(600, 600))
        counts.append(len(os.listdir("/proc/self/task")))
        with turns.take():
            pass

    thread = threading.Thread(target=work)
    with turns.take():
        thread.start()
        waiting(turns, 1)
        for _ in range(1000):
            if len(os.listdir("/proc/self/task")) < counts[0]:
                break
            time.sleep(0.005)
        assert len(os.listdir("/proc/self/task")) == counts[0] - 1
    thread.join(10)


class InterruptedAt:
    """Raises KeyboardInterrupt in this thread as it enters a function of turns.py for the ``number``-th time."""

    def __init__(self, number):
        self.number = number
        self.came = False

    def __enter__(self):
        sys.setprofile(self.event)
        return self

    def event(self, frame, event, argument):
        if event == "call" and frame.f_code.co_filename in (turns_module.__file__, threading.__file__):
            self.number -= 1
            if self.number == 0:
                self.came = True
                raise KeyboardInterrupt

    def __exit__(self, *error):
        sys.setprofile(None)


def test_interrupts_anywhere(turns):
    """Wherever in a turn one comes, the next thread has its turn, and this one may have another."""
    ours, theirs = threading.Event(), threading.Event()
    count = 0

    def other():
        while True:
            ours.wait()
            ours.clear()
            if count is None:
                return
            with turns.take(lambda: 1.0):
                pass
            theirs.set()

    thread = threading.Thread(target=other)
    thread.start()
    for number in range(1, 200):
        count = number
        ours.set()
        interrupt = InterruptedAt(number)
        with contextlib.suppress(KeyboardInterrupt), interrupt, turns.take(lambda: 0.5):
            turns.offer(lambda: 2.0)
        assert theirs.wait(20), f"nobody has a turn after an interrupt at call {number}"
        theirs.clear()
        assert not turns.mine
        if not interrupt.came:
            break
    assert 10 < number < 199, number
    count = None
    ours.set()
    thread.join(10)
    assert not turns.wanted


def test_all_turns():
    """Whoever has all is alone, whoever has one is not, and engines that come later wait for whoever has all."""
    both = AllTurns()
    engines = both.of(2)
    assert engines == both.of(2)
    assert both.of(1) == [both.first] == engines[:1]
    order = []

    def work(name, take):
        with take():
            order.append(name)

    threads = []
    with both.take():
        for name, take in (("second", engines[1].take), ("all", both.take), ("three", lambda: both.of(3)[2].take())):
            threads.append(threading.Thread(target=work, args=(name, take)))
            threads[-1].start()
        waiting(engines[1], 1)
        waiting(engines[0], 2)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert sorted(order) == ["all", "second", "three"]
    with engines[0].take():
        thread = threading.Thread(target=work, args=("beside", engines[1].take))
        thread.start()
        thread.join(10)
        assert order[-1] == "beside"
        thread = threading.Thread(target=work, args=("all again", both.take))
        thread.start()
        waiting(engines[0], 1)
        with both.take():  # a call of coqui-tts's own, inside of what runs on the first
            assert all(turns.mine for turns in both.each)
    thread.join(10)
    assert order[-1] == "all again"


def test_whoever_has_some_turns_gets_the_others_first():
    """However pressing those are who have them: it keeps whoever waits for its own from working."""
    both, took, done = AllTurns(), threading.Event(), threading.Event()
    engines = both.of(2)

    def work():
        with engines[1].take(now):
            took.set()
            while not done.is_set():
                engines[1].offer(now)

    def all_of_them():
        with both.take():
            done.set()

    threads = [threading.Thread(target=work), threading.Thread(target=all_of_them)]
    threads[0].start()
    took.wait(10)
    threads[1].start()
    threads[1].join(10)
    waited = not done.is_set()
    done.set()
    for thread in threads:
        thread.join(10)
    assert not waited
