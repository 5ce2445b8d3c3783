"""Many GPUs behind one address; starts at local, or at application where Ray Serve runs already."""
