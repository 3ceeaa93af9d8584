"""Who has waited longest is next."""

from __future__ import annotations

import threading
import time

from reward_server.turns import Turns


def test_the_thing_that_was_given_back_last_is_taken_first() -> None:
    turns = Turns(["a", "b"])
    first, second = turns.take(), turns.take()
    turns.give(first)
    turns.give(second)
    assert turns.take() == second


def test_those_who_wait_are_served_in_the_order_in_which_they_came() -> None:
    turns = Turns(["only"])
    turns.take()
    served: list[int] = []

    def wait(number: int) -> None:
        turns.take()
        served.append(number)
        turns.give("only")

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=wait, args=(number,), daemon=True))
        threads[-1].start()
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.give("only")
    for thread in threads:
        thread.join(10)
    assert served == list(range(8))


def test_who_has_just_given_back_does_not_go_before_those_who_wait() -> None:
    turns = Turns(["only"])
    turns.take()
    got = threading.Event()
    waiter = threading.Thread(target=lambda: (turns.take(), got.set()), daemon=True)
    waiter.start()
    while not turns._waiting:
        time.sleep(0.001)
    turns.give("only")
    greedy = threading.Thread(target=turns.take, daemon=True)
    greedy.start()
    assert got.wait(10)
    greedy.join(0.05)
    assert greedy.is_alive(), "it is the other's now"
    turns.give("only")
    greedy.join(10)
    assert not greedy.is_alive()
