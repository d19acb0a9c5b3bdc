"""The door: python run.py --help. One call is one run, `-m` sweeps; see pdrop/run.py."""

from pdrop.run import main

if __name__ == "__main__":
    main()
