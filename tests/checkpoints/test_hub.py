"""Loading from the hub, played by a small server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import GOLDEN, copy_of, write_tensors
from safetensors.torch import load_file

pytestmark = pytest.mark.once

REPO = "smcleish/Recurrent-Llama-3.2-train-recurrence-4"
MAIN, TAG = "a" * 40, "b" * 40
COMMITS = {"main": MAIN, "v2": TAG, MAIN: MAIN, TAG: TAG}
CLIENT = """
import json, sys, torch
from tl_looped import LoopedTransformer, TLLoopedError
out = {}
for label, name, revision in json.loads(sys.argv[1]):
    try:
        model = LoopedTransformer.from_pretrained(name, device="cpu", revision=revision)
        out[label] = {"R": model.loop.R, "W_E": model.W_E[:2].tolist()}
    except TLLoopedError as error:
        out[label] = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(out))
"""
LOADS = [
    ("alias", "recurrent-llama-3.2-r4", None),
    ("tag", REPO, "v2"),
    ("no revision", REPO, "v9"),
    ("no repository", "nobody/nothing", None),
]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download of one repository needs."""

    files: dict[str, dict[str, bytes]]
    seen: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.seen.append((self.command, path, self.headers["Authorization"]))
        for prefix in (f"/api/models/{REPO}/revision/", f"/api/models/{REPO}/tree/"):
            if path.startswith(prefix):
                commit = COMMITS.get(path.removeprefix(prefix))
                return self.answer(self.listing(commit, "/tree/" in prefix) if commit else None)
        if path.startswith(f"/{REPO}/resolve/"):
            revision, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
            return self.answer(self.files[COMMITS[revision]][name], COMMITS[revision])
        return self.answer(None, error="RepoNotFound")

    def listing(self, commit: str, tree: bool) -> bytes:
        files = self.files[commit]
        if not tree:
            names = [{"rfilename": name} for name in files]
            return json.dumps({"id": REPO, "sha": commit, "siblings": names}).encode()
        entries = [
            {"type": "file", "path": name, "size": len(body), "oid": sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        return json.dumps(entries).encode()

    def answer(self, body: bytes | None, commit: str = "", error: str = "RevisionNotFound") -> None:
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha1(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any]]:
    """What a client with an empty cache got, and the requests that it made."""
    tmp = tmp_path_factory.mktemp("hub")
    folder = copy_of("retrofit_llama", tmp / "main")
    other = copy_of("retrofit_llama", tmp / "v2")
    tensors = load_file(other / "model.safetensors")
    write_tensors(other, tensors | {"transformer.wte.weight": torch.ones(97, 64)})
    evil = {"pytorch_model.bin": b"pickle", "raven_modeling_minimal.py": b"1 / 0"}
    Hub.files = {
        commit: evil | {p.name: p.read_bytes() for p in where.iterdir()}
        for commit, where in ((MAIN, folder), (TAG, other))
    }
    Hub.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CLIENT, json.dumps(LOADS)],
            env=env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), Hub.seen


@pytest.mark.full
def test_hub_alias_loads_the_main_branch_at_its_recurrences(hub: Any) -> None:
    loaded, _ = hub
    stored = load_file(GOLDEN / "retrofit_llama" / "model.safetensors")["transformer.wte.weight"]
    assert loaded["alias"] == {"R": 4, "W_E": stored[:2].tolist()}


def test_hub_revision_is_respected(hub: Any) -> None:
    loaded, _ = hub
    assert loaded["tag"] == {"R": 5, "W_E": [[1.0] * 64] * 2}


def test_hub_files_are_only_config_and_safetensors(hub: Any) -> None:
    _, seen = hub
    fetched = {path.rsplit("/", 1)[1] for _, path, _ in seen if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


def test_hub_token_is_sent_with_every_request_for_the_repository(hub: Any) -> None:
    _, seen = hub
    of_repo = [(verb, token) for verb, path, token in seen if REPO in path]
    assert {token for _, token in of_repo} == {"Bearer hf_secret"}
    assert ("GET", "Bearer hf_secret") in of_repo


@pytest.mark.parametrize(
    ("label", "parts"),
    [("no revision", [REPO, "v9"]), ("no repository", ["'nobody/nothing'", "revision main"])],
)
def test_hub_refusal_is_a_checkpoint_error(hub: Any, label: str, parts: list[str]) -> None:
    loaded, _ = hub
    assert loaded[label]["error"] == "CheckpointError"
    assert all(part in loaded[label]["message"] for part in [*parts, "HF_TOKEN"])
