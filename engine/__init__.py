"""What draws: loading, placement in memory, live weights, fp8, compiled code."""
