"""The command lines: Hydra on one side, plain settings on the other."""
