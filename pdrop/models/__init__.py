"""One model, whatever it is made of: a checkpoint, a repository of the Hub, the shipped sizes of a common one."""
