"""The fastest choice is found from few measurements: fake times, a fake clock."""

from __future__ import annotations

import pytest

from kdctl.probe.race import BUDGET_S, Choice, Options, fastest, plainest_of_fast, race

PLAIN = Choice("fp32", "contiguous", 1)
ALL = Options(["fp32", "bf16"], ["contiguous", "channels_last"], [1, 2], [False])


class Bench:
    """A machine whose steps take known times; `own` by choice, or by its single settings, which multiply."""

    def __init__(self, seconds: float = 0.01, **factors: float) -> None:
        self.now = 0.0
        self.calls: list[Choice] = []
        self.seconds, self.factors = seconds, factors
        self.failing: list[str] = []

    def clock(self) -> float:
        return self.now

    def time_of(self, choice: Choice) -> float:
        names = [choice.precision, choice.layout, f"threads{choice.threads}", *(["compile"] if choice.compile else [])]
        seconds = self.seconds
        for name in names:
            seconds *= self.factors.get(name, 1.0)
        return seconds

    def __call__(self, choice: Choice) -> float:
        self.calls.append(choice)
        self.now += self.time_of(choice)
        if {choice.precision, choice.layout} & set(self.failing):
            raise RuntimeError(f"no {choice.precision}")
        return self.time_of(choice)


def found(bench: Bench, options: Options = ALL, samples: int = 10**6) -> Choice:
    return fastest(options, bench, bench.clock, samples)[0]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"bf16": 0.5, "channels_last": 0.8, "threads2": 0.6}, Choice("bf16", "channels_last", 2)),
        ({"bf16": 2.0, "channels_last": 0.8, "threads2": 0.6}, Choice("fp32", "channels_last", 2)),
        ({"bf16": 0.5, "channels_last": 1.5, "threads2": 1.4}, Choice("bf16", "contiguous", 1)),
        ({"bf16": 0.97, "channels_last": 0.99, "threads2": 0.99}, PLAIN),
        ({"threads2": 1.1}, PLAIN),
        ({"channels_last": 0.9}, Choice("fp32", "channels_last", 1)),
        ({"bf16": 0.9}, PLAIN),
        ({"bf16": 0.85}, Choice("bf16", "contiguous", 1)),
    ],
)
def test_the_measurement_decides(factors: dict[str, float], expected: Choice) -> None:
    assert found(Bench(**factors)) == expected


def test_the_line_names_the_choice_and_the_plain_one() -> None:
    bench = Bench(0.001, bf16=0.5)
    assert (
        fastest(ALL, bench, bench.clock, 10**6)[1]
        == "bf16, contiguous, 1 thread: 2,000 samples/s (fp32 contiguous 1,000)"
    )
    bench = Bench(0.001, threads2=0.5)
    assert fastest(ALL, bench, bench.clock, 10**6)[1] == "fp32, contiguous, 2 threads: 2,000 samples/s"


def test_noise_does_not_decide() -> None:
    other = Choice("fp32", "channels_last", 2)
    assert plainest_of_fast({other: [0.96, 2.0], PLAIN: [3.0, 1.0]}) == PLAIN
    assert plainest_of_fast({other: [0.94, 2.0], PLAIN: [3.0, 1.0]}) == other


def test_one_slow_measurement_does_not_decide() -> None:
    bench = Bench(bf16=0.8)
    first_times: list[Choice] = []

    def measure(choice: Choice) -> float:
        factor = 1.0 if choice in first_times else 1.9 if choice.precision == "bf16" else 1.0
        first_times.append(choice)
        return bench(choice) * factor

    options = Options(["fp32", "bf16"], ["contiguous"], [1], [False])
    assert fastest(options, measure, bench.clock, 10**6)[0].precision == "bf16"


def test_the_first_measurement_warms_up() -> None:
    bench = Bench(bf16=0.5)
    warm: set[Choice] = set()

    def measure(choice: Choice) -> float:
        cold = choice not in warm
        warm.add(choice)
        return bench(choice) * (10 if cold else 1)

    assert fastest(ALL, measure, bench.clock, 10**6)[0].precision == "bf16"


def test_what_falls_behind_is_measured_no_more() -> None:
    bench = Bench(bf16=0.2)
    slow, fast = PLAIN, Choice("bf16", "contiguous", 1)
    race([slow, fast], bench, bench.clock, 100.0)
    assert bench.calls == [slow, slow, fast, fast]


def test_few_threads_are_not_tried_where_half_of_many_is_slow_already() -> None:
    options = Options(["fp32"], ["contiguous"], [1, 8, 16], [False])
    bench = Bench(threads16=0.1, threads8=0.2)
    assert found(bench, options).threads == 16
    assert {choice.threads for choice in bench.calls} == {16, 8}
    bench = Bench(threads16=1.3, threads8=1.2)
    assert found(bench, options).threads == 1


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.2, 30.0])
def test_the_budget_bounds_the_measuring(seconds: float) -> None:
    bench = Bench(seconds, bf16=0.9, channels_last=0.9)
    found(bench)
    assert bench.now <= 2 * BUDGET_S + 5 * seconds


def test_a_short_training_is_measured_shortly() -> None:
    bench = Bench(0.05)
    found(bench, samples=10)
    first_round = 1 + 2 * len(ALL.threads) + 2 * ALL.count
    assert len(bench.calls) <= first_round + 1
    again = Bench(0.05)
    found(again, samples=10**6)
    assert len(again.calls) > len(bench.calls)


def test_what_fails_is_not_chosen() -> None:
    bench = Bench(bf16=0.1, channels_last=0.5)
    bench.failing = ["bf16"]
    assert found(bench) == Choice("fp32", "channels_last", 1)
    bench = Bench()
    bench.failing = ["fp32"]
    assert found(bench).precision == "bf16"
    bench.failing = ["fp32", "bf16"]
    with pytest.raises(RuntimeError, match="no bf16"):
        found(bench)


def test_compiling_is_an_option_for_the_winner_alone() -> None:
    options = Options(["fp32", "bf16"], ["contiguous"], [2], [False, True])
    bench = Bench(bf16=0.5, compile=0.8)
    assert found(bench, options) == Choice("bf16", "contiguous", 2, True)
    assert {c.precision for c in bench.calls if c.compile} == {"bf16"}
    assert not found(Bench(bf16=0.5, compile=0.97), options).compile

    def measure(choice: Choice) -> float:
        if choice.compile:
            raise RuntimeError("no compiler")
        return bench(choice)

    assert fastest(options, measure, bench.clock, 10**6)[0] == Choice("bf16", "contiguous", 2)


def test_compiling_as_the_user_set_it_is_kept_and_not_measured() -> None:
    bench = Bench(bf16=0.5)
    assert found(bench, Options(["fp32", "bf16"], ["contiguous"], [2], [True])) == Choice("bf16", "contiguous", 2, True)
    assert not any(choice.compile for choice in bench.calls)
