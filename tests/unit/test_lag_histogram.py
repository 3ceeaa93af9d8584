"""The histogram of lags: what the library's own would show, had each token been observed by itself."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.runtime.metrics import LAGS, LagHistogram


def shown(*steps: Mapping[int, int]) -> CollectorRegistry:
    registry = CollectorRegistry()
    histogram = LagHistogram(registry)
    for lags in steps:
        histogram.add("r", lags)
    return registry


def test_tokens_are_counted_up_to_each_bound() -> None:
    registry = shown({0: 5, 2: 3}, {2: 1, 7: 2, 500: 1})

    def value(suffix: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"offbeat_trainer_lag_versions_{suffix}", {"run": "r", **labels})

    below = {le: value("bucket", le=le) for le in ("0.0", "1.0", "2.0", "6.0", "8.0", "128.0", "+Inf")}
    assert below == {"0.0": 5, "1.0": 5, "2.0": 9, "6.0": 9, "8.0": 11, "128.0": 11, "+Inf": 12}
    assert (value("count"), value("sum")) == (12, 2 * 4 + 7 * 2 + 500)


@given(st.lists(st.dictionaries(st.integers(0, 200), st.integers(1, 20), min_size=1, max_size=4), max_size=4))
def test_it_is_the_library_s_own_histogram(steps: list[dict[int, int]]) -> None:
    registry = CollectorRegistry()
    library = Histogram("offbeat_trainer_lag_versions", "Lag of trained tokens", ["run"], buckets=LAGS, registry=registry)
    for lag, tokens in sum((Counter(step) for step in steps), Counter[int]()).items():
        for _ in range(tokens):
            library.labels("r").observe(lag)

    def samples(text: bytes) -> list[str]:
        return [line for line in text.decode().splitlines() if "_created" not in line]

    assert samples(generate_latest(shown(*steps))) == samples(generate_latest(registry))


def test_runs_are_kept_apart() -> None:
    registry = CollectorRegistry()
    histogram = LagHistogram(registry)
    histogram.add("a", {1: 2})
    histogram.add("b", {3: 4})
    assert [registry.get_sample_value("offbeat_trainer_lag_versions_count", {"run": run}) for run in "ab"] == [2, 4]


def test_a_step_that_ends_during_a_scrape_does_not_disturb_it() -> None:
    registry = CollectorRegistry()
    histogram, errors = LagHistogram(registry), list[BaseException]()
    stop = threading.Event()

    def scrape() -> None:
        try:
            while not stop.is_set():
                generate_latest(registry)
        except RuntimeError as error:
            errors.append(error)

    scraper = threading.Thread(target=scrape)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        scraper.start()
        for lag in range(2000):
            histogram.add(f"run{lag % 3}", {lag: 1})
    finally:
        stop.set()
        scraper.join()
        sys.setswitchinterval(interval)
    assert errors == []
