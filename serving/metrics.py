"""Prometheus metrics of requests, named as vLLM's, with the prefix `tinygpt:`."""

from collections.abc import Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of histogram buckets, in seconds."""

REGISTRY = CollectorRegistry()
"""Metrics of this server only, none of its process."""

Families = list[Metric]
"""Metrics with their values."""

_gauge = partial(Gauge, labelnames=("model_name",), registry=REGISTRY)
_counter = partial(Counter, labelnames=("model_name",), registry=REGISTRY)
_histogram = partial(Histogram, labelnames=("model_name",), registry=REGISTRY, buckets=BUCKETS)

RUNNING = _gauge("tinygpt:num_requests_running", "Running sequences")
WAITING = _gauge("tinygpt:num_requests_waiting", "Waiting sequences")
COMPILED_STEPS = _gauge("tinygpt:compiled_steps", "Kinds of steps that run compiled")
PROMPT_TOKENS = _counter("tinygpt:prompt_tokens", "Prompt tokens")
GENERATION_TOKENS = _counter("tinygpt:generation_tokens", "Generated tokens")
FINISHED = _counter(
    "tinygpt:request_success",
    "Finished sequences by finish reason",
    labelnames=("model_name", "finished_reason"),
)
REFUSED = _counter("tinygpt:requests_refused", "Requests refused with 429")
TIME_TO_FIRST_TOKEN = _histogram(
    "tinygpt:time_to_first_token_seconds", "From a request's arrival to a sequence's first token"
)
INTER_TOKEN_LATENCY = _histogram(
    "tinygpt:inter_token_latency_seconds", "Between two consecutive tokens of a sequence"
)
REQUEST_LATENCY = _histogram(
    "tinygpt:e2e_request_latency_seconds", "From a request's arrival to a sequence's last token"
)
QUEUE_TIME = _histogram(
    "tinygpt:request_queue_time_seconds", "From a request's arrival to the start of prefill"
)


class Metrics:
    """The metrics of one model. Times are those of `time.perf_counter()`, in seconds."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.num_running = RUNNING.labels(model_name)
        self.num_waiting = WAITING.labels(model_name)
        self.num_compiled_steps = COMPILED_STEPS.labels(model_name)
        self.prompt_tokens = PROMPT_TOKENS.labels(model_name)
        self.generation_tokens = GENERATION_TOKENS.labels(model_name)
        self.refused = REFUSED.labels(model_name)
        self.time_to_first_token = TIME_TO_FIRST_TOKEN.labels(model_name)
        self.inter_token_latency = INTER_TOKEN_LATENCY.labels(model_name)
        self.request_latency = REQUEST_LATENCY.labels(model_name)
        self.queue_time = QUEUE_TIME.labels(model_name)

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


def collect_metrics() -> Families:
    """Return all metrics with their values, which can be sent to another process."""
    return list(REGISTRY.collect())


class _Replicas(Collector):
    """The metrics of several processes as those of one, with the label `replica`."""

    def __init__(self, replicas: Mapping[str, Families]) -> None:
        self.merged: dict[str, Metric] = {}
        for replica, metrics in replicas.items():
            for metric in metrics:
                empty = Metric(metric.name, metric.documentation, metric.type)
                self.merged.setdefault(metric.name, empty).samples += [
                    sample._replace(labels={**sample.labels, "replica": replica})
                    for sample in metric.samples
                ]

    def collect(self) -> Iterable[Metric]:
        return self.merged.values()


def render_replicas(replicas: Mapping[str, Families]) -> bytes:
    """Return the metrics of several replicas, by their names, in Prometheus' text format."""
    return generate_latest(_Replicas(replicas))
