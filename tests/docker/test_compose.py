"""The images and the compose files, run for real without a GPU: from a clone to a run that trains, through restarts, to nothing left behind.

One project serves all tests, in the order in which they stand here. Grafana has no image where no registry can be reached, and is left out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest

from services.client import Client
from services.contracts.states import RunState
from tests.docker.conftest import give_up
from tests.docker.deployment import IMAGES, Deployment, demo_run, deployment, wait, wait_for_run
from tests.docker.engine import Engine, Unavailable

SERVICES = {"redis", "control-plane", "reward-server", "rollout-server", "trainer", "prometheus"}
FIRST_STEP_SECONDS = 120.0
BATCH = 8


@pytest.fixture(scope="module")
def built(engine: Engine, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(deployment(engine, tmp_path_factory.mktemp("clone")))
        except Unavailable as reason:
            give_up(pytestconfig, reason)
        yield made


@dataclass(frozen=True)
class Up:
    """All services, started."""

    project: Deployment
    client: Client
    began: float
    """When they were asked for, by the monotonic clock."""


@pytest.fixture(scope="module")
def started(built: Deployment) -> Iterator[Up]:
    began = time.monotonic()
    built.documented("docker compose config")
    built.up()
    print(f"up and healthy after {time.monotonic() - began:.0f} s")
    with built.client() as client:
        yield Up(built, client, began)


def finish(client: Client, run_id: str, *, seconds: float = 600.0) -> None:
    """Waits for the end of a run of which nothing may be lost, or trained on twice."""
    spec = wait_for_run(client, run_id, lambda run: run.state is RunState.COMPLETED, seconds=seconds).spec
    assert [step.version for step in client.steps(run_id).steps] == list(range(spec.versions))
    counts = client.conservation(run_id)
    assert counts.holds
    assert (counts.consumed, counts.dead) == (spec.versions * spec.batch_groups, 0)


def reach(client: Client, run_id: str, version: int) -> None:
    wait_for_run(client, run_id, lambda run: (run.version or 0) >= version)


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_imports_what_it_is_for_and_holds_no_more(built: Deployment, target: str) -> None:
    script = "import importlib.util as u, json, os; print(json.dumps([[n for n in NAMES if u.find_spec(n)], os.getuid(), os.access('.', os.W_OK)]))"
    names = ("services", "reward_server", "rollout_server", "trainer", "torch", "vllm", "reasoning_gym", "pytest")
    argv = ["docker", "run", "--rm", "--read-only", "--cap-drop=ALL", IMAGES[target], "python", "-c", script.replace("NAMES", repr(names))]
    found, user, writable = json.loads(built.run(*argv))
    own = {"control-plane": set(), "reward-server": {"reward_server"}}.get(target, {"rollout_server", "trainer", "torch", "vllm"})
    assert set(found) == {"services", "reasoning_gym"} | own
    assert (user, writable) == (10001, False)
    (image,) = built.inspect(IMAGES[target])
    assert image["Config"]["Labels"]["org.opencontainers.image.version"] == "test"
    print(f"{target}: {image['Size'] / 1e6:.0f} MB")


def test_the_first_step_comes_soon_and_the_reward_of_the_demo_run_rises(started: Up) -> None:
    client, spec = started.client, demo_run()
    run_id = client.submit(spec).run_id
    wait_for_run(client, run_id, lambda _: client.steps(run_id).recorded > 0)
    first = time.monotonic() - started.began
    print(f"first step {first:.0f} s after `docker compose up`")
    finish(client, run_id, seconds=1_800)
    print(f"version {spec.versions} {time.monotonic() - started.began:.0f} s after it")
    rewards = [step.values["reward_mean"] or 0.0 for step in client.steps(run_id).steps]
    print(f"reward {statistics.mean(rewards[:20]):.3f} in the first 20 versions, {statistics.mean(rewards[-20:]):.3f} in the last 20")
    assert statistics.mean(rewards[-20:]) > statistics.mean(rewards[:20]) + 0.1
    assert first < FIRST_STEP_SECONDS


def test_all_services_become_healthy_and_the_command_in_the_container_reaches_them(started: Up) -> None:
    running = [json.loads(line) for line in started.project.compose("ps", "--format", "json").splitlines()]
    assert {one["Service"]: one["Health"] for one in running} == dict.fromkeys(SERVICES, "healthy")
    fleet = json.loads(started.project.documented("docker compose exec control-plane offbeat fleet", "--json"))
    assert sorted(member["role"] for member in fleet) == ["control_plane", "reward", "rollout", "trainer"]
    assert [member["member_id"] for member in fleet] == [member.member_id for member in started.client.fleet().members]


def test_the_documented_run_is_submitted_and_watched_from_the_container(started: Up) -> None:
    started.project.documented("docker compose exec control-plane offbeat run submit", "--set versions=3", seconds=900)
    newest = started.client.runs(limit=1).runs[0]
    assert (newest.name, newest.state, newest.version) == ("demo", RunState.COMPLETED, 3)


def test_every_container_is_confined(started: Up) -> None:
    project = started.project
    containers = {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in project.inspect(*project.containers())}
    assert containers.keys() == SERVICES
    for name, container in containers.items():
        host = container["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["CapAdd"], host["Privileged"], host["Init"]) == (True, ["ALL"], None, False, True), name
        assert host["SecurityOpt"] == ["no-new-privileges:true"], name
        assert host["RestartPolicy"]["Name"] == "unless-stopped", name
        assert host["Memory"] > 0, name
        status = dict(line.split(":\t") for line in project.execute(name, "cat", "/proc/self/status").splitlines() if ":\t" in line)
        assert "0" not in status["Uid"].split(), name
        assert (int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2"), name
    published = {name: container["NetworkSettings"]["Ports"] for name, container in containers.items()}
    assert {name for name, ports in published.items() if any(ports.values())} == {"control-plane"}
    assert published["control-plane"] == {"8700/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(project.port)}]}
    secrets = [path.read_text().strip() for path in (project.folder / "secrets").iterdir()]
    assert len(secrets) == 4
    assert not [secret for secret in secrets if secret in json.dumps(list(containers.values()))]


SEEN = """
import socket, sys
for name in sys.argv[1:]:
    try:
        print(socket.gethostbyname(name) and name)
    except OSError:
        continue
