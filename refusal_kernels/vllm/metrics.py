"""The monitor's histogram, among the metrics of vLLM's own server.

The workers count on the device, and are asked when somebody scrapes: a step waits for nothing.
"""

from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.frontend import MONITOR, catalog_of, first_answer

PATH = "/metrics"
NAME = "refusal_kernels:direction_share"
ABOUT = "Component of each token along the direction, as a share of its length."


def export(app: Any, *_: Any) -> None:
    """Let vLLM's ``/metrics`` show the monitor too: what follows its own ``attach_router(app)``."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    async def scrape(request: Request) -> Response:
        text = generate_latest(get_prometheus_registry())
        engine = request.app.state.engine_client
        try:
            catalog = catalog_of(engine)
            found = first_answer(catalog, await engine.collective_rpc(MONITOR))
            text += generate_latest(Snapshot(found, catalog.monitor))
        except (EngineDeadError, InputError):
            pass  # what vLLM says of itself is wanted all the same
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    app.router.routes.insert(0, Route(PATH, scrape, include_in_schema=False))


class Snapshot:
    """What `Histogram.read` returned, for ``prometheus_client.generate_latest``."""

    def __init__(self, found: dict[str, Any], monitor: Any) -> None:
        self.found, self.monitor = found, monitor

    def collect(self) -> list[Any]:
        """Return the metrics: one."""
        from prometheus_client.core import Metric

        # by hand: HistogramMetricFamily leaves out the count and the sum where an edge is negative
        family = Metric(NAME, ABOUT, "histogram")
        labels = {"direction": self.monitor.direction, "layer": str(self.monitor.layer)}
        below = 0
        for edge, count in zip(self.found["edges"], self.found["counts"], strict=True):
            below += count
            family.add_sample(f"{NAME}_bucket", {**labels, "le": str(edge)}, below)
        family.add_sample(f"{NAME}_bucket", {**labels, "le": "+Inf"}, below)
        family.add_sample(f"{NAME}_count", labels, below)
        family.add_sample(f"{NAME}_sum", labels, self.found["sum"])
        return [family]
