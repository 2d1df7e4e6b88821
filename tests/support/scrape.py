"""Metrics as a Prometheus server reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from farpage.api.client import ControlClient


class Scrape:
    """The samples of one scrape of a daemon's `GET /metrics`."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    @classmethod
    async def of(cls, control: str) -> Scrape:
        """Scrape the daemon at a control address."""
        async with ControlClient(control) as client:
            return cls((await client.request("GET", "/metrics")).decode())

    def value(self, name: str, **labels: str) -> float:
        """Return a sample; 0 for one that is not there yet."""
        return self._samples.get((name, frozenset(labels.items())), 0.0)
