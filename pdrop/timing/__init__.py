"""Timing, in turns with the unpruned model, in one process, on the same inputs."""
