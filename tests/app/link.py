"""A link between the page and a server that can be cut in the middle of an answer and mended."""

import contextlib
import socket
import threading


class Link:
    """Forwards TCP from `port` to the server at `to` until it is cut; cutting closes all connections and refuses new ones."""

    def __init__(self, port: int, to: int):
        self.url, self.to = f"http://127.0.0.1:{port}", to
        self._port, self._sockets, self._listener = port, set(), None
        self.mend()

    def mend(self, to: int | None = None) -> None:
        self.to = to or self.to
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.to))
                except OSError:
                    near.close()
                    continue
                self._sockets |= {near, far}
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
