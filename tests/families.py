"""The conformance suite's, by the name that the tests know it by: pdrop/conformance/families.py."""

from pdrop.conformance.families import *  # noqa: F403
