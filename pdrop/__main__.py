"""python -m pdrop: run.py's command line, from anywhere; with fetch or rescore first, pdrop/cli/fetch.py, rescore.py."""

from pdrop.cli.run import main

if __name__ == "__main__":
    main()
