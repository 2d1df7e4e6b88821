"""What `GET /metrics` tells Prometheus, read from the living objects when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from farpage.device.errors import DeviceUnusable
from farpage.vios.figures import Figures, ViosState
from farpage.vios.volumes import Volumes

CONTENT_TYPE = CONTENT_TYPE_LATEST

_COUNTERS = {
    "reads": "Read commands answered",
    "writes": "Write commands answered",
    "others": "Zero, trim, flush, cache and block status commands answered",
    "read_bytes": "Bytes read",
    "written_bytes": "Bytes written",
    "errors": "Commands answered with an error",
}


_COPY_GAUGES = {
    "present_bytes": "Bytes that the new device has",
    "total_bytes": "Size of the volume",
    "relay_connected": "1 while there is a way to the old device",
    "waiting_commands": "Client's commands that wait for that way",
}

_COPY_COUNTERS = {
    "relayed_reads": "Reads answered by the old device",
    "kept_pages": "Relayed pages that were kept",
    "filled_pages": "Pages that were copied",
}


@dataclass(frozen=True, eq=False)
class ViosCollector(Collector):
    """Collects the state of one VIOS; safe to use from any thread."""

    volumes: Volumes
    state: ViosState

    @property
    def figures(self) -> Figures:
        """What is counted, over all processes."""
        return self.state.figures

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        yield from self._devices()
        yield from self._commands()
        yield from self._copies()
        yield GaugeMetricFamily(
            "farpage_vios_definition_revision",
            "Revision of the definition that is stored",
            value=self.state.definition_revision,
        )
        yield GaugeMetricFamily(
            "farpage_vios_open_exports",
            "Connections that have a volume open",
            value=self.figures.open_exports,
        )
        yield GaugeMetricFamily(
            "farpage_vios_leases",
            "Leases that are kept, one by each data worker of a hypervisor",
            value=self.state.leases,
        )
        yield GaugeMetricFamily(
            "farpage_vios_data_processes",
            "Data processes that serve volumes; 0 where the VIOS serves them by itself",
            value=self.state.processes,
        )
        yield CounterMetricFamily(
            "farpage_vios_data_process_restarts",
            "Data processes that were started in the place of one that had ended",
            value=self.state.restarts,
        )
        yield CounterMetricFamily(
            "farpage_vios_opens_refused", "Opens that were refused", value=self.figures.refused
        )
        yield CounterMetricFamily(
            "farpage_vios_connections_fenced",
            "Connections cut off by a newer owner",
            value=self.figures.fenced,
        )

    def _devices(self) -> Iterator[Metric]:
        size = GaugeMetricFamily("farpage_device_size_bytes", "Size of the device", labels=["device"])
        provisioned = GaugeMetricFamily(
            "farpage_device_provisioned_bytes", "Bytes promised to volumes", labels=["device"]
        )
        used = GaugeMetricFamily("farpage_device_used_bytes", "Bytes that volumes occupy", labels=["device"])
        usable = GaugeMetricFamily("farpage_device_usable", "1 while the device answers", labels=["device"])
        reconnects = CounterMetricFamily(
            "farpage_device_reconnects", "Connections to a remote device made anew", labels=["device"]
        )
        for device in self.volumes.devices:
            size.add_metric([device.name], device.size_bytes)
            reconnects.add_metric([device.name], device.reconnects)
            try:
                usage = device.usage()
            except DeviceUnusable:
                usable.add_metric([device.name], 0)
                continue
            usable.add_metric([device.name], 1)
            provisioned.add_metric([device.name], usage.provisioned_bytes)
            used.add_metric([device.name], usage.used_bytes)
        yield from (size, provisioned, used, usable, reconnects)

    def _commands(self) -> Iterator[Metric]:
        counted = sorted(self.figures.counters.items())
        for attribute, help_text in _COUNTERS.items():
            family = CounterMetricFamily(f"farpage_volume_{attribute}", help_text, labels=["volume"])
            for volume, counters in counted:
                family.add_metric([volume], getattr(counters, attribute))
            yield family
        in_flight = GaugeMetricFamily("farpage_volume_in_flight", "Commands in flight", labels=["volume"])
        for volume, counters in counted:
            in_flight.add_metric([volume], counters.in_flight)
        yield in_flight

    def _copies(self) -> Iterator[Metric]:
        """Yield what there is to say of the volumes that are copied to devices of this VIOS."""
        for kind, described in ((GaugeMetricFamily, _COPY_GAUGES), (CounterMetricFamily, _COPY_COUNTERS)):
            for attribute, help_text in described.items():
                family = kind(f"farpage_copying_{attribute}", help_text, labels=["volume"])
                for copy in self.figures.copies:
                    family.add_metric([copy.volume], getattr(copy, attribute))
                yield family


def render(volumes: Volumes, state: ViosState) -> bytes:
    """Return the text of one scrape; safe to call from any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ViosCollector(volumes, state))
    return generate_latest(registry)
