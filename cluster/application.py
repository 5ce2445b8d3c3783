"""The Ray Serve application, `cluster.application:application`: workers with a GPU each, and fronts before them.

This module knows the deployments' arguments; what they do is in `cluster.worker` and `cluster.front`.
"""

from typing import Literal

from pydantic import BaseModel
from ray import serve

from cluster.front import Front
from cluster.worker import CogWorker
from local_cog.server import LOOPBACK
from settings import ROOT

APPLICATION = "flux-sprites"


class Arguments(BaseModel):
    """The application's, in `args` of a Serve configuration; secrets come from the environment."""

    # Where predict.py is.
    project: str = str(ROOT)
    workers: int = 1
    gpus_per_worker: float = 1
    fronts: int = 2
    # Where fronts listen; those of one machine share the port.
    host: str = LOOPBACK
    port: int = 8000
    # Seconds for which a front that is to go tells probes so, and answers: load balancers hear of it late.
    linger: float = 0
    # Unfinished predictions that one front takes; further ones are answered 503.
    queue: int = 1000
    # "router" leads a request to a worker that has its LoRAs, and waits for it a little.
    affinity: Literal["none", "router"] = "none"


def application(arguments: Arguments) -> serve.Application:
    """The fronts, bound to the workers."""
    router = {"request_router_config": {"request_router_class": "cluster.affinity:AffinityRouter"}}
    workers = CogWorker.options(
        num_replicas=arguments.workers,
        ray_actor_options={"num_cpus": 1, "num_gpus": arguments.gpus_per_worker},
        **(router if arguments.affinity == "router" else {}),
    ).bind(arguments.project)
    fronts = arguments.model_dump(include={"project", "host", "port", "linger", "queue", "affinity"})
    return Front.options(num_replicas=arguments.fronts).bind(workers, **fronts)
