"""A real ``mlflow server`` on loopback, with a SQLite backend, and plain HTTP to ask it."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Jobs of the server's own, which no test asks for, in processes of their own.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}

# Read when MLflow is first imported.
os.environ.update(QUIET)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _processes():
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


class TrackingServer:
    """A server in a folder; it can be killed, and started again on the same data and port."""

    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process = None

    def start(self):
        """Start, unless it runs."""
        if self._process is not None:
            return self
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
            # One that did not start is gone already.
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextmanager
    def without_space(self):
        """The server's processes can write nothing, as if its disk were full."""
        group = [p for p in _processes() if os.getpgid(p) == self._process.pid]
        before = {p: resource.prlimit(p, resource.RLIMIT_FSIZE) for p in group}
        for process, (_, hard) in before.items():
            resource.prlimit(process, resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            for process, limits in before.items():
                resource.prlimit(process, resource.RLIMIT_FSIZE, limits)

    def ask(self, path, **body):
        """POST to the REST API."""
        return self._post(f"api/2.0/mlflow/{path}", body)

    def ask_page(self, path, **body):
        """POST to where the pages of the UI post."""
        return self._post(f"ajax-api/2.0/mlflow/{path}", body)

    def _post(self, path, body):
        request = urllib.request.Request(
            f"{self.uri}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def read(self, path, **query):
        """GET from the REST API."""
        address = f"{self.uri}/api/2.0/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()

    def history(self, run, metric):
        asked = {"run_id": run["info"]["run_id"], "metric_key": metric, "max_results": 5000}
        found = json.loads(self.read("mlflow/metrics/get-history", **asked))["metrics"]
        return sorted(found, key=lambda point: int(point["step"]))

    def files(self, run):
        asked = {"run_id": run["info"]["run_id"]}
        return json.loads(self.read("mlflow/artifacts/list", **asked))["files"]

    def search(self, experiment, where=""):
        found = self.ask("runs/search", experiment_ids=[experiment], filter=where)
        return found.get("runs", [])

    def artifact(self, run, name):
        root = run["info"]["artifact_uri"].partition("mlflow-artifacts:/")[2]
        return self.read(f"mlflow-artifacts/artifacts/{root}/{name}")
