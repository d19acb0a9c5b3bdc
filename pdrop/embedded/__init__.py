"""The embedded default: a procedural corpus, lmms-eval tasks over it, and a small LLaVA trained on it from scratch.

    python -m pdrop.embedded.corpus     writes the test split and its blind-guess floors
    python -m recipes.embedded.train    trains the model and writes it to pdrop/embedded/model
    python -m recipes.embedded.score    scores a model folder on the test split

Importing this package is cheap: torch is imported only by the files that train or score.
"""
