"""What goes wrong between front and replicas. A module of its own, because Serve copies those of its deployments by value."""

import json


class ReplicaBroken(RuntimeError):
    """The replica cannot answer; another one can. args: (replica, why)."""


def error_body(message: str, kind: str = "invalid_request_error") -> bytes:
    """An error in the OpenAI form, which /generate's clients understand too."""
    return json.dumps({"error": {"message": message, "type": kind}}).encode()
