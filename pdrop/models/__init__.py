"""Models: from a checkpoint folder, a repository on the Hub, or the shipped sizes of a common checkpoint."""
