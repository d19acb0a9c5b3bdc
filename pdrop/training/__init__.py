"""Training with or without dropping: LLaVA's conversation data, transformers' Trainer, and `attach` around both.

train.py is the door; `pdrop.training.job.train` is what it calls. The same `attach` as in inference drops the tokens:
query tokens are those before each answer.
"""
