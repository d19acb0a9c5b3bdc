"""Tables, figures and reports from run records: `python -m analysis`, installed `pdrop-analysis`. No torch."""

import sys

if sys.argv[:1] == ["-m"]:  # Python looks for the module that it is to run
    from pdrop.command_help import refuse_no_command

    refuse_no_command(sys.orig_argv, __path__[0])
