"""The control API of an intermediate client: how far it is, and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from farpage import __version__
from farpage.api.errors import create_app
from farpage.api.framework import FastAPI, Response
from farpage.intermediary.model import IntermediaryStatus
from farpage.intermediary.service import Intermediary


def make_app(intermediary: Intermediary) -> FastAPI:
    """Make the application; what it tells may be read from any thread."""
    app = create_app(f"farpage intermediate client of {intermediary.route.client}", __version__)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_IntermediaryCollector(intermediary))

    @app.get("/v1/status")
    async def status() -> IntermediaryStatus:
        """Say how far the move is."""
        return intermediary.status()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


_GAUGES = {
    "present_bytes": "Bytes that the target has",
    "total_bytes": "Size of the volume",
    "rate_bytes": "Bytes copied in a second, lately",
    "relayed_connections": "Connections that are relayed",
    "relayed_in_flight": "Relayed commands in flight",
}
_COUNTERS = {
    "read_bytes": "Bytes read at the source to be copied",
    "written_bytes": "Bytes of those that were given to the target",
    "zeroed_bytes": "Bytes of holes, which were not transferred",
    "relayed_reads": "Read commands of the client relayed",
    "relayed_writes": "Write commands of the client relayed",
}


@dataclass(frozen=True)
class _IntermediaryCollector(Collector):
    intermediary: Intermediary

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        status = self.intermediary.status()
        labels, values = ["client"], [status.client]
        for field, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"farpage_intermediary_{field}", text, labels=labels)
            gauge.add_metric(values, getattr(status, field))
            yield gauge
        for field, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"farpage_intermediary_{field}", text, labels=labels)
            counter.add_metric(values, getattr(status, field))
            yield counter
        problem = GaugeMetricFamily(
            "farpage_intermediary_problem", "1 while something keeps it from going on", labels=labels
        )
        problem.add_metric(values, bool(status.problem))
        yield problem
