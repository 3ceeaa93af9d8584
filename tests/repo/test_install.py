"""deploy/install.sh, with a stub in place of the environment's Python, so that nothing is fetched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB_PYTHON = r"""#!/bin/bash
# Notes what it was asked for; says what pip says where an index does not have a package ($NOT_THERE) or cannot be reached ($UNREACHABLE).
echo "$*" >>"$CALLS"
for word in "$@"; do
    if [[ $word == "$NOT_THERE" ]]; then
        echo "ERROR: Could not find a version that satisfies the requirement $word (from versions: 2.13.0, 2.14.0)"
        echo "ERROR: No matching distribution found for $word"
        exit 1
    fi
    if [[ $word == "$UNREACHABLE" ]]; then
        echo "ERROR: Could not install packages due to an OSError: Connection refused"
        exit 1
    fi
done
if [[ $1 == -c && $2 == *libnuma* ]]; then exit "${LIBNUMA_STATUS:-0}"; fi
if [[ $1 == -c && $2 == *libatomic* ]]; then exit "${LIBATOMIC_STATUS:-0}"; fi
if [[ $1 == -c && $2 == *Python.h* ]]; then exit "${HEADERS_STATUS:-0}"; fi
exit 0
"""


class Machine:
    """An environment `venv` that only has the stub, and a PATH of few programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / "venv"
        self.calls = folder / "calls"
        self.packages = self.venv / "lib" / "python3.11" / "site-packages"
        self.packages.mkdir(parents=True)
        self.write(self.venv / "bin" / "python", STUB_PYTHON)
        self.bin = folder / "bin"
        for program in ("cc", "chromium", "prometheus", "promtool"):
            self.write(self.bin / program, "#!/bin/sh\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def lacks(self, *programs: str) -> None:
        for program in programs:
            (self.bin / program).unlink()

    def write_debian(self, *, asked: str, unpacked: str) -> None:
        """An apt-get that notes what it was asked for, and runs the shell script `asked`; a package is unpacked by `unpacked`, in that folder."""
        self.write(self.bin / "apt-get", f'#!/bin/sh\necho "$*" >>"$CALLS"\n{asked}\n')
        self.write(self.bin / "dpkg-deb", f'#!/bin/sh\n[ "$1" = -x ] && cd "$3" && {unpacked}\n')

    def install(self, *sets: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", str(ROOT / "deploy" / "install.sh"), *sets],
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "OFFBEAT_VENV": str(self.venv), "CALLS": str(self.calls), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installed(self) -> list[str]:
        """Arguments of the installing calls, less the options that all of them have."""
        lines = [line for line in self.calls.read_text().splitlines() if " install " in line]
        return [
            re.sub(r"^-m (uv )?pip (install )?|install | ?--(disable-pip-version-check|no-deps|no-build-isolation)\b", r"\1", line).strip()
            for line in lines
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def torch_pin() -> str:
    return next(line for line in (ROOT / "deploy" / "locks" / "cpu.txt").read_text().splitlines() if line.startswith("torch=="))


def test_what_is_asked_for_is_installed_without_dependencies_and_then_this_package(machine: Machine) -> None:
    result = machine.install("cpu", "dev")
    assert result.returncode == 0, result.stderr
    assert machine.installed() == [torch_pin(), f"-r {machine.venv}/cpu.txt", f"-r {machine.venv}/dev.txt", "--editable ."]
    assert all("--no-deps" in line for line in machine.calls.read_text().splitlines() if " install " in line)
    assert "torch==" not in (machine.venv / "cpu.txt").read_text()
    assert re.search(r"installing cpu: \d+ pinned packages, about 2\.\d GB on disk, 1 to 5 minutes", result.stdout)
    assert re.search(r"installed in \d+ s", result.stdout)


def test_nothing_is_done_when_nothing_changed(machine: Machine) -> None:
    machine.install("cpu")
    result = machine.install("cpu")
    assert (result.returncode, result.stdout, machine.calls.read_text()) == (0, "", "")


def test_only_the_set_whose_lock_changed_is_installed_again(machine: Machine) -> None:
    machine.install("cpu", "dev")
    (machine.venv / ".installed-dev").write_text("the hash of an older lock\n")
    machine.install("cpu", "dev")
    assert machine.installed() == [f"-r {machine.venv}/dev.txt"]


def test_without_a_cpu_build_in_the_index_uv_fetches_pytorchs_own(machine: Machine) -> None:
    result = machine.install("cpu", NOT_THERE=torch_pin())
    assert result.returncode == 0, result.stderr
    plain = torch_pin().removesuffix("+cpu")
    first, uv, torch, *rest = machine.installed()
    assert first == torch_pin()
    assert re.fullmatch(r"uv==[\d.]+", uv)
    assert torch == f"uv --python {machine.venv}/bin/python --torch-backend cpu {plain}"
    assert rest == [f"-r {machine.venv}/cpu.txt", "--editable ."]
    assert "taking PyTorch's own CPU build, by uv" in result.stdout


def test_failure_of_another_kind_is_shown_and_is_no_reason_to_fall_back(machine: Machine) -> None:
    result = machine.install("cpu", UNREACHABLE=torch_pin())
    assert result.returncode == 1
    assert "Connection refused" in result.stderr
    assert "Run the same command again to go on from here" in result.stderr
    assert machine.installed() == [torch_pin()]


def test_interrupted_installation_goes_on_and_repairs_what_was_half_unpacked(machine: Machine) -> None:
    whole, half, remains = (machine.packages / name for name in ("whole-1.0.dist-info", "half-1.0.dist-info", "~emains"))
    fetched = machine.venv / "debian"
    for folder in (whole, half, remains, fetched):
        folder.mkdir()
        (folder / "METADATA").touch()
    (whole / "INSTALLER").write_text("pip\n")
    machine.install("cpu", UNREACHABLE=f"{machine.venv}/cpu.txt")
    assert not (machine.venv / ".installed-cpu").exists()
    assert [path.name for path in machine.packages.iterdir()] == ["whole-1.0.dist-info"]
    assert not fetched.exists()
    assert machine.install("cpu").returncode == 0
    assert machine.installed() == [torch_pin(), f"-r {machine.venv}/cpu.txt", "--editable ."]


def test_without_a_compiler_reasoning_gym_is_left_out_and_said_so(machine: Machine) -> None:
    result = machine.install("cpu", "reasoning-gym", HEADERS_STATUS="1")
    assert result.returncode == 0
    assert "data sources reasoning_gym:* left out (for them: apt-get install gcc python3-dev" in result.stdout
    assert f"-r {machine.venv}/reasoning-gym.txt" not in machine.installed()
    assert machine.install("reasoning-gym").returncode == 0
    assert machine.installed() == [f"-r {machine.venv}/reasoning-gym.txt"]


def test_missing_libnuma_is_put_into_the_environment(machine: Machine) -> None:
    machine.write_debian(asked="touch libnuma1_2_amd64.deb", unpacked="mkdir -p usr/lib/any && echo library >usr/lib/any/libnuma.so.1")
    assert machine.install("cpu", LIBNUMA_STATUS="1").returncode == 0
    assert (machine.venv / "lib" / "libnuma.so.1").read_text() == "library\n"
    assert "libnuma.so.1" in (machine.packages / "offbeat_libnuma.pth").read_text()
    assert not (machine.venv / "debian").exists()


@pytest.fixture
def bare(machine: Machine) -> Machine:
    """With no program but those of every system."""
    for program in ("awk", "basename", "bash", "cat", "chmod", "cp", "cut", "dirname", "find", "flock", "grep", "ln", "mkdir", "mv",
                    "readlink", "realpath", "rm", "sed", "sh", "sha256sum", "tail", "tee", "timeout", "touch"):  # fmt: skip
        path = shutil.which(program)
        assert path is not None
        (machine.bin / program).symlink_to(path)
    return machine


PROMETHEUS = "mkdir -p usr/bin && echo one >usr/bin/prometheus && echo two >usr/bin/promtool"


def test_missing_prometheus_is_put_into_the_environment_for_the_tests(bare: Machine) -> None:
    bare.lacks("prometheus", "promtool")
    bare.write_debian(asked="touch prometheus_2_amd64.deb", unpacked=PROMETHEUS)
    result = bare.install("dev", PATH=str(bare.bin))
    assert result.returncode == 0, result.stderr
    assert [(bare.venv / "bin" / name).read_text() for name in ("prometheus", "promtool")] == ["one\n", "two\n"]
    assert "which tests ask: putting Debian's into" in result.stdout
    assert f"-r {bare.venv}/dev.txt" in bare.installed()
    assert not (bare.venv / "debian").exists()


def test_lists_of_packages_that_are_missing_are_fetched_into_a_copy(bare: Machine) -> None:
    """As on a new container, where nobody has run `apt-get update`; who is not root may not."""
    bare.lacks("promtool")
    bare.write_debian(asked='case "$*" in *::lists=*) touch prometheus_2_amd64.deb;; *) exit 100;; esac', unpacked=PROMETHEUS)
    assert bare.install("dev", PATH=str(bare.bin)).returncode == 0
    assert (bare.venv / "bin" / "promtool").is_file()
    asked = [line for line in bare.calls.read_text().splitlines() if line.startswith("-q -o Dir::Cache=")]
    assert [line.rsplit(maxsplit=2)[1:] for line in asked] == [
        ["download", "prometheus"], [f"Dir::State::lists={bare.venv}/debian/lists", "update"], ["download", "prometheus"],
    ]  # fmt: skip


CHROMIUM = r"""mkdir -p usr/lib/chromium usr/lib/any-linux-gnu/pulseaudio usr/share/fonts &&
touch usr/lib/any-linux-gnu/libany.so.1 usr/lib/any-linux-gnu/pulseaudio/libdeep.so usr/share/fonts/any.ttf &&
printf '#!/bin/sh
%s
' "$PROGRAM" >usr/lib/chromium/chromium-headless-shell && chmod +x usr/lib/chromium/chromium-headless-shell"""
on_debian = pytest.mark.skipif(not Path("/var/lib/dpkg/status").is_file(), reason="not a Debian: apt-get would not know what is installed")


@on_debian
def test_missing_chromium_is_put_into_the_environment_with_its_libraries_and_a_font(bare: Machine) -> None:
    bare.lacks("chromium")
    bare.write_debian(asked='cp "$DEBIAN/status" "$DEBIAN/../status" && touch chromium_1_amd64.deb', unpacked=CHROMIUM)
    environment = {"PATH": str(bare.bin), "DEBIAN": str(bare.venv / "debian"), "PROGRAM": 'echo "it runs: $*, $LD_LIBRARY_PATH, $FONTCONFIG_FILE"'}
    result = bare.install("dev", **environment)
    assert result.returncode == 0, result.stderr
    place = bare.venv / "share" / "chromium"
    said = subprocess.run([bare.venv / "bin" / "chromium", "--a", "b c"], capture_output=True, text=True, timeout=60, env={"PATH": str(bare.bin)})
    assert said.stdout == f"it runs: --a b c, {place}/libraries, {place}/fonts.conf\n"
    assert {path.name for path in (place / "libraries").iterdir()} == {"libany.so.1", "libdeep.so"}
    assert [path.name for path in (place / "fonts").iterdir()] == ["any.ttf"]
    assert re.search(r"putting Debian's into \S+ \(\d+ to \d+ MB to fetch, \d+ to \d+ MB on disk\)", result.stdout)
    assert not (bare.venv / "debian").exists()

    asked = next(line for line in bare.calls.read_text().splitlines() if "Dir::State::status" in line)
    assert asked.endswith(f"-o Dir::State::status={bare.venv}/debian/status chromium-headless-shell fonts-dejavu-core")
    installed = (bare.venv / "status").read_text()
    assert installed.startswith(Path("/var/lib/dpkg/status").read_text())
    assert re.findall(r"^Package: (.*)\nStatus: install ok installed\nVersion: 999$", installed, re.MULTILINE) == ["x11-utils", "xdg-utils"]

    (bare.venv / ".installed-dev").unlink()
    assert "Chromium" not in bare.install("dev", **environment).stdout


def test_missing_libatomic_is_put_into_the_environment_for_playwright(bare: Machine) -> None:
    bare.lacks("chromium")
    bare.write_debian(
        asked='case "$*" in *"download libatomic1") touch libatomic1_12_amd64.deb;; *) exit 100;; esac',
        unpacked="mkdir -p usr/lib/any && echo library >usr/lib/any/libatomic.so.1",
    )
    result = bare.install("dev", PATH=str(bare.bin), LIBATOMIC_STATUS="1")
    assert result.returncode == 0, result.stderr
    assert (bare.venv / "lib" / "libatomic.so.1").read_text() == "library\n"
    assert not list(bare.packages.glob("*.pth"))


@on_debian
@pytest.mark.parametrize("asked", ["exit 100", "touch chromium_1_amd64.deb"], ids=["not to be had", "does not run"])
def test_without_chromium_the_tests_of_the_page_are_left_out_and_said_so(bare: Machine, asked: str) -> None:
    bare.lacks("chromium")
    bare.write_debian(asked=asked, unpacked=CHROMIUM)
    result = bare.install("dev", PATH=str(bare.bin), PROGRAM="echo no libany.so.1 >&2; exit 127")
    assert result.returncode == 0, result.stderr
    assert "tests of the page are left out (for them: apt-get install chromium)" in result.stdout
    assert not any((bare.venv / name).exists() for name in ("bin/chromium", "share", "debian"))
    assert f"-r {bare.venv}/dev.txt" in bare.installed()


def test_without_prometheus_the_tests_that_ask_it_are_left_out_and_said_so(bare: Machine) -> None:
    bare.lacks("prometheus", "promtool")
    bare.write_debian(asked="exit 100", unpacked="false")
    result = bare.install("dev", PATH=str(bare.bin))
    assert result.returncode == 0, result.stderr
    assert "apt-get install prometheus" in result.stdout
    assert not (bare.venv / "bin" / "prometheus").exists()


def test_libnuma_that_cannot_be_had_stops_at_once_and_says_what_to_install(machine: Machine) -> None:
    machine.write_debian(asked="exit 100", unpacked="false")
    result = machine.install("cpu", LIBNUMA_STATUS="1")
    assert result.returncode == 1
    assert "apt-get install libnuma1" in result.stderr
    assert machine.installed() == []


@pytest.mark.parametrize("python", ["#!/bin/sh\nexit 1\n", None], ids=["too old", "none"])
def test_without_a_new_enough_python_it_says_what_to_do(machine: Machine, python: str | None) -> None:
    (machine.venv / "bin" / "python").unlink()
    if python is not None:
        machine.write(machine.bin / "old-python", python)
    result = machine.install("cpu", PYTHON="old-python")
    assert result.returncode == 1
    assert "needs Python 3.11 or newer" in result.stderr


def test_python_without_venv_is_named_with_its_debian_package(machine: Machine) -> None:
    (machine.venv / "bin" / "python").unlink()
    machine.write(machine.bin / "bare-python", f'#!/bin/sh\ncase $2 in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    result = machine.install("cpu", PYTHON="bare-python")
    assert result.returncode == 1
    assert "apt-get install python3-venv" in result.stderr


def test_unknown_set_is_refused_with_those_that_exist(machine: Machine) -> None:
    result = machine.install("gpu")
    assert result.returncode == 1
    assert "no set gpu; there are: control-plane cpu cuda dev ray reasoning-gym reward-server smollm2" in result.stderr


def test_script_may_be_run_directly() -> None:
    assert os.access(ROOT / "deploy" / "install.sh", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
