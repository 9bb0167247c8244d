"""A real ``mlflow server`` on loopback, with a SQLite backend, and plain HTTP to ask it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Jobs of the server's own, which no test asks for, in processes of their own.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class TrackingServer:
    """A server in a folder; it can be killed, and started again on the same data and port."""

    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/runs.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("a") as log:
            # A session of its own, so that the workers end with it.
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **QUIET},
            )
        self._await()
        return self

    def _await(self, seconds=120):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError((self.folder / "log").read_text())

    def signal(self, number):
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self):
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ask(self, path, **body):
        """POST to the REST API."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def read(self, path):
        """GET from the REST API."""
        with urllib.request.urlopen(f"{self.uri}/api/2.0/{path}", timeout=30) as answer:
            return answer.read()

    def search(self, experiment, where=""):
        found = self.ask("runs/search", experiment_ids=[experiment], filter=where)
        return found.get("runs", [])

    def artifact(self, run, name):
        root = run["info"]["artifact_uri"].partition("mlflow-artifacts:/")[2]
        return self.read(f"mlflow-artifacts/artifacts/{root}/{name}")
