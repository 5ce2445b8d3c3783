"""Leads a request to a worker that holds its LoRAs, and has it wait for that worker a little.

This module knows Ray Serve's routing; it knows a set of LoRAs by a hash alone.
"""

import random
import time

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

# Longer than most predictions: a holder that is busy becomes free within it. Where a load is cheap this costs latency.
PATIENCE_SECONDS = 5


class AffinityRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Holders first; after some patience, or where there are none, whoever holds the least."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve until a worker takes the request.

        Returns:
            Workers, the most welcome first; Serve takes the first that is free.
        """
        loras = pending_request.metadata.multiplexed_model_id if pending_request else ""
        holders = [replica for replica in candidate_replicas if loras in replica.multiplexed_model_ids]
        others = [replica for replica in candidate_replicas if replica not in holders]
        random.shuffle(others)
        others.sort(key=lambda replica: len(replica.multiplexed_model_ids))
        if not holders:
            return [[replica] for replica in others]
        if time.time() - pending_request.created_at < PATIENCE_SECONDS:
            return [holders]
        return [holders, *([replica] for replica in others)]
