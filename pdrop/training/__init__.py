"""Training with or without dropping: LLaVA's conversation data, transformers' Trainer, and `attach` around both.

train.py calls `pdrop.training.job.train`. Tokens are dropped by the same `attach` as in inference; query tokens are
those before each answer.
"""
