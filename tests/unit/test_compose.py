"""The compose files, by the real `docker compose config`: each way to lay them over each other is valid, and what is forgotten or misspelt is not."""

import functools
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import compose
import pytest
import yaml
from typer.testing import CliRunner

from services.cli.__main__ import app
from services.cli.init import OVERLAYS, SECRETS, for_gpus
from services.runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = Path(compose.__file__).parent / "docker-compose"
OURS = {"control-plane", "reward-server", "rollout-server", "trainer"}
EXAMPLE = (ROOT / ".env.example").read_text()


def config(*arguments: str, folder: Path = ROOT, environment: Path = ROOT / ".env.example", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPOSE), "--project-directory", str(folder), "--env-file", str(environment), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env={"PATH": os.environ["PATH"], **variables})


@functools.cache
def composed(gpus: int) -> dict[str, Any]:
    files = ["compose.yaml", *filter(None, [OVERLAYS[gpus]])]
    result = config(*(part for file in files for part in ("-f", file)), "config", "--format", "json")
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def devices(gpus: int) -> dict[str, list[str]]:
    """GPUs by service."""
    reserved = {name: service.get("deploy", {}).get("resources", {}).get("reservations", {}) for name, service in composed(gpus)["services"].items()}
    return {name: [i for device in r["devices"] for i in device["device_ids"]] for name, r in reserved.items() if r}


def test_every_compose_file_of_the_repository_belongs_to_a_number_of_gpus() -> None:
    assert {path.name for path in ROOT.glob("compose*.yaml")} == {"compose.yaml", *filter(None, OVERLAYS.values())}


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_every_combination_is_valid(gpus: int) -> None:
    assert set(composed(gpus)["services"]) >= {*OURS, "redis", "prometheus", "grafana"}


def test_each_gpu_has_one_user_but_where_there_is_only_one() -> None:
    assert devices(0) == {}
    assert devices(1) == {"trainer": ["0"], "rollout-server": ["0"]}
    assert devices(2) == {"trainer": ["0"], "rollout-server": ["1"]}
    for gpus in (4, 8):
        assert sorted(i for ids in devices(gpus).values() for i in ids) == [str(i) for i in range(gpus)]
        assert devices(gpus)["trainer"] == ["0"]


def test_on_a_shared_card_vllm_takes_what_it_is_told_to() -> None:
    assert composed(1)["services"]["rollout-server"]["environment"]["OFFBEAT_KV_CACHE_BYTES"] == str(8 << 30)
    assert composed(1)["services"]["trainer"]["deploy"]["resources"]["limits"], "an overlay keeps the limits"


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_weights_go_by_nccl_where_trainer_and_servers_have_a_card_each(gpus: int) -> None:
    transport = composed(gpus)["services"]["trainer"]["environment"]["OFFBEAT_WEIGHT_TRANSPORT"]
    assert transport == ("nccl" if gpus > 1 else "shm")


@pytest.mark.parametrize("gpus", [4, 8])
def test_further_rollout_servers_are_like_the_first(gpus: int) -> None:
    services = composed(gpus)["services"]
    first = services["rollout-server"]
    others = [service for name, service in services.items() if name.startswith("rollout-server-")]
    assert len(others) == gpus - 2
    for other in others:
        assert {key: value for key, value in other.items() if key != "deploy"} == {key: value for key, value in first.items() if key != "deploy"}
        assert other["deploy"]["resources"]["limits"] == first["deploy"]["resources"]["limits"]


def test_without_a_gpu_the_images_are_those_for_cpu() -> None:
    services = composed(0)["services"]
    for name in ("rollout-server", "trainer"):
        assert services[name]["image"].endswith("-cpu")
        assert services[name]["build"]["args"] == {"VARIANT": "cpu"}
        assert services[name]["environment"]["OMP_NUM_THREADS"] == "1"


def with_compose_files(folder: Path) -> Path:
    for path in ROOT.glob("compose*.yaml"):
        (folder / path.name).write_text(path.read_text())
    return folder


def test_a_key_that_compose_does_not_know_is_refused(tmp_path: Path) -> None:
    with_compose_files(tmp_path)
    path = tmp_path / "compose.yaml"
    path.write_text(path.read_text().replace("stop_grace_period: 120s", "stop_graceperiod: 120s"))
    result = config("config", "-q", folder=tmp_path)
    assert result.returncode != 0
    assert "stop_graceperiod" in result.stderr


