"""A proxy that reaches nobody, as a company's proxy cannot reach a user's own machine."""

from __future__ import annotations

import socketserver
import threading


class RefusingProxy:
    """`with RefusingProxy() as proxy:`; it answers every request with HTTP 503 and notes it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """First lines of the requests."""
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                proxy.asked.append(self.rfile.readline().decode().strip())
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> RefusingProxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environ(self) -> dict[str, str]:
        """Variables that send everything to this proxy."""
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {"http_proxy": url, "https_proxy": url, "no_proxy": "", "NO_PROXY": ""}
