"""Training with or without dropping: LLaVA's conversation data, transformers' Trainer, and `attach` around both.

train.py calls `pdrop.training.job.train`. The same `attach` as in inference drops tokens; query tokens are those before
each answer.
"""