def test_without_its_secrets_nothing_starts_and_what_to_do_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.env").touch()
    result = config("config", "-q", folder=with_compose_files(tmp_path), environment=tmp_path / "empty.env")
    assert result.returncode != 0
    assert "OFFBEAT_SECRETS" in result.stderr
    assert "offbeat init" in result.stderr


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_secrets_come_from_files_only(gpus: int) -> None:
    parsed = composed(gpus)
    assert {name: Path(secret["file"]).name for name, secret in parsed["secrets"].items()} == {name: name for name in SECRETS}
    for name, service in parsed["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"(?i)token|password|secret", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.startswith("/run/secrets/")
                assert Path(value).name in {secret["source"] for secret in service["secrets"]}
    assert not re.search(r"(?im)^\w*(token|password|secret)\w*\s*=\s*(?!\./secrets$)\S", EXAMPLE)


def test_each_service_has_only_the_secrets_that_it_needs() -> None:
    given = {name: {secret["source"] for secret in service.get("secrets", [])} for name, service in composed(2)["services"].items()}
    workers = {"cluster-token", "redis-password"}
    assert given == {
        "redis": {"redis-password"}, "control-plane": {"token", *workers}, "reward-server": workers, "rollout-server": workers, "trainer": workers,
        "prometheus": set(), "grafana": {"grafana-password"},
    }  # fmt: skip


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_every_container_is_confined(gpus: int) -> None:
    for name, service in composed(gpus)["services"].items():
        assert (service["read_only"], service["cap_drop"], service["init"]) == (True, ["ALL"], True), name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert not service.get("privileged")


def test_only_api_and_grafana_can_be_reached_from_outside_and_by_default_from_this_host() -> None:
    parsed = composed(8)
    published = {name: service["ports"] for name, service in parsed["services"].items() if "ports" in service}
    assert {name: [(port["host_ip"], port["target"]) for port in ports] for name, ports in published.items()} == {
        "control-plane": [("127.0.0.1", 8700)],
        "grafana": [("127.0.0.1", 3000)],
    }
    networks = {name: set(service["networks"]) for name, service in parsed["services"].items()}
    assert {name for name, of in networks.items() if "outside" in of} == set(published)
    assert {name for name, network in parsed["networks"].items() if not network.get("internal")} == {"outside"}
    assert networks["reward-server"] == {"judge"}
    assert not networks["reward-server"] & networks["trainer"]
    assert all(networks["redis"] & of for name, of in networks.items() if name not in {"grafana"})


def test_processes_start_in_order_of_health_and_end_with_time_for_a_checkpoint() -> None:
    services = composed(2)["services"]
    for name in OURS:
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"
    awaited = {name for name, how in services["trainer"]["depends_on"].items() if how["condition"] == "service_healthy"}
    assert awaited == {*OURS, "redis"} - {"trainer"}
    assert services["trainer"]["stop_grace_period"] == "2m0s"


def test_trainer_and_rollout_servers_share_memory_for_weights_and_the_control_plane_the_checkpoints() -> None:
    volumes = {name: {v["target"]: v.get("source") for v in s.get("volumes", [])} for name, s in composed(4)["services"].items()}
    for name in ("trainer", "rollout-server", "rollout-server-2", "rollout-server-3"):
        assert volumes[name]["/dev/shm"] == "shared-memory"
    assert volumes["trainer"]["/data"] == volumes["control-plane"]["/data"] == "runs"
    assert volumes["redis"]["/data"] == "redis-data"
    assert composed(4)["volumes"]["shared-memory"]["driver_opts"] == {"type": "tmpfs", "device": "tmpfs", "o": "size=32g,mode=1777"}


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_what_containers_are_told_is_what_processes_read(gpus: int) -> None:
    read = {f"OFFBEAT_{name.upper()}" for name in Settings.model_fields} | {"OFFBEAT_URL", "OMP_NUM_THREADS"}
    for name, service in composed(gpus)["services"].items():
        if name.removesuffix("-" + name.rpartition("-")[2]) in OURS or name in OURS:
            assert set(service["environment"]) <= read, name


def test_every_setting_of_the_example_is_read_by_a_compose_file_and_has_the_default_that_stands_there() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("compose*.yaml"))
    for name, value in re.findall(r"^([A-Z_0-9]+)=(.*)$", EXAMPLE, flags=re.MULTILINE):
        defaults = set(re.findall(rf"\$\{{{name}:-([^}}]*)\}}", text))
        if name not in {"COMPOSE_FILE", "OFFBEAT_SECRETS"}:  # of compose itself; without a default
            assert defaults == {value}, name


def test_every_variable_of_a_compose_file_is_in_the_example() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("compose*.yaml"))
    asked = set(re.findall(r"(?<!\$)\$\{([A-Z_0-9]+)", text))
    assert len(asked) > 20
    assert asked <= set(re.findall(r"^([A-Z_0-9]+)=", EXAMPLE, flags=re.MULTILINE))


def test_what_is_mounted_from_the_repository_is_there() -> None:
    for service in composed(2)["services"].values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind" and (source := Path(volume["source"])) != ROOT / "models":
                assert source.exists(), source


