"""python -m pdrop: run.py's command line, from anywhere; python -m pdrop rescore: pdrop/cli/rescore.py."""

from pdrop.cli.run import main

if __name__ == "__main__":
    main()
