"""Small pieces of data: WebSocket messages to and fro, and a stream of small chunks."""

from __future__ import annotations

from ..loads.curl import Curl
from ..loads.outcome import Outcome
from ..processes import BenchmarkError
from ..services import CHUNK, ECHO
from ..tools import MessagesResult, websocket_load
from .base import ANCHORS, HEAVY, Scenario, Stage, counted_cpu
from .requests import PER

PAYLOAD = 100  # bytes of a message
MILLION = 1_000_000


class WebSockets(Scenario):
    """Each socket sends a message and waits for its echo before it sends the next."""

    services = (ECHO,)
    groups = ("websocket", "messages")
    needs_tools = True
    absent = ANCHORS | HEAVY
    seconds = 2
    overhead = 0.8
    WARM = 0.3  # seconds

    def __init__(self, sockets: int) -> None:
        self.sockets = sockets
        self.name = f"websocket-{sockets}"

    def warm_up(self, stage: Stage) -> None:
        self._load(stage, self.WARM)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        with counted_cpu(stage.running) as cpu:
            result = self._load(stage, stage.seconds)
        outcome.count(result.attempts, result.failures, result.reason or "lost messages")
        if result.rate:
            outcome.values[self.name] = result.rate
            outcome.values[f"{self.name}-p50"] = result.p50_ms
            outcome.values[f"{self.name}-p99"] = result.p99_ms
            outcome.values[f"{self.name}-cpu"] = cpu.seconds / (result.rate * stage.seconds) * PER
        return outcome

    def _load(self, stage: Stage, seconds: float) -> MessagesResult:
        if stage.tools is None:
            raise BenchmarkError("no WebSocket load generator")
        endpoint = stage.running.endpoints[ECHO]
        return websocket_load(
            stage.ground.workspace,
            stage.tools,
            endpoint.host,
            endpoint.port,
            sockets=self.sockets,
            seconds=seconds,
            payload=PAYLOAD,
        )


class Chunks(Scenario):
    """An answer in chunks of 100 bytes, each written by itself, fetched by curl one after another."""

    name = "chunks"
    services = (ECHO,)
    groups = ("messages",)
    programs = ("curl",)
    needs_tools = True
    absent = ANCHORS | HEAVY
    seconds = 2
    overhead = 0.7
    WARM = 0.3  # seconds

    def warm_up(self, stage: Stage) -> None:
        Curl(stage.running.endpoints[ECHO], "chunks", self.WARM).result(Outcome())

    def run(self, stage: Stage) -> Outcome:
        outcome, chunks, took = Outcome(), 0.0, 0.0
        with counted_cpu(stage.running) as cpu:
            while (left := stage.seconds - took) > 0.2 and not outcome.failures:
                transfer = Curl(stage.running.endpoints[ECHO], "chunks", left).result(outcome)
                if transfer:
                    chunks, took = chunks + transfer.bytes / CHUNK, took + transfer.seconds
        if chunks:
            outcome.values["chunks"] = chunks / took
            if not outcome.failures:
                outcome.values["chunks-cpu"] = cpu.seconds / chunks * MILLION
        return outcome
