"""When the next step is launched, against a device that is played."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from decode_worker.engine import STEP_POLL_SECONDS
from decode_worker.pace import REMEMBERED, Pace

STEPS = 2_000


@dataclass
class Played:
    """Runs steps one after another; the host does what the decode worker's loop does."""

    step_seconds: Callable[[int], float]  # by the number of the step
    launch_seconds: Callable[[int], float]
    now: float = 100.0
    idle: list[float] = field(default_factory=list)  # of the device before each step
    closed: list[float] = field(default_factory=list)  # from a launch's beginning to that of its step

    def run(self) -> None:
        pace = Pace()
        began = self.now
        pace.begins(began, rows=64)
        for step in range(1, STEPS):
            ends = began + self.step_seconds(step - 1)
            while (spare := pace.spare(self.now)) and self.now < ends:
                self.now += min(spare, STEP_POLL_SECONDS)
            launching = self.now
            self.now += self.launch_seconds(step)
            pace.launched(late=self.now >= ends)
            pace.ended(ends - began)
            began = self.now = max(ends, self.now)
            self.idle.append(began - ends)
            self.closed.append(began - launching)
            pace.begins(began, rows=64)

    @property
    def idle_share(self) -> float:
        return sum(self.idle) / (self.now - 100.0)

    @property
    def mean_closed(self) -> float:
        return sum(self.closed) / len(self.closed)


def test_steps_are_closed_late_and_the_device_does_not_wait() -> None:
    played = Played(lambda _: 0.010, lambda _: 0.0004)
    played.run()
    assert played.idle_share < 0.001
    assert played.mean_closed < 0.0015


@pytest.mark.parametrize("launch_seconds", [0.002, 0.006])
def test_what_a_launch_takes_is_found(launch_seconds: float) -> None:
    played = Played(lambda _: 0.010, lambda _: launch_seconds)
    played.run()
    assert played.idle_share < 0.005
    assert played.mean_closed < 2 * launch_seconds


def test_a_host_that_is_slower_than_the_device_launches_at_once() -> None:
    played = Played(lambda _: 0.0005, lambda _: 0.0006)
    played.run()
    assert max(played.closed) < 0.0007


def test_a_launch_that_is_slow_now_and_then_costs_little() -> None:
    draw = random.Random(1)
    played = Played(lambda _: 0.010, lambda _: 0.005 if draw.random() < 0.02 else 0.0005)
    played.run()
    assert played.idle_share < 0.01


def test_a_step_that_ends_sooner_than_thought_costs_a_glance() -> None:
    played = Played(lambda step: 0.030 if step % 100 < 50 else 0.008, lambda _: 0.0005)
    played.run()
    assert max(played.idle) < STEP_POLL_SECONDS + 0.0006
    assert played.idle_share < 0.005


def test_steps_that_share_the_device_now_and_then_are_thought_to_be_alone() -> None:
    draw = random.Random(1)
    played = Played(lambda _: 0.016 if draw.random() < 0.5 else 0.008, lambda _: 0.0005)
    played.run()
    assert played.idle_share < 0.001


def test_where_rows_have_left_the_step_is_thought_to_be_shorter() -> None:
    pace = Pace()
    for _ in range(REMEMBERED):
        pace.begins(1.0, 64)
        pace.ended(0.016)
    pace.begins(2.0, 32)
    assert pace.spare(2.0) == pytest.approx(0.007)
    pace.begins(3.0, 128)
    assert pace.spare(3.0) == pytest.approx(0.015)
    assert pace.spare(3.5) == 0.0
