"""The conformance suite's, by the name that the tests know it by: pdrop/conformance/oracle.py."""

from pdrop.conformance.oracle import *  # noqa: F403
