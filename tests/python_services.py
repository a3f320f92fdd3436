"""A web service as people write them in Python: ``python_services.py (aiohttp | uvicorn) DESCRIPTOR``.

It serves on the listening socket that it has inherited. ``/fields`` answers with the request's fields, a
line each, once the whole body was read; ``/stream`` with a few parts that come one by one, and ``/cut``
likewise, but it fails before the last. Runs as a process of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

PARTS = (b"one,", b"two," * 20_000, b"three")


async def parts(path: str) -> AsyncIterator[bytes]:
    """What ``/stream`` and ``/cut`` answer."""
    for part in PARTS:
        if path == "/cut" and part is PARTS[-1]:
            raise RuntimeError("half of it must do")
        yield part
        await asyncio.sleep(0)


def serve_aiohttp(listener: socket.socket) -> None:
    from aiohttp import web

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        if request.path == "/fields":
            return web.Response(text="".join(f"{name}: {value}\n" for name, value in request.headers.items()))
        response = web.StreamResponse()
        if request.version >= (1, 1):
            response.enable_chunked_encoding()
        await response.prepare(request)
        async for part in parts(request.path):
            await response.write(part)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    web.run_app(app, sock=listener, print=None)


def serve_uvicorn(listener: socket.socket) -> None:
    import uvicorn

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/fields":
            lines = b"".join(b"%b: %b\n" % (name, value) for name, value in scope["headers"])
            await send({"type": "http.response.start", "status": 200,
                        "headers": [(b"content-length", b"%d" % len(lines))]})  # fmt: skip
            await send({"type": "http.response.body", "body": lines})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for part in parts(scope["path"]):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http="httptools", lifespan="off", log_level="critical")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    {"aiohttp": serve_aiohttp, "uvicorn": serve_uvicorn}[sys.argv[1]](socket.socket(fileno=int(sys.argv[2])))
