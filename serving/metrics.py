"""Prometheus metrics of requests, named as vLLM's, with the prefix `tinygpt:`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of histogram buckets, in seconds."""

REGISTRY = CollectorRegistry()
"""Metrics of this server only, none of its process."""

LABELS = ("model_name",)
RUNNING = Gauge("tinygpt:num_requests_running", "Running sequences", LABELS, registry=REGISTRY)
WAITING = Gauge("tinygpt:num_requests_waiting", "Waiting sequences", LABELS, registry=REGISTRY)
COMPILED_STEPS = Gauge(
    "tinygpt:compiled_steps", "Kinds of steps that run compiled", LABELS, registry=REGISTRY
)
PROMPT_TOKENS = Counter("tinygpt:prompt_tokens", "Prompt tokens", LABELS, registry=REGISTRY)
GENERATION_TOKENS = Counter(
    "tinygpt:generation_tokens", "Generated tokens", LABELS, registry=REGISTRY
)
FINISHED = Counter(
    "tinygpt:request_success",
    "Finished sequences by finish reason",
    (*LABELS, "finished_reason"),
    registry=REGISTRY,
)
REFUSED = Counter(
    "tinygpt:requests_refused", "Requests refused with 429", LABELS, registry=REGISTRY
)


def _histogram(name: str, documentation: str) -> Histogram:
    return Histogram(
        f"tinygpt:{name}_seconds", documentation, LABELS, registry=REGISTRY, buckets=BUCKETS
    )


TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token", "From a request's arrival to a sequence's first token"
)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency", "Between two consecutive tokens of a sequence"
)
REQUEST_LATENCY = _histogram(
    "e2e_request_latency", "From a request's arrival to a sequence's last token"
)
QUEUE_TIME = _histogram("request_queue_time", "From a request's arrival to the start of prefill")


class Metrics:
    """The metrics of one model. Times are those of `time.perf_counter()`, in seconds."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.prompt_tokens = PROMPT_TOKENS.labels(model_name)
        self.generation_tokens = GENERATION_TOKENS.labels(model_name)
        self.refused = REFUSED.labels(model_name)
        self.time_to_first_token = TIME_TO_FIRST_TOKEN.labels(model_name)
        self.inter_token_latency = INTER_TOKEN_LATENCY.labels(model_name)
        self.request_latency = REQUEST_LATENCY.labels(model_name)
        self.queue_time = QUEUE_TIME.labels(model_name)

    def set_gauges(
        self,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        num_compiled_steps: Callable[[], int],
    ) -> None:
        """Set the functions that return the gauges' current values."""
        RUNNING.labels(self.model_name).set_function(num_running)
        WAITING.labels(self.model_name).set_function(num_waiting)
        COMPILED_STEPS.labels(self.model_name).set_function(num_compiled_steps)

    def request_arrived(self, num_prompt_tokens: int) -> None:
        """Count a request."""
        self.prompt_tokens.inc(num_prompt_tokens)

    def token_generated(self, arrival: float, last_token: float | None, now: float) -> None:
        """Count a token of a sequence; `last_token` is the time of the one before, None for the first."""
        self.generation_tokens.inc()
        if last_token is None:
            self.time_to_first_token.observe(now - arrival)
        else:
            self.inter_token_latency.observe(now - last_token)

    def sequence_finished(
        self, finish_reason: str, arrival: float, prefill_started: float, now: float
    ) -> None:
        """Count a finished sequence."""
        FINISHED.labels(self.model_name, finish_reason).inc()
        self.request_latency.observe(now - arrival)
        self.queue_time.observe(prefill_started - arrival)


def render_metrics() -> bytes:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
