"""A server of this machine: its socket, who reaches it, and uvicorn that answers on it."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # what a request to this machine calls it


@contextmanager
def listening(host: str, ports: Sequence[int]) -> Iterator[socket.socket]:
    """A socket that listens on the first free port.

    Args:
        host: the address.
        ports: tried in turn; 0 is any free one.

    Raises:
        OSError: all ports are in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in ports:
        try:
            listener = socket.create_server((host, number), family=family)
        except OSError as error:
            if number == ports[-1]:
                reason = error.strerror or str(error)
                raise OSError(f"{host}, port {number}: {reason}; --port takes another") from error
            continue
        with listener:
            yield listener
        return


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def address(listener: socket.socket) -> str:
    """The address to open in a browser."""
    host, port, *_ = listener.getsockname()
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    name, _, port = header.rpartition(":")
    return (name if port.isdecimal() else header).lower()


def uvicorn_server(
    app: Any, listener: socket.socket, ready: Callable[[str], None], graceful_seconds: int
) -> Any:
    """A `uvicorn.Server` of an application, to be run with the socket.

    Args:
        app: the application, by ASGI.
        listener: its socket.
        ready: called with its address when it answers.
        graceful_seconds: that requests in flight have when the server is to end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(address(listener))

    return Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=graceful_seconds,
        )
    )
