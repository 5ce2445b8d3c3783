"""Drawing with the models: loading, placement in memory, live weights, fp8, compiled code."""
