"""A server of this machine: its socket, who reaches it, and uvicorn that answers on it."""

import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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
    """Whether a host is this machine as it alone reaches it: localhost or a loopback address.

    Any other name is not, wherever it leads: a page elsewhere can have one that leads here.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(listener: socket.socket) -> str:
    """The address to open in a browser."""
    host, port, *_ = listener.getsockname()
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def host_of(header: str) -> str:
    """The name or address in a Host header, without its port and the brackets of IPv6."""
    name, _, port = header.rpartition(":")
    name = (name if port.isdecimal() else header).lower()
    return name[1:-1] if name[:1] + name[-1:] == "[]" else name


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
