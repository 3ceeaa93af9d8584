"""The images, as far as they can be judged without building them: the Dockerfile lints, copies what is there, and installs pinned sets."""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", "", "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")))
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))
PARENTS = {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)$", TEXT, flags=re.MULTILINE)}
TARGETS = ("control-plane", "reward-server", "rollout-server", "trainer")
HEALTHCHECK = ROOT / "docker" / "healthcheck.py"
READ_BY_ROOT = {
    Path(path) for path in ("docker/system-packages.sh", "docker/wheelhouse", "deploy/install.sh", "deploy/locks", "pyproject.toml", "README.md")
}
"""What builders copy, who are root."""
FETCHED = {"deploy/models/smollm2-135m"}
"""Models that are not in the repository."""


def lines(stage: str, instruction: str) -> list[str]:
    """Of a stage and of those that it is built on, the oldest first."""
    own = re.findall(rf"^{instruction} (.*)$", STAGES[stage], flags=re.MULTILINE)
    return (lines(PARENTS[stage], instruction) if PARENTS[stage] in STAGES else []) + own


def copied_from_context(stage: str) -> list[str]:
    return [path for line in lines(stage, "COPY") if not line.startswith("--from") for path in line.split()[:-1]]


def test_the_dockerfile_lints() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside if beside.exists() else shutil.which("hadolint"))
    result = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_every_target_is_there() -> None:
    assert set(TARGETS) <= set(STAGES)
    targets = re.findall(r"--target (\S+)", (ROOT / "Makefile").read_text())
    assert tuple(targets) == TARGETS


def ignored(path: str) -> bool:
    """By .dockerignore, where the last pattern that fits decides; of the forms of patterns that stand there."""
    found = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            bare = pattern.removeprefix("!")
            parts = Path(path).parts
            prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
            if any(fnmatch(prefix, bare) or fnmatch("/" + prefix, bare.replace("**", "*")) for prefix in prefixes):
                found = not pattern.startswith("!")
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_copied_is_there_and_is_not_ignored(stage: str) -> None:
    for path in copied_from_context(stage):
        assert (ROOT / path).exists(), path
        inside = [path] if (ROOT / path).is_file() else [p.relative_to(ROOT).as_posix() for p in (ROOT / path).rglob("*") if p.is_file()]
        assert any(not ignored(name) for name in inside), path
    for stage_and_path in re.findall(r"--from=(\S+)", STAGES[stage]):
        assert stage_and_path in STAGES


@pytest.mark.parametrize("path", [".git/config", ".env", "secrets/token", "models/x/model.safetensors", ".venv/bin/python", "tests/conftest.py"])
def test_what_no_image_needs_is_ignored(path: str) -> None:
    assert ignored(path)


def test_code_is_not_ignored_and_its_caches_are() -> None:
    assert not ignored("trainer/train.py")
    assert not ignored("deploy/models/tiny/model.safetensors")
    assert ignored("trainer/__pycache__/train.cpython-311.pyc")
    assert ignored("deploy/models/smollm2-135m/model.safetensors")


@pytest.mark.parametrize(
    ("target", "packages", "sets"),
    [
        ("control-plane", {"services"}, "control-plane reasoning-gym"),
        ("reward-server", {"services", "reward_server"}, "reward-server reasoning-gym"),
        ("rollout-server", {"services", "rollout_server", "trainer"}, '"${VARIANT}" reasoning-gym ray'),
        ("trainer", {"services", "rollout_server", "trainer"}, '"${VARIANT}" reasoning-gym ray'),
    ],
)
def test_an_image_holds_its_packages_and_its_sets(target: str, packages: set[str], sets: str) -> None:
    copies = [line.removeprefix("--from=").split() for line in lines(target, "COPY") if line.startswith("--from")]
    (first, *_), *own = copies
    assert [source for _, source, _ in copies] == [
        f"/opt/offbeat/{name}"
        for name in (".venv", "package", *(n for n in ("services", "reward_server", "rollout_server", "trainer") if n in packages))
    ]
    assert [line for line in lines(first, "RUN") if "install.sh" in line] == [f"deploy/install.sh {sets}"]
    assert {PARENTS[stage] for stage, *_ in own} == {first}, "what changes with the code is apart from the layer of what it needs"
    assert not {"pyproject.toml", "services"} & set(copied_from_context(first))
    command = re.search(r'"-m", "([\w.]+)"', lines(target, "CMD")[-1])
    assert command is not None
    assert (ROOT / command[1].replace(".", "/") / "__main__.py").is_file()
    assert command[1].split(".")[0] in packages


