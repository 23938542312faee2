"""What `benchmarks.compare` compares: a file each, which sets a contender up and is what runs in its process."""
