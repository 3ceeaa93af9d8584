"""`python -m trainer.launch`: one trainer as several ranks on a Ray cluster, and rollout servers beside it where the fleet lives there.

    launcher --> place of rank 0 (GPU) --> python -m trainer             all ranks in one placement group
             --> place of rank 1 (GPU) --> python -m trainer                  |
             --> place of a server (GPU) --> python -m rollout_server    another placement group

A place is a Ray actor: a share of some machine, with one process in it that knows nothing of Ray. Ray finds machines, and notices when one is gone.

    consumes     the ends of those processes
    produces     the processes, and an event in the run whenever its ranks are started again
    waits for    a process that ends
    unblocked by Ray

A rank that ends by itself takes the others with it: all are killed and started again together, and rank 0 goes on from the last checkpoint. Rollout
servers are started again one by one. Without Ray, `python -m trainer` is the same trainer with one rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.contracts.messages import Role, Severity
from services.contracts.states import Action, IllegalMove
from services.runtime import logs
from services.runtime.bus import Bus, StoreAway
from services.runtime.fleet import Fleet
from services.runtime.ledger import Ledger, NotOurs
from services.runtime.lifecycle import RunLifecycle, UnknownRun
from services.runtime.process import Shutdown
from services.runtime.settings import EVERYWHERE, Settings

log = logging.getLogger("trainer.launch")

LEASH = ("setpriv", "--pdeathsig", "KILL", "--")
"""A process dies with its place, however that dies."""
PASSED_ON = ("OFFBEAT_", "OMP_NUM_THREADS", "PYTHONPATH", "HF_", "NCCL_", "GLOO_", "TORCH_", "VLLM_")
"""Variables of the launcher's environment that its processes get, by how their names begin. Files that they name must be there on every machine."""
PLACE_SECONDS = 300.0
"""How long machines may take to be there: a cluster that grows starts one for what is asked."""
LOOK_SECONDS = 0.5
GRACE_SECONDS = 60.0
"""For a trainer that is asked to end: it may have a checkpoint to write."""
LONGEST_PAUSE = 30.0
"""Before a rollout server is started again, in seconds; the first one is 1 s."""
OBJECT_STORE_BYTES = 80 << 20
"""Near the least that Ray allows: nothing of ours lies in it."""


class NoPlace(RuntimeError):
    """There is no cluster, or no room on it; the text says what to do."""


class Place:
    """A share of a machine, and the process in it. Runs inside Ray, with a thread for `run` and one for what comes meanwhile."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def host(self) -> str:
        """Address of this machine, as Ray knows it."""
        import ray

        return str(ray.util.get_node_ip_address())

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def run(self, module: str, environment: dict[str, str], everywhere: bool) -> int:
        """The exit status of `python -m module`; the negative number of a signal. A process that listens `everywhere` tells the others this machine's
        address, whichever it is."""
        reached = {"OFFBEAT_ADVERTISE": self.host()} if everywhere else {}
        self._process = subprocess.Popen([*LEASH, sys.executable, "-m", module], env=os.environ | environment | reached)
        if self._stopped:
            self._process.terminate()
        return self._process.wait()

    def stop(self) -> None:
        """Ask it to end, now or as soon as it has begun."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()


@dataclass
class Server:
    """A rollout server that is to run for as long as the trainer."""

    index: int
    place: Any = None
    failures: int = 0
    due_at: float = 0.0
    """When it is to be started; by the monotonic clock."""
    began_at: float = 0.0


