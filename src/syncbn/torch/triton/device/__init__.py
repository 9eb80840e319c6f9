"""What Triton compiles, and nothing else."""
