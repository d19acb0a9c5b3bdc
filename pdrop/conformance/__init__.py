"""Checks that every method must pass, on tiny random models of many families: no download, a minute on two cores.

    python -m pdrop.conformance fastv                       # a file of conf/method/
    python -m pdrop.conformance pool ratio=0.25 twin=true   # with dials
    python -m pdrop.conformance my_package.my_module.MyMethod

A method gets all checks without writing a test. It is compared with an independent oracle that masks tokens instead of
removing them (oracle.py), with its own results for single prompts, and with what it declares: positions, numbers of
tokens, cost. broken.py has methods and engines with faults seen in public code; each must be caught (faults.py).

From Python:

    from pdrop.conformance.suite import Subject, run
    for result in run(Subject("mine", MyMethod(), lambda layers: single(2, 0.5, layers))):
        assert result.outcome != "failed", result.message
"""
