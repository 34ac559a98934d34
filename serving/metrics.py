"""What happens to requests, for Prometheus: vLLM's names, with our prefix."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the classes that times are counted in."""

REGISTRY = CollectorRegistry()
"""Of this server alone: nothing about the process it runs in."""

LABEL = ("model_name",)
RUNNING = Gauge("tinygpt:num_requests_running", "Texts being made", LABEL, registry=REGISTRY)
WAITING = Gauge("tinygpt:num_requests_waiting", "Texts that wait", LABEL, registry=REGISTRY)
COMPILED = Gauge(
    "tinygpt:compiled_parts", "Parts of the engine that run compiled", LABEL, registry=REGISTRY
)
READ = Counter("tinygpt:prompt_tokens", "Tokens of prompts", LABEL, registry=REGISTRY)
WRITTEN = Counter("tinygpt:generation_tokens", "Tokens of texts", LABEL, registry=REGISTRY)
ENDED = Counter(
    "tinygpt:request_success",
    "Texts that have ended, by why",
    (*LABEL, "finished_reason"),
    registry=REGISTRY,
)
REFUSED = Counter(
    "tinygpt:requests_refused", "Requests for which there was no place", LABEL, registry=REGISTRY
)


def _times(name: str, about: str) -> Histogram:
    return Histogram(f"tinygpt:{name}_seconds", about, LABEL, registry=REGISTRY, buckets=SECONDS)


FIRST = _times("time_to_first_token", "From a request's arrival to a text's first token")
BETWEEN = _times("inter_token_latency", "Between two tokens of a text")
WHOLE = _times("e2e_request_latency", "From a request's arrival to a text's end")
QUEUED = _times("request_queue_time", "From a request's arrival to the beginning of its prompt")


class Metrics:
    """Those of one model. Times are `time.perf_counter()`'s."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.running, self.waiting = RUNNING.labels(model), WAITING.labels(model)
        self.read, self.written = READ.labels(model), WRITTEN.labels(model)
        self.refused = REFUSED.labels(model)
        self.first, self.between = FIRST.labels(model), BETWEEN.labels(model)
        self.whole, self.queued = WHOLE.labels(model), QUEUED.labels(model)

    def watch(
        self, running: Callable[[], int], waiting: Callable[[], int], compiled: Callable[[], int]
    ) -> None:
        """Ask these whenever somebody looks."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)
        COMPILED.labels(self.model).set_function(compiled)

    def arrived(self, tokens: int) -> None:
        """A request with a prompt of so many tokens."""
        self.read.inc(tokens)

    def token(self, arrived: float, before: float | None, now: float) -> None:
        """A text's token, its first if there is none before."""
        self.written.inc()
        if before is None:
            self.first.observe(now - arrived)
        else:
            self.between.observe(now - before)

    def ended(self, finish: str, arrived: float, began: float, now: float) -> None:
        """A text's end."""
        ENDED.labels(self.model, finish).inc()
        self.whole.observe(now - arrived)
        self.queued.observe(began - arrived)


def exposition() -> bytes:
    """All of it, in Prometheus' text format."""
    return generate_latest(REGISTRY)
