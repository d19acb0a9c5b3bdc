"""Tests, in folders that mirror the project; tests/support/ holds what they share."""
