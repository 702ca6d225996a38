"""The monitor's histogram, among the metrics of vLLM's own server.

The workers count on the device; they are asked when the metrics are read, so no step waits.
"""

import logging
from typing import Any

from refusal_kernels.vllm.frontend import catalog_of, first_answer
from refusal_kernels.vllm.names import MONITOR

logger = logging.getLogger("vllm.refusal_kernels")  # so that vLLM's handlers print it
PATH = "/metrics"
NAME = "refusal_kernels:direction_share"
ABOUT = "Component of each token along the direction, as a share of its length."


def export(app: Any) -> None:
    """Serve vLLM's ``/metrics`` with the monitor's histogram."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    async def scrape(request: Request) -> Response:
        text = generate_latest(get_prometheus_registry())
        engine = request.app.state.engine_client
        try:
            catalog = catalog_of(engine)
            counts = first_answer(catalog, await engine.collective_rpc(MONITOR))
            text += generate_latest(Snapshot(counts, catalog.settings.monitor))
        except Exception:  # a dead engine, one that is shutting down
            logger.debug("the monitor is not read", exc_info=True)  # vLLM's metrics are served
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    app.router.routes.insert(0, Route(PATH, scrape, include_in_schema=False))


class Snapshot:
    """A result of `Histogram.read`, for ``prometheus_client.generate_latest``."""

    def __init__(self, histogram: dict[str, Any], monitor: Any) -> None:
        self.histogram, self.monitor = histogram, monitor

    def collect(self) -> list[Any]:
        """Return one metric."""
        from prometheus_client.core import Metric

        # HistogramMetricFamily leaves out the count and the sum where an edge is negative
        family = Metric(NAME, ABOUT, "histogram")
        labels = {"direction": self.monitor.direction, "block_input": str(self.monitor.block_input)}
        below = 0
        for edge, count in zip(self.histogram["edges"], self.histogram["counts"], strict=True):
            below += count
            family.add_sample(f"{NAME}_bucket", {**labels, "le": str(edge)}, below)
        family.add_sample(f"{NAME}_bucket", {**labels, "le": "+Inf"}, below)
        family.add_sample(f"{NAME}_count", labels, below)
        family.add_sample(f"{NAME}_sum", labels, self.histogram["sum"])
        return [family]
