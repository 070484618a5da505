"""/metrics, /healthz, /readyz and /v1/status on one port, on a thread beside the loop."""

import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitoring.health import Health
from streamkd.errors import ConfigError


class Server:
    """Serves while the `with` block runs.

    Args:
        host: address to listen on.
        port: 0 picks a free one, which `port` then tells.
        registry: for /metrics; another may take its place.
        health: for /healthz and /readyz.
        status: what /v1/status tells, plain values; likewise.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.status = status
        self.registry = registry
        self.health = health
        self._socket = listen(host, port)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        routes = [
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/v1/status", self._status),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)
        self._socket.close()

    async def _metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"content-type": content_type})

    async def _healthz(self, _: Request) -> JSONResponse:
        return _answer(self.health.alive(), self.health.state)

    async def _status(self, _: Request) -> JSONResponse:
        return JSONResponse(self.status())

    async def _readyz(self, _: Request) -> JSONResponse:
        return _answer(self.health.ready(), self.health.state)


def _answer(checks: dict[str, bool], state: str) -> JSONResponse:
    return JSONResponse({"state": state, "checks": checks}, status_code=200 if all(checks.values()) else 503)


def listen(host: str, port: int, *, part: str = "http") -> socket.socket:
    """Take a port.

    Args:
        host: of this machine.
        port: 0 picks a free one.
        part: of the configuration that names them.

    Raises:
        ConfigError: it is taken, or not for this user, or there is no such address here.
    """
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        why, *_ = (error.strerror or str(error)).split(" (while ")  # Python would tell the address once more
        raise ConfigError(
            f"{part}.port = {port}: cannot listen on {shown}:{port}: {why}; choose another with "
            f"--set {part}.port=N (0 picks a free one), or another {part}.host"
        ) from None
