"""python -m pdrop: run.py's command line, from anywhere; fetch and rescore are subcommands (pdrop/cli/)."""

from pdrop.cli.run import main

if __name__ == "__main__":
    main()
