"""python -m pdrop: run.py's command line, from anywhere."""

from pdrop.cli.run import main

if __name__ == "__main__":
    main()
