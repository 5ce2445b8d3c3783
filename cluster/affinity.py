"""Routes a request to a worker that holds its LoRAs; the request waits a little for that worker.

This module knows Ray Serve's routing, and only hashes of sets of LoRAs.
"""

import random
import time

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

# Longer than most predictions, so that a busy worker becomes free within it. Where LoRAs load fast, this costs latency.
PATIENCE_SECONDS = 5


class AffinityRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Workers that hold the LoRAs first; after PATIENCE_SECONDS also the others, those with the fewest LoRAs first."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of workers, the best first; Serve calls this until a worker takes the request."""
        loras = pending_request.metadata.multiplexed_model_id if pending_request else ""
        holders = [replica for replica in candidate_replicas if loras in replica.multiplexed_model_ids]
        others = [replica for replica in candidate_replicas if replica not in holders]
        if holders and time.time() - pending_request.created_at < PATIENCE_SECONDS:
            return [holders]
        random.shuffle(others)
        others.sort(key=lambda replica: len(replica.multiplexed_model_ids))
        return [group for group in (holders, *([replica] for replica in others)) if group]