@pytest.mark.parametrize("target", TARGETS)
def test_services_run_without_rights_and_say_whether_they_are_healthy(target: str) -> None:
    assert lines(target, "USER")[-1] == "10001:10001"
    assert "--uid 10001" in STAGES["base"]
    path = re.search(r'CMD \["healthcheck", "(/\w+)"\]', lines(target, "HEALTHCHECK")[-1])
    assert path is not None
    assert path[1] == ("/healthz" if target == "rollout-server" else "/readyz")
    assert {"ADD"} & set(re.findall(r"^([A-Z]+) ", STAGES[target], flags=re.MULTILINE)) == set()
    assert not re.search(r"(?i)(ENV|ARG) \S*(token|password|secret)", TEXT)


def test_base_images_are_pinned_and_those_of_both_files_are_one() -> None:
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", re.search(r"^ARG PYTHON_IMAGE=(.*)$", TEXT, flags=re.MULTILINE)[1])
    images = re.findall(r"image: ([\w./-]+:\S+)", (ROOT / "compose.yaml").read_text())
    assert len([image for image in images if re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image)]) == 3
    valkey = next(image for image in images if image.startswith("valkey/"))
    assert f"image: {valkey}" in (ROOT / "deploy" / "helm" / "offbeat" / "values.yaml").read_text()


def test_what_is_written_at_run_time_goes_where_a_container_with_a_read_only_root_can_write() -> None:
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(lines("base", "ENV"))))
    assert settings["HOME"] == "/tmp", "vLLM, Triton, Inductor, Matplotlib"
    assert settings["HF_HOME"] == "/models", "models are found there, and nothing can be written"
    assert settings["HF_DATASETS_CACHE"].startswith("/tmp/"), "data sets are unpacked before they are read"
    assert "--home-dir /tmp" in STAGES["base"]


@pytest.mark.parametrize("stage", [*TARGETS, "control-plane-package", "reward-server-package", "model-package"])
def test_what_is_copied_from_a_clone_can_be_read_by_all(stage: str) -> None:
    """COPY keeps modes, those of a clone made under umask 077 too."""
    opened = {Path(path) for line in lines(stage, "RUN") for of in re.findall(r"chmod -R a\+rX ([^&]+)", line) for path in of.split()}
    copied = {Path("/usr/local/bin/healthcheck" if path == "docker/healthcheck.py" else path) for path in copied_from_context(stage)}
    assert opened
    assert [path for path in copied - READ_BY_ROOT if not opened & {path, *path.parents}] == []


@pytest.mark.parametrize(
    "path", [*(ROOT / "deploy" / "runs").glob("*.toml"), *(ROOT / "deploy" / "studies").glob("*.toml")], ids=lambda path: path.name
)
def test_a_run_or_study_in_the_images_finds_its_model_there(path: Path) -> None:
    spec = tomllib.loads(path.read_text())
    model = spec.get("base", spec)["model"]["path"]
    assert not model.startswith("deploy/") or model in FETCHED or not ignored(f"{model}/model.safetensors")


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def check(path: str, port: int) -> int:
    environment = os.environ | {"OFFBEAT_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}  # as Docker's configuration may give containers
    return subprocess.run([sys.executable, str(HEALTHCHECK), path], env=environment, capture_output=True, timeout=30).returncode


def test_the_health_check_tells_a_healthy_service_from_one_that_is_not() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert check("/healthz", server.server_port) == 0
            assert check("/readyz", server.server_port) == 1
        finally:
            server.shutdown()
            thread.join()
        port = server.server_port
    assert check("/healthz", port) == 1, "nobody listens any more"


def test_system_packages_that_are_there_are_not_asked_for(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    for name, body in {"dpkg-query": "[[ $4 == gcc ]] && echo installed", "apt-get": f'echo "$@" >> {calls}'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*packages: str) -> None:
        script = (ROOT / "docker" / "system-packages.sh").read_text().replace("rm -rf /var/lib/apt/lists/*", "true")
        subprocess.run(["bash", "-c", script, "system-packages", *packages], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True, timeout=30)

    run("gcc")
    assert not calls.exists()
    run("gcc", "libnuma1")
    assert calls.read_text().splitlines() == ["update -q", "install -q -y --no-install-recommends libnuma1"]
