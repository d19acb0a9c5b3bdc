"""What it takes, by the clock: in turns with the unpruned model, in one process, on the same inputs."""
