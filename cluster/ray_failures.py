"""Translates exceptions of Ray and Ray Serve into failures of a prediction."""

import asyncio

from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException

from cluster.failures import ATTEMPTS, Again, Failure

# The worker's process or its node has certainly ended.
WORKER_ENDED = (ActorDiedError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)


def judge(error: BaseException) -> Failure:
    """The failure of a prediction during which an exception was raised, here or in a worker."""
    in_worker = isinstance(error, RayTaskError)  # and the worker lives
    cause = error.cause or error if in_worker else error
    if isinstance(cause, Failure):
        return cause
    if isinstance(cause, ObjectStoreFullError):
        return Failure("The memory in which the cluster passes files on is full; try again later.", Again.UNDRAWN)
    if isinstance(cause, OutOfDiskError):
        return Failure("The disk of one of the cluster's machines is full; try again later.", Again.UNDRAWN)
    if not in_worker and isinstance(cause, WORKER_ENDED):
        sentence = f"The prediction was given up: {ATTEMPTS} workers ended while they ran it."
        return Failure(sentence, Again.WORKER_ENDED)
    name = type(cause).__name__
    if not in_worker and isinstance(cause, RayError | RayServeException | asyncio.CancelledError):
        return Failure(f"The prediction was given up: {ATTEMPTS} attempts came to nothing ({name}).", Again.CUT_OFF)
    return Failure(f"The cluster failed with {name}; its log says where.")