"""


@pytest.mark.parametrize(
    ("service", "seen"),
    [
        ("reward-server", {"redis", "control-plane", "reward-server", "prometheus"}),
        ("trainer", {"redis", "control-plane", "rollout-servers", "trainer", "prometheus"}),
        ("rollout-server", {"redis", "control-plane", "rollout-servers", "trainer", "prometheus"}),
    ],
)
def test_workers_are_on_networks_without_a_way_out_and_judges_on_one_without_models(started: Up, service: str, seen: set[str]) -> None:
    """That an internal network has no way out is left to Docker: an engine that may not filter packets does not hold it."""
    names = SERVICES - {"rollout-server"} | {"rollout-servers"}
    assert set(started.project.execute(service, "python", "-c", SEEN, *names).split()) == seen
    (container,) = started.project.inspect(*started.project.containers(service))
    networks = json.loads(started.project.engine.docker("network", "inspect", *container["NetworkSettings"]["Networks"]).stdout)
    assert [network["Internal"] for network in networks] == [True]


def test_prometheus_scrapes_every_service_and_knows_the_rules(started: Up) -> None:
    def asked(path: str) -> Any:
        script = f"import urllib.request as r; print(r.urlopen('http://prometheus:9090/api/v1/{path}').read().decode())"
        return json.loads(started.project.execute("control-plane", "python", "-c", script))["data"]

    def scraped(query: str) -> dict[str, str]:
        return {one["metric"]["job"]: one["value"][1] for one in asked(f"query?query={quote(query)}")["result"]}

    wait(lambda: scraped("up") == dict.fromkeys(IMAGES, "1"), "not every service is scraped", seconds=60)
    assert scraped('count by (job) ({__name__=~"offbeat_.*"})').keys() == IMAGES.keys()
    rules = [rule for group in asked("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert {"alerting", "recording"} == {rule["type"] for rule in rules}


def test_a_rollout_server_more_joins_the_run(started: Up) -> None:
    client = started.client
    run_id = client.submit(demo_run(name="scales", versions=2_000, batch_groups=BATCH, staleness={"max_lag": 4})).run_id
    reach(client, run_id, 1)
    started.project.up("--no-recreate", "--scale", "rollout-server=2")
    assert len(started.project.containers("rollout-server")) == 2

    def both() -> bool:
        newest = client.run(run_id).version or 0
        return len({sample.server for sample in client.samples(run_id, first=max(0, newest - 3), limit=50).samples}) == 2

    wait(both, "the second rollout server takes no part", seconds=180)
    client.cancel(run_id)
    started.project.up("--no-recreate", "--scale", "rollout-server=1")
    assert len(started.project.containers("rollout-server")) == 1


@pytest.mark.parametrize("service", ["reward-server", "trainer", "redis", "rollout-server", "control-plane"])
def test_a_process_that_is_killed_comes_back_and_the_run_goes_on(started: Up, service: str) -> None:
    versions = 60
    run_id = started.client.submit(demo_run(name=f"kill-{service}", versions=versions, batch_groups=BATCH, checkpoint={"every": 5})).run_id
    reach(started.client, run_id, 6)
    began = time.monotonic()
    started.project.kill(service)
    killed_at = wait_for_run(started.client, run_id, lambda _: True).version or 0
    assert killed_at < versions / 2, "it was killed before the end"
    reach(started.client, run_id, killed_at + 2)  # one may have been under way
    print(f"{service} killed: second version after {time.monotonic() - began:.0f} s")
    finish(started.client, run_id)


def test_runs_outlive_down_and_up_and_nothing_outlives_down_with_volumes(started: Up) -> None:
    project, client = started.project, started.client
    run_id = client.submit(demo_run(name="outlives", versions=24, batch_groups=BATCH, checkpoint={"every": 6})).run_id
    reach(client, run_id, 8)
    before = client.steps(run_id).steps[:6]
    project.compose("down", seconds=240)
    left = project.left()
    assert (left["containers"], left["networks"]) == ([], [])
    assert len(left["volumes"]) == 4
    project.up()
    assert client.steps(run_id).steps[:6] == before
    finish(client, run_id)
    assert "demo" in {run.name for run in client.runs().runs}
    project.compose("down", "--volumes", seconds=240)
    assert not any(project.left().values())
