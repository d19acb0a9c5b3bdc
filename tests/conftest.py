"""What every test may use; and which of an exhaustive product's cases `make test` runs."""

from __future__ import annotations

import gc
import os
from collections import defaultdict

import pytest

pytest_plugins = ["tests.support.train_command"]


@pytest.fixture(scope="session", autouse=True)
def nothing_remembered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What command lines are resolved to is remembered per user: not beyond the tests, nor from before them."""
    os.environ["PDROP_CACHE"] = str(tmp_path_factory.mktemp("remembered"))


def pytest_configure() -> None:
    """Nothing of what is imported while tests are collected is garbage."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)  # before `-m` picks by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `product(n)`, n cases evenly spaced stay in `make test`; the others are for `make test-all`."""
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("product"):
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        marker = cases[0].get_closest_marker("product")
        assert marker is not None
        stay = {number * len(cases) // marker.args[0] for number in range(marker.args[0])}
        for number, item in enumerate(cases):
            if number not in stay:
                item.add_marker(pytest.mark.exhaustive)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: each collection of garbage after this leaves it out, which else takes a
    quarter of a second, in every training twice."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # composed configurations and models are many objects that stay for a test
