"""What `helm test` runs in a release, run here against an API that is not ready at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart

from services.contracts.messages import Role
from services.contracts.views import FleetView, MemberView

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "t" * 32
WITHOUT_TRAINER = [role for role in Role if role is not Role.TRAINER]


def program(kind: str) -> str:
    with Chart.load(ROOT / "deploy" / "helm" / "offbeat") as chart:
        rendered = chart.render({"existingSecret": "offbeat", "trainer": {"kind": kind}}, name="demo", namespace="rl")
    text: str = yaml.safe_load(rendered["offbeat/templates/tests/api.yaml"])["spec"]["containers"][0]["args"][0]
    return text


def fleet(roles: list[Role]) -> bytes:
    nothing = dict.fromkeys(("assigned", "run_id", "version"))
    common: dict[str, Any] = {
        "url": "",
        "pid": 1,
        "host": "",
        "ready": True,
        "detail": "",
        "idle_seconds": 0,
        "started_at": 0,
        "beat_at": 0,
        **nothing,
    }
    return FleetView(members=[MemberView(member_id=role.value, role=role, **common) for role in roles]).model_dump_json().encode()


@contextmanager
def api(answers: list[list[Role]], *, lets_in_anyone: bool = False) -> Iterator[str]:
    """One list of roles for each question that is asked; the last one for ever."""

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = lets_in_anyone or self.headers["Authorization"] == f"Bearer {TOKEN}"
            body = fleet(answers[0] if len(answers) == 1 else answers.pop(0)) if known else b'{"title": "no", "status": 401}'
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def outcome(kind: str, url: str, folder: Path, *, patience: str = "240") -> subprocess.CompletedProcess[str]:
    (folder / "token").write_text(TOKEN + "\n")
    text = program(kind).replace("http://demo-offbeat-control-plane:8700", url).replace("/run/secrets/offbeat", str(folder))
    text = text.replace("monotonic() + 240", f"monotonic() + {patience}").replace("sleep(2)", "sleep(0.05)")
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ}, check=False)


def test_it_waits_until_every_kind_of_process_is_there(tmp_path: Path) -> None:
    with api([[], [Role.CONTROL_PLANE], WITHOUT_TRAINER, [*Role]]) as url:
        done = outcome("replicas", url, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_trainers_that_are_jobs_are_not_waited_for(tmp_path: Path) -> None:
    with api([WITHOUT_TRAINER]) as url:
        assert outcome("jobs", url, tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["replicas", "ray"])
def test_it_says_who_is_missing(kind: str, tmp_path: Path) -> None:
    with api([WITHOUT_TRAINER]) as url:
        done = outcome(kind, url, tmp_path, patience="0")
    assert done.returncode == 1
    assert "not there: ['trainer']" in done.stderr


def test_it_fails_where_nobody_answers_and_where_anybody_is_let_in(tmp_path: Path) -> None:
    with api([[*Role]], lets_in_anyone=True) as url:
        let_in = outcome("replicas", url, tmp_path)
    nobody = outcome("replicas", url, tmp_path, patience="0")
    assert (let_in.returncode, nobody.returncode) == (1, 1)
    assert "a wrong token was let in" in let_in.stderr
    assert "not there" in nobody.stderr
