"""How what is shipped was made. Not installed with pdrop."""
