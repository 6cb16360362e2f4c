"""Servers in processes of their own: started, waited for, and gone with everything that they started."""

import os
import subprocess
import sys
import time

import pytest

from sgl_bdlora.server_process import ServerProcess, StartFailed, free_port

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.SimpleHTTPRequestHandler.do_GET = lambda self: (self.send_response(int(sys.argv[2])), self.end_headers())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
SLOW_TO_END = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def server(folder, code: str = SERVER, status: int = 200, patience: float = 20, **more) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-c", code, str(port), str(status)]
    return ServerProcess(command, {}, f"http://127.0.0.1:{port}", folder / "server.log", patience, **more)


def child_of(folder) -> int:
    return int((folder / "server.log").read_text().split("child ")[1].split()[0])


def gone(pid: int) -> bool:
    """An ended process whose parent has not asked for its code is gone too."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_it_answers_inside_the_block_and_is_gone_after_it_with_its_children(tmp_path):
    with server(tmp_path) as running:
        assert running.ended() is None
        assert os.getpgid(child_of(tmp_path)) == running.pid
    assert running.ended() is not None
    assert gone(child_of(tmp_path))


def test_who_waits_is_shown_the_seconds_and_the_last_line_of_the_log(tmp_path):
    shown = []
    running = server(tmp_path, "import time; print('reading weights\\n\\n', flush=True); time.sleep(1)\n" + SERVER)
    running.start()
    try:
        running.wait(lambda seconds, line: shown.append((seconds, line)))
    finally:
        running.stop()
    seconds, lines = zip(*shown, strict=True)
    assert list(seconds) == sorted(seconds)
    assert "reading weights" in lines


def test_a_server_that_ends_says_why_and_leaves_nothing(tmp_path):
    code = SERVER.replace("http.server.HTTPServer", "sys.exit('error: no such option')\nhttp.server.HTTPServer")
    with pytest.raises(StartFailed, match=r"(?s)ended with code 1 .*server\.log\n.*error: no such option\n--- change"):
        server(tmp_path, code).__enter__()
    assert gone(child_of(tmp_path))


def test_a_server_that_is_never_well_is_ended_in_time(tmp_path):
    with pytest.raises(StartFailed, match=r"(?s)not ready after 2 s\. The end of its log:\n.*more time"):
        server(tmp_path, status=503, patience=2).__enter__()
    assert gone(child_of(tmp_path))


def test_a_server_that_does_not_end_when_told_is_killed(tmp_path, monkeypatch):
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout: wait(self, min(timeout, 1)))
    with server(tmp_path, SLOW_TO_END + SERVER) as running:
        pass
    assert running.ended() == -9
    assert gone(child_of(tmp_path))
