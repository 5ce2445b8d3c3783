"""The Ray Serve application, `cluster.application:application`: workers with a GPU each, and fronts before them."""

from ray import serve

from cluster.front import Front
from cluster.settings import Arguments
from cluster.worker import CogWorker

APPLICATION = "flux-sprites"


def application(arguments: Arguments) -> serve.Application:
    """The fronts, bound to the workers."""
    router = {"request_router_config": {"request_router_class": "cluster.affinity:AffinityRouter"}}
    workers = CogWorker.options(
        num_replicas=arguments.workers,
        ray_actor_options={"num_cpus": 1, "num_gpus": arguments.gpus_per_worker},
        **(router if arguments.affinity == "router" else {}),
    ).bind(arguments.project)
    return Front.options(num_replicas=arguments.fronts).bind(workers, arguments)
