"""A client process that is there to be killed: opens many requests at once and says on stdout how far each of them is.

Reads {"address": [host, port], "bodies": [...]} from stdin. Its lines: "piece N", "done N" and "refused N <status> <text>", where N is the
body's index. Standard library only: it has to be asking within a tenth of a second.
"""

import http.client
import json
import os
import sys
import threading


def say(line: str) -> None:
    os.write(1, (" ".join(line.split()) + "\n").encode())


def ask(number: int, address: list, body: dict) -> None:
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        say(f"refused {number} {response.status} {response.read().decode(errors='replace')}")
        return
    for line in response:
        if line.strip():
            say(f"refused {number} 200 {line.decode()}" if b'"error"' in line else f"piece {number}")
    say(f"done {number}")


def main() -> None:
    work = json.load(sys.stdin)
    threads = [
        threading.Thread(target=ask, args=(i, work["address"], body), daemon=True)
        for i, body in enumerate(work["bodies"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
