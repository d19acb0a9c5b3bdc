"""The conformance suite's, by the name that the tests know it by: pdrop/conformance/prompts.py."""

from pdrop.conformance.prompts import *  # noqa: F403
