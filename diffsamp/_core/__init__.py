"""What knows nothing of samplers: numbers, checks, files, progress, sharding, random keys."""
