"""Downloads of the Decathlon's tasks, from a server in this process."""

import socket
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest

from nnunet_xattnres.benchmark import fetch
from nnunet_xattnres.cli import main


class RangeHandler(SimpleHTTPRequestHandler):
    """Python's server, with ranges."""

    requests: ClassVar[list] = []

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server that has Task04_Hippocampus.tar, and what it holds."""
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "Task04_Hippocampus.tar").write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(tmp_path / "www")))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(fetch, "MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(fetch.MD5, "Task04_Hippocampus", md5(content).hexdigest())
    monkeypatch.setattr(RangeHandler, "requests", [])
    yield content
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("task", ["Task04_Hippocampus", "4", "04", "Task04"])
def test_a_task_is_fetched(task, mirror, tmp_path, capsys):
    assert main(["benchmark", "fetch", task, "-o", str(tmp_path / "msd")]) == 0
    assert (tmp_path / "msd" / "Task04_Hippocampus.tar").read_bytes() == mirror
    assert "100%" in capsys.readouterr().err
    assert main(["benchmark", "fetch", task, "-o", str(tmp_path / "msd")]) == 0
    assert len(RangeHandler.requests) == 1


@pytest.mark.parametrize("there", [1_000_000, 3_000_000])
def test_an_interrupted_download_is_continued(there, mirror, tmp_path):
    (tmp_path / "Task04_Hippocampus.tar.part").write_bytes(mirror[:there])
    assert main(["benchmark", "fetch", "4", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "Task04_Hippocampus.tar").read_bytes() == mirror
    assert RangeHandler.requests == [f"bytes={there}-"]


def test_a_download_with_another_checksum_is_thrown_away(mirror, tmp_path, capsys):
    (tmp_path / "Task04_Hippocampus.tar.part").write_bytes(b"something else")
    assert main(["benchmark", "fetch", "4", "-o", str(tmp_path)]) == 1
    assert "MD5" in capsys.readouterr().err
    assert not list(tmp_path.glob("Task04*"))


def test_a_folder_that_nothing_can_be_downloaded_to(mirror, capsys):
    assert main(["benchmark", "fetch", "4", "-o", "/dev/null"]) == 1
    assert "choose another -o" in capsys.readouterr().err
    assert RangeHandler.requests == []


def test_an_unknown_task_and_a_mirror_that_is_away(tmp_path, monkeypatch, capsys):
    assert main(["benchmark", "fetch", "Task04_Hipocampus", "-o", str(tmp_path)]) == 1
    assert "did you mean Task04_Hippocampus" in capsys.readouterr().err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(fetch, "MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert main(["benchmark", "fetch", "11", "-o", str(tmp_path)]) == 1
        capsys.readouterr()
        assert main(["benchmark", "fetch", "10", "-o", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "refused" in err
