"""python -m pdrop: run.py's command line, from anywhere; `fetch` brings models and data for machines offline."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["fetch"]:
        from pdrop.cli.fetch import main as fetch

        sys.exit(fetch(sys.argv[2:]))
    from pdrop.cli.run import main

    main()
