"""A page to play on, beside a Cog server or a cluster's front; starts at server."""