@dataclass
class Launcher:
    """Ranks and rollout servers of one trainer on a cluster that is connected to."""

    settings: Settings
    shutdown: Shutdown
    ranks: int
    servers: int
    restarts: int
    failures: int = 0
    """Of the ranks, in a row: without the run having got any further between them."""
    _places: list[Any] = field(default_factory=list)
    _ranks: dict[Any, int] = field(default_factory=dict)
    """Rank by the promise of its end."""
    _servers: dict[Any, Server] = field(default_factory=dict)
    _waiting: list[Server] = field(default_factory=list)
    _standing: tuple[str, int | None] | None = None
    """The run and its version when they were last seen."""
    _failed_at: tuple[str, int | None] | None = None

    def __post_init__(self) -> None:
        import ray

        self.ray = ray
        self.bus = Bus(self.settings.redis_url, patience=1.0)
        self.gpus = gpus_of_place(self.settings, ray.cluster_resources())
        self._rank_group = self._reserve("ranks", self.ranks)
        self._server_group = self._reserve("rollout servers", self.servers) if self.servers else None
        self._waiting = [Server(index) for index in range(self.servers)]

    def run(self) -> int:
        """Until the trainer ends, or is asked to: the exit status."""
        self._start_ranks()
        stop_by: float | None = None
        while self._ranks:
            if not self.shutdown.asked:
                self._start_servers()
            done, _ = self.ray.wait([*self._ranks, *self._servers], num_returns=1, timeout=LOOK_SECONDS)
            self._look()
            ended = {self._ranks[promise]: self._outcome(promise) for promise in done if promise in self._ranks}
            self._servers_ended([promise for promise in done if promise in self._servers])
            self._ranks = {promise: rank for promise, rank in self._ranks.items() if promise not in done}
            if self.shutdown.asked and stop_by is None:
                log.info("the trainer is asked to end")
                self._places[0].stop.remote()
                stop_by = time.monotonic() + self.settings.rank_grace
            if ended.get(0) == "":
                stop_by = stop_by or time.monotonic() + GRACE_SECONDS
            if stop_by is not None and time.monotonic() > stop_by:
                log.error("the ranks do not end: they are killed", extra={"ranks": sorted(self._ranks.values())})
                return 1
            if broken := {rank: why for rank, why in ended.items() if why}:
                if stop_by is not None:
                    return 1
                if not self._again(broken):
                    return 1
        return 0

    def close(self) -> None:
        """End what still runs."""
        for server in self._servers.values():
            server.place.stop.remote()
        if self._servers:
            self.ray.wait([*self._servers], num_returns=len(self._servers), timeout=GRACE_SECONDS)
        for place in [*self._places, *(server.place for server in self._servers.values())]:
            self.ray.kill(place)
        self.bus.close()

    # -- ranks ------------------------------------------------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        self._places = [self._place(self._rank_group, rank) for rank in range(self.ranks)]
        host, port = self._answer(self._places[0].host.remote()), self._answer(self._places[0].free_port.remote())
        given = {
            "WORLD_SIZE": str(self.ranks), "MASTER_ADDR": host, "MASTER_PORT": str(port), "OFFBEAT_MEMBER": self.settings.member,
            "TORCHELASTIC_RESTART_COUNT": str(self.failures), "TORCHELASTIC_MAX_RESTARTS": str(self.restarts),
        }  # fmt: skip
        self._ranks = {self._run(place, "trainer", given | {"RANK": str(rank)}): rank for rank, place in enumerate(self._places)}
        log.info("ranks started", extra={"ranks": self.ranks, "host": host, "gpus": self.gpus, "failures": self.failures})

    def _again(self, broken: dict[int, str]) -> bool:
        """Start all ranks again, unless that was tried often enough."""
        done, _ = self.ray.wait([*self._ranks], num_returns=len(self._ranks), timeout=1.0) if self._ranks else ([], [])
        broken |= {self._ranks[promise]: self._outcome(promise) or "ended" for promise in done}  # what followed from it: told with it
        for place in self._places:
            self.ray.kill(place)
        self._ranks = {}
        self.failures = self.failures + 1 if self._failed_at == self._standing else 1
        self._failed_at = self._standing
        reason = "; ".join(f"rank {rank} {why}" for rank, why in sorted(broken.items(), key=lambda item: "signal" not in item[1]))
        if self.failures > self.restarts:
            self._tell("ranks_given_up", f"{reason}. {self.failures} times in a row: the launcher gives up", Severity.ERROR)
            if self.failures > 1:
                self._fail(reason)
            return False
        self._tell("ranks_restarted", f"{reason}. All {self.ranks} start again, time {self.failures} of {self.restarts}", Severity.WARNING)
        self._start_ranks()
        return True

    def _look(self) -> None:
        """Where the run stands: how far it gets between two failures says whether they are in a row."""
        try:
            run_id = Fleet(self.bus).assignments().get(self.settings.member)
            if run_id is not None:
                self._standing = run_id, Ledger(self.bus, run_id).version()
        except (StoreAway, NotOurs) as error:
            log.warning("the run cannot be looked at", extra={"error": str(error)})

    def _tell(self, event: str, text: str, severity: Severity) -> None:
        """In the log and among the run's events."""
        log.log(logging.ERROR if severity is Severity.ERROR else logging.WARNING, text)
        if self._standing is None:
            return
        run_id, version = self._standing
        try:
            RunLifecycle(self.bus, run_id).event(event, text, severity, version, {"failures": self.failures})
        except StoreAway as error:
            log.warning("the event could not be told", extra={"error": str(error)})

    def _fail(self, reason: str) -> None:
        """The run's own failure by now. Rank 0 says so where it can: in NCCL it may wait for a rank that is gone until it is killed itself."""
        if self._standing is None:
            return
        try:
            RunLifecycle(self.bus, self._standing[0]).move(Action.FAIL, reason, holder=self.settings.member)
        except (IllegalMove, NotOurs, UnknownRun) as late:
            log.info("the run had ended already", extra={"error": str(late)})
        except StoreAway as error:
            log.warning("the run could not be ended", extra={"error": str(error)})

    # -- rollout servers --------------------------------------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        now = time.monotonic()
        for server in [s for s in self._waiting if s.due_at <= now]:
            self._waiting.remove(server)
            server.place, server.began_at = self._place(self._server_group, server.index), now
            given = {"OFFBEAT_MEMBER": f"{self.settings.member}-rollout-{server.index}", "OFFBEAT_PORT": str(self.settings.port + 1 + server.index)}
            self._servers[self._run(server.place, "rollout_server", given)] = server

    def _servers_ended(self, done: list[Any]) -> None:
        for promise in done:
            server, why = self._servers.pop(promise), self._outcome(promise)
            self.ray.kill(server.place)
            if self.shutdown.asked:
                continue
            server.failures = server.failures + 1 if time.monotonic() - server.began_at < LONGEST_PAUSE else 1
            pause = min(2.0 ** (server.failures - 1), LONGEST_PAUSE)
            log.warning("a rollout server ended", extra={"server": server.index, "why": why or "by itself", "again_in": pause})
            server.due_at = time.monotonic() + pause
            self._waiting.append(server)

    # -- places -----------------------------------------------------------------------------------------------------------------------

    def _reserve(self, what: str, count: int) -> Any:
        from ray.util.placement_group import placement_group

        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if self.gpus else {})
        group = placement_group([bundle] * count, strategy="PACK")
        try:
            self._answer(group.ready())
        except NoPlace as error:
            there = {kind: self.ray.cluster_resources().get(kind, 0.0) for kind in bundle}
            raise NoPlace(f"{count} {what} of {bundle} find no place in {PLACE_SECONDS:g} s: the whole cluster has {there}") from error
        return group

    def _place(self, group: Any, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        here = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        return self.ray.remote(Place).options(num_cpus=1, num_gpus=self.gpus, max_concurrency=2, scheduling_strategy=here).remote()

    def _answer(self, promise: Any) -> Any:
        """What was promised, if it comes in time."""
        deadline = time.monotonic() + PLACE_SECONDS
        while not self.ray.wait([promise], timeout=LOOK_SECONDS)[0]:
            if self.shutdown.asked:
                raise NoPlace("asked to end while places were sought")
            if time.monotonic() > deadline:
                raise NoPlace(f"no answer in {PLACE_SECONDS:g} s")
        try:
            return self.ray.get(promise)
        except self.ray.exceptions.RayError as error:
            raise NoPlace(f"a place was lost as soon as it was found: {error}") from error

    def _outcome(self, promise: Any) -> str:
        """Why a process ended; nothing when it ended in order."""
        try:
            status = self.ray.get(promise)
        except self.ray.exceptions.RayError as error:
            return f"lost its place: {str(error).splitlines()[0]}"
        if status < 0:
            return f"ended by signal {-status} ({signal.Signals(-status).name})"
        return f"ended with status {status}" if status else ""

    def _run(self, place: Any, module: str, given: dict[str, str]) -> Any:
        """The promise of a process's end."""
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | given
        return place.run.remote(module, environment, self.settings.host in EVERYWHERE)


def gpus_of_place(settings: Settings, resources: Mapping[str, float]) -> int:
    """GPUs of each place: as many as the settings say. Only a cluster that is whole by now can be asked: machines with GPUs may join it later."""
    return int(resources.get("GPU", 0) > 0) if settings.rank_gpus is None else settings.rank_gpus


def connect(address: str, *, places: int) -> None:
    """To the Ray cluster at `address`; `local` makes one on this machine with room for that many places."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address == "local":
            ray.init(
                address="local", num_cpus=max(places, os.cpu_count() or 1), object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
                configure_logging=False,
            )  # fmt: skip
        else:
            ray.init(address=address, configure_logging=False)
    except ConnectionError as error:
        raise NoPlace(f"there is no Ray cluster at {address!r}: start one with `ray start --head`, or use --address local") from error


def main() -> int:
    settings = Settings()
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="One trainer as several ranks on a Ray cluster.")
    parser.add_argument("--ranks", type=int, default=settings.trainer_ranks, help="processes, a GPU each where the cluster has any")
    parser.add_argument("--rollout-servers", type=int, default=settings.rollout_servers, help="rollout servers beside the trainer, a GPU each")
    parser.add_argument("--address", default=settings.ray_address, help="of the Ray cluster: local, auto, or HOST:PORT")
    parser.add_argument("--restarts", type=int, default=settings.rank_restarts, help="how often in a row the ranks are started again")
    arguments = parser.parse_args()
    if arguments.ranks < 1 or arguments.rollout_servers < 0 or arguments.restarts < 0:
        parser.error("there is at least one rank, and not less than no rollout server or restart")
    if importlib.util.find_spec("ray") is None:
        parser.error("Ray is not installed: `deploy/install.sh ray`, or start one rank without it, by `python -m trainer`")
    logs.set_up_member(Role.TRAINER, settings, member=f"{settings.member}.launch")
    try:
        connect(arguments.address, places=arguments.ranks + arguments.rollout_servers)
        shutdown = Shutdown().install()  # after Ray, which has a handler of its own
        launcher = Launcher(settings, shutdown, ranks=arguments.ranks, servers=arguments.rollout_servers, restarts=arguments.restarts)
        try:
            return launcher.run()
        finally:
            launcher.close()
    except NoPlace as error:
        log.error("not launched", extra={"error": str(error)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
