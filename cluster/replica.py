"""What workers and fronts have in common as replicas of Ray Serve, whatever they do."""

import ray
from ray.serve._private import replica

# Serve's access log has a line for each call of a worker, which takes a millisecond.
LOGGING = {"enable_access_log": False}


def listen_on_this_node_only() -> None:
    """Bind the replica's inner port to the node's address: Serve 2.60 binds it to all and asks for no token."""
    add_port = replica.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()
    replica.add_port_to_grpc_server = lambda server, place: add_port(server, place.replace("[::]", address))
