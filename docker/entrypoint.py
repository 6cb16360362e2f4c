"""What a container of ours runs: `server ARGS`, `page ARGS`, `prepare [--demo-model]` or `healthy URL`.

Keys come from files, so that neither the process list nor the log shows them:

    BDLORA_API_KEY_FILE     for requests; `server` asks for it, `page` sends it
    BDLORA_ADMIN_KEY_FILE   for loading and unloading; the same
    BDLORA_APP_AUTH_FILE    USER:PASSWORD,... that `page` asks its readers for
    BDLORA_SERVER_ARGS      more arguments for `server`, as on a command line
"""

import argparse
import logging
import os
import secrets
import shlex
import sys
import urllib.error
import urllib.request
from pathlib import Path

# What `prepare` makes where it is missing. Grafana's reader is another user, and only its container mounts that folder.
SECRETS = {
    Path("/secrets/server/api_key"): 0o400,
    Path("/secrets/server/admin_key"): 0o400,
    Path("/secrets/grafana/admin_password"): 0o444,
}


def server(argv: list[str]) -> None:
    from sgl_bdlora import launch_server

    argv = argv + shlex.split(os.environ.get("BDLORA_SERVER_ARGS", ""))
    for flag, variable in (("--api-key", "BDLORA_API_KEY_FILE"), ("--admin-api-key", "BDLORA_ADMIN_KEY_FILE")):
        key = read_secret(variable)
        if key:
            hide_in_logs(key)
            argv += [flag, key]
    launch_server.main(argv)


def page(argv: list[str]) -> int:
    for name in ("BDLORA_API_KEY", "BDLORA_ADMIN_KEY", "BDLORA_APP_AUTH"):
        secret = read_secret(f"{name}_FILE")
        if secret:
            os.environ[name] = secret
    from app.__main__ import main

    return main(argv)


def prepare(argv: list[str]) -> None:
    """Make random secrets and fetch the demo model, both only where they are missing."""
    parser = argparse.ArgumentParser(prog="prepare")
    parser.add_argument("--demo-model", action="store_true", help="fetch the demo model into $BDLORA_CACHE")
    args = parser.parse_args(argv)
    for path, mode in SECRETS.items():
        if path.parent.is_dir() and not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            partial.write_text(secrets.token_urlsafe(32))
            partial.chmod(mode)
            partial.rename(path)
            print(f"made {path}", flush=True)
    if args.demo_model:
        from sgl_bdlora.demo_model import ensure_demo_model

        print(f"the demo model is in {ensure_demo_model()}", flush=True)


def healthy(argv: list[str]) -> int:
    try:
        with urllib.request.urlopen(argv[0], timeout=20):
            return 0
    except (urllib.error.URLError, OSError) as error:
        # A page with a password answers 401 and is well.
        if getattr(error, "code", None) == 401:
            return 0
        print(error, file=sys.stderr)
        return 1


def read_secret(variable: str) -> str | None:
    """The text of the file that the variable names; None without the variable. A file that is missing or empty ends the process."""
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        text = Path(path).read_text().strip()
    except OSError as error:
        raise SystemExit(f"{variable}: cannot read {path}: {error.strerror}") from error
    if not text:
        raise SystemExit(f"{variable}: {path} is empty")
    return text


def hide_in_logs(secret: str) -> None:
    """SGLang logs all its arguments at start, keys among them (entrypoints/engine.py: `server_args=`)."""
    make = logging.getLogRecordFactory()

    def record(*args, **kwargs) -> logging.LogRecord:
        made = make(*args, **kwargs)
        text = made.getMessage()
        if secret in text:
            made.msg, made.args = text.replace(secret, "***"), ()
        return made

    logging.setLogRecordFactory(record)


COMMANDS = {"server": server, "page": page, "prepare": prepare, "healthy": healthy}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"the first argument has to be one of {', '.join(COMMANDS)}")
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
