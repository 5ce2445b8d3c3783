"""Settings that workers and fronts share as replicas of Ray Serve."""

import ray
from ray.serve._private import replica

# Serve's access log writes a line for each call of a worker, which takes a millisecond.
LOGGING = {"enable_access_log": False}


def listen_on_this_node_only() -> None:
    """Bind the replica's internal gRPC port to the node's address.

    Serve 2.60 opens that port on all interfaces, without a token and without a setting for either. So this replaces the
    function of Serve's private module that opens it.
    """
    add_port = replica.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()
    replica.add_port_to_grpc_server = lambda server, place: add_port(server, place.replace("[::]", address))
