"""The door: python run.py --help. One call is one run, `-m` sweeps; see pdrop/cli/run.py."""

from pdrop.cli.run import main

if __name__ == "__main__":
    main()