def test_prometheus_scrapes_every_service_of_ours() -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "compose.yml").read_text())["scrape_configs"]
    names = {job["job_name"]: job["dns_sd_configs"][0]["names"] for job in scraped}
    assert set(names) == OURS
    services = composed(8)["services"]
    for job, (name,) in names.items():
        aliases = {alias for s in services for network in services[s]["networks"].values() for alias in (network or {}).get("aliases", [])}
        assert name in services or name in aliases, job
        assert services["prometheus"]["networks"].keys() & services[job]["networks"].keys()
    rollouts = {name for name in services if name.startswith("rollout-server")}
    assert all(services[name]["networks"]["work"]["aliases"] == names["rollout-server"] for name in rollouts)


PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"


def test_grafana_finds_prometheus_and_the_dashboards_and_lets_nobody_in_without_the_password() -> None:
    services = composed(2)["services"]
    grafana, prometheus = services["grafana"], services["prometheus"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"], source["access"]) == ("prometheus", "http://prometheus:9090", True, "proxy")
    assert grafana["networks"].keys() & prometheus["networks"].keys()
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "compose.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped, "rates over less than four scrapes are empty"
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "offbeat.yaml").read_text())["providers"]
    mounted = {volume["target"]: Path(volume["source"]) for volume in grafana["volumes"] if volume["type"] == "bind"}
    assert mounted["/etc/grafana/provisioning"] == PROVISIONING
    assert len(list(mounted[provider["options"]["path"]].glob("*.json"))) == 5
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana-password"
    assert not [name for name in grafana["environment"] if "ANONYMOUS" in name]


def test_what_is_mounted_over_memory_or_a_volume_is_all_that_is_written_to() -> None:
    """The root is read-only: caches and state need a place."""
    for name, service in composed(1)["services"].items():
        writable = {path.split(":")[0] for path in service.get("tmpfs", [])}
        writable |= {volume["target"] for volume in service.get("volumes", []) if not volume.get("read_only")}
        needed = {"prometheus": {"/prometheus"}, "grafana": {"/tmp", "/var/lib/grafana"}, "redis": {"/tmp", "/data"}}.get(name, {"/tmp"})
        needed |= {"control-plane": {"/data"}, "trainer": {"/data", "/dev/shm"}, "rollout-server": {"/dev/shm"}}.get(name, set())
        assert writable == needed, name


def test_a_service_of_others_is_asked_whether_it_is_healthy() -> None:
    """Ours are asked by their images."""
    for name, service in composed(2)["services"].items():
        assert ("healthcheck" in service) == (name not in OURS), name
    assert composed(2)["services"]["redis"]["healthcheck"]["start_period"] == "10m0s", "an append-only file of gigabytes is read"


def test_init_makes_secrets_that_only_their_owner_can_reach_and_keeps_what_is_there(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["init", "--folder", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "docker compose up" in run("--gpus", "4")
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text().strip() for path in folder.iterdir()}
    assert set(made) == set(SECRETS)
    assert len(set(made.values())) == len(SECRETS)
    assert all(len(secret) >= 43 for secret in made.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}, "containers read them under another user id"
    assert (tmp_path / "models").is_dir()
    assert "COMPOSE_FILE=compose.yaml:compose.gpu-4.yaml\n" in (tmp_path / ".env").read_text()

    (folder / "token").unlink()
    run("--gpus", "8")
    again = {path.name: path.read_text().strip() for path in folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"token"}
    assert "compose.gpu-4.yaml" in (tmp_path / ".env").read_text()


def test_what_containers_mount_of_a_clone_made_under_a_strict_umask_can_be_read_by_their_users(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(mode=0o700)
    for folder in ("prometheus", "grafana"):
        shutil.copytree(ROOT / "deploy" / folder, tmp_path / "deploy" / folder)
    for path in [tmp_path / "deploy", *(tmp_path / "deploy").rglob("*")]:
        path.chmod(path.stat().st_mode & 0o700)
    assert CliRunner().invoke(app, ["init", "--folder", str(tmp_path)]).exit_code == 0
    mounted = [Path(volume["source"]) for s in composed(2)["services"].values() for volume in s.get("volumes", []) if volume["type"] == "bind"]
    assert len({path.name for path in mounted}) == 5
    for source in mounted:
        there = tmp_path / source.relative_to(ROOT)
        for path in [there, *there.rglob("*")]:
            wanted = 0o555 if path.is_dir() else 0o444
            assert path.stat().st_mode & wanted == wanted, path
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700


def test_init_refuses_a_number_of_gpus_without_a_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", "--folder", str(tmp_path), "--gpus", "3"])
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gpus", OVERLAYS)
def test_what_init_writes_is_all_that_compose_needs(gpus: int, tmp_path: Path) -> None:
    with_compose_files(tmp_path)
    (tmp_path / ".env").write_text(for_gpus(EXAMPLE, gpus))
    result = config("config", "-q", folder=tmp_path, environment=tmp_path / ".env")
    assert (result.returncode, result.stderr) == (0, "")
