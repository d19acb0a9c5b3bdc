"""The door of training: python train.py --help. One call is one training, `-m` sweeps; see pdrop/cli/train.py."""

from pdrop.cli.train import main

if __name__ == "__main__":
    main()
