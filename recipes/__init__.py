"""How the shipped model was made. Not installed with pdrop."""
