"""python -m pdrop: run.py's command line, from anywhere."""

from pdrop.run import main

if __name__ == "__main__":
    main()
