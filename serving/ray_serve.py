"""The application as a Ray Serve deployment: several replicas of the server, on one or many machines.

`serve run serving.ray_serve:app run=runs/NAME num_replicas=2`, with Ray's command `serve`. Each
replica has engines of its own for all runs, as `tinygpt serve` has: requests choose a run by
their field `model`, so Ray's own multiplexing, which goes by a header, is not needed.
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt import settings
from gpt.cli import OptionalInt
from serving.cli import Serve, read_settings
from serving.engine.async_engine import UnavailableError
from serving.engine.compilation import Compiler
from serving.http.app import create_app
from serving.http.limits import check_minimums
from serving.http.registry import ModelRegistry
from serving.metrics import Families, collect_metrics, render_replicas

NUM_OTHER_REQUESTS = 32
"""Requests that a replica takes at a time beside its running and waiting sequences: pages, metrics, refusals."""
METRICS_TIMEOUT = 5.0
"""Seconds that `/metrics` waits for the replicas."""
PROXY_OPTIONS = (
    "host",
    "port",
    "no-api-key",
    "header-timeout",
    "body-timeout",
    "idle-timeout",
)
"""Options of `tinygpt serve` that are matters of Ray's HTTP proxy."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Number and resources of the replicas; what else Ray can set, its own configuration file sets."""

    num_replicas: OptionalInt = None
    """Fixed number of replicas; default: 1."""
    min_replicas: OptionalInt = None
    """Minimum number of replicas, with `max_replicas`; 0: none while there are no requests; default: 1."""
    max_replicas: OptionalInt = None
    """Maximum number of replicas: turns autoscaling on."""
    target_ongoing_requests: OptionalInt = None
    """Requests per replica that autoscaling aims at; default: `max_num_seqs`."""
    num_cpus: float = 1.0
    """CPUs of each replica: Ray's reservation, and the maximum number of the engine's threads."""
    num_gpus: float = 0.0
    """GPUs of each replica; below 1, replicas share one."""

    def __post_init__(self) -> None:
        check_minimums(self, num_replicas=1, min_replicas=0, max_replicas=1)
        check_minimums(self, target_ongoing_requests=1, num_cpus=0, num_gpus=0)
        if self.max_replicas is None:
            for name in ("min_replicas", "target_ongoing_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for autoscaling: give max_replicas too")
        elif self.num_replicas is not None:
            raise ValueError("give num_replicas, or max_replicas for autoscaling, not both")
        elif (self.min_replicas or 0) > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )

    def deployment_options(self, max_num_seqs: int) -> dict[str, Any]:
        """Return these as options of Ray's deployment."""
        resources = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.max_replicas is None:
            return {"num_replicas": self.num_replicas or 1, "ray_actor_options": resources}
        autoscaling = {
            "min_replicas": 1 if self.min_replicas is None else self.min_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests or max_num_seqs,
        }
        return {"autoscaling_config": autoscaling, "ray_actor_options": resources}


class DisconnectMiddleware:
    """Turns what Ray raises when a client disconnects into the message that ASGI has for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the request."""

        async def receive_message() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self.app(scope, receive_message, send)


class Replica:
    """One replica: it loads the runs and starts their engines in its own process."""

    def __init__(self, options: Serve, paths: list[Path]) -> None:
        self.options, self.paths = options, paths
        self.registry = ModelRegistry()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Load the runs and return the application: threads and models cannot be sent to a replica."""
        compiler, runs = Compiler(), self.options.run_browser(self.paths)
        await self.options.load_runs(self.paths, self.registry, compiler, runs)
        watch = self.options.watch_runs(self.registry, compiler, runs)
        self.watch_task = asyncio.create_task(watch)
        app = create_app(
            self.registry,
            self.options.limits,
            key=self.options.api_key,
            allowed_origins=self.options.allowed_origins,
            runs=runs,
            all_metrics=self.all_metrics,
        )
        app.add_middleware(DisconnectMiddleware)
        return app

    async def check_health(self) -> None:
        """Raise an error where `/health` is 503: Ray then replaces the replica."""
        if not self.registry.is_healthy:
            raise RuntimeError("an engine has stalled or failed; see the replica's log")

    async def own_metrics(self) -> tuple[str, Families]:
        """Return the replica's name and metrics."""
        return serve.get_replica_context().replica_id.unique_id, collect_metrics()

    async def all_metrics(self) -> bytes:
        """Return the metrics of all replicas: Ray's proxy alone chooses which one gets a request."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            results = await handle.broadcast("own_metrics").results_async(
                timeout_s=METRICS_TIMEOUT, return_exceptions=True
            )
        except TimeoutError as error:
            raise UnavailableError("a replica does not respond") from error
        # A replica that has just died gives an exception.
        return render_replicas(dict(each for each in results if isinstance(each, tuple)))


def app(args: dict[str, Any]) -> serve.Application:
    """Return the Ray Serve application.

    Args:
        args: Options of `tinygpt serve` and fields of `Scaling`, by name with - or _, as text
            (`serve run serving.ray_serve:app NAME=VALUE …`) or as values (`args` in a configuration
            file of Ray). They win over environment variables (`TINYGPT_…`), and these over the file
            that `config` names.
    """
    try:
        options, scaling = _read_options(args)
        paths = [path.absolute() for path in options.find_runs()]
        options = dataclasses.replace(
            options,
            api_key=options.checked_key(),
            watch=options.watch and options.watch.absolute(),
            runs_dir=options.runs_dir and options.runs_dir.absolute(),
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error  # of which `serve run` prints one line
    capacity = options.max_num_seqs + options.max_queue
    deployment = serve.deployment(
        name="TinyGPT",
        max_ongoing_requests=capacity + NUM_OTHER_REQUESTS,
        max_queued_requests=options.timeouts.max_connections,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        graceful_shutdown_timeout_s=options.timeouts.shutdown_timeout,
        **scaling.deployment_options(options.max_num_seqs),
    )
    # No decorators: Ray would send the class by value, with the globals that it uses, not by name.
    return deployment(serve.ingress()(Replica)).bind(options, paths)


def _read_options(args: Mapping[str, Any]) -> tuple[Serve, Scaling]:
    """Return the options of arguments, environment and configuration file, checked."""
    default, scaling = Serve(), Scaling()
    given = {
        name.replace("_", "-"): settings.Setting(
            f"arguments: {name}", value, isinstance(value, str)
        )
        for name, value in args.items()
    }
    config = given.pop("config", None)
    names = settings.option_names(default, scaling)
    found = read_settings("serving.ray_serve", names, config and str(config.value)) | given
    for name in PROXY_OPTIONS:
        if name in found:
            raise ValueError(
                f"{found[name].origin}: requests come through Ray's HTTP proxy, whose address and "
                "timeouts `serve start` and `http_options` in its configuration file set"
            )
    options, scaling = settings.apply(found, (), default, scaling)
    return (
        # Anew, since settings are applied without the checks of ranges.
        dataclasses.replace(
            options,
            limits=dataclasses.replace(options.limits),
            timeouts=dataclasses.replace(options.timeouts),
        ),
        dataclasses.replace(scaling),
    )
