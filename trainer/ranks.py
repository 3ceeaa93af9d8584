"""The ranks of a trainer: processes that hold one model in shares and compute each step together.

    rank 0       everything a trainer does: feed, ledger, publications, checkpoint files, records. Before a common act it tells the others what it is
    other ranks  wait for an order, do it on their share (trainer.learner.follow), and wait for the next

    consumes     nothing                    produces     orders: MessagePack, over a group of its own without a time-out
    waits for    the slowest rank           unblocked by the end of its part; a collective of the model's maths has a time-out

Every rank must take part in every collective, in the same order. An act that fails half-way on one rank leaves the ranks out of step for good:
the group is then `broken`, and all its processes end and start again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from services.runtime.codec import decode, encode
from trainer.orders import End, Envelope, Order

log = logging.getLogger(__name__)

NEVER = timedelta(days=365)
"""Rank 0 may wait for a batch for as long as it takes. A rank that dies closes its sockets, which ends the others' wait at once."""


class Ranks:
    """One process, which is all there is: nothing is told, and what it has computed is the whole."""

    rank = 0
    world = 1
    broken = False
    restarts_left = 0
    """How often the ranks will be started again if they break now without having got any further."""

    def tell(self, order: Order) -> None:
        """Have the other ranks do this too."""

    @contextlib.contextmanager
    def together(self, order: Order) -> Iterator[None]:
        """Do what is inside on all ranks at once: rank 0 tells the others to do `order`. What is nested is a part of it and is not told."""
        yield

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, on all of them."""
        return tensor

    def close(self) -> None:
        """The other ranks end."""


ALONE = Ranks()


class RankGroup(Ranks):
    """This process as one rank of several."""

    def __init__(self, rank: int, world: int, *, timeout: float, restarts_left: int) -> None:
        """Joins the group of the environment's MASTER_ADDR and MASTER_PORT; blocks until all are there, for `timeout` seconds at most."""
        self.rank, self.world, self.restarts_left = rank, world, restarts_left
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        self.mesh: DeviceMesh = init_device_mesh(device, (world,))
        self._orders = dist.new_group(backend="gloo", timeout=NEVER)
        self._depth = 0

    def tell(self, order: Order) -> None:
        if self.rank:
            return
        payload = torch.frombuffer(bytearray(encode(Envelope(order=order))), dtype=torch.uint8)
        try:
            dist.broadcast(torch.tensor([len(payload)]), src=0, group=self._orders)
            dist.broadcast(payload, src=0, group=self._orders)
        except RuntimeError:
            self.broken = True
            raise

    def next_order(self) -> Order:
        """What rank 0 tells next. Raises RuntimeError when rank 0 is gone."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._orders)
        payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._orders)
        return decode(Envelope, payload.numpy().tobytes()).order

    @contextlib.contextmanager
    def together(self, order: Order) -> Iterator[None]:
        if not self._depth:
            self.tell(order)
        self._depth += 1
        try:
            yield
        except BaseException:  # a consumer that leaves a generator early is out of step too
            self.broken = True
            raise
        finally:
            self._depth -= 1

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        if self.broken:
            return  # a group that waits for a dead peer cannot be left in order: the process ends, and its sockets with it
        self.tell(End())
        for other in range(1, self.world):  # sockets that are closed too soon take the order with them
            dist.recv(torch.empty(1), src=other, group=self._orders)
        dist.destroy_process_group()

    def leave(self) -> None:
        """Tell rank 0 that its order to end has come."""
        dist.send(torch.zeros(1), dst=0, group=self._orders)


def join(environment: Mapping[str, str] = os.environ, *, timeout: float) -> Ranks:
    """The ranks that the environment tells of, in the names that torchrun uses too: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    world = int(environment.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if world == 1:
        return ALONE
    left = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    began = time.monotonic()
    group = RankGroup(int(environment["RANK"]), world, timeout=timeout, restarts_left=max(0, left))
    log.info("all ranks are there", extra={"rank": group.rank, "ranks": world, "seconds": round(time.monotonic() - began, 1)})
    return group
