"""How the embedded model is trained from scratch: python -m recipes.embedded.train (make embedded-model)."""
