"""A pytest plugin for other people's test suites: notes every outcome, and lets adapters go through our fused forward.

``PEER_OUTCOMES`` names the file that is written; with ``PEER_FUSED=1`` PEFT's adapters are fused as they are made.
"""

import functools
import json
import os
from pathlib import Path

import pytest

_outcomes = {}


def pytest_configure(config):
    if os.environ.get("PEER_HUB") != "1":
        # Before the test files take it over: they go online in it, and without a network each try takes half a minute.
        from tests import testing_utils

        testing_utils.hub_online_once = lambda name: pytest.skip(f"{name} is on the hub")
    if os.environ.get("PEER_FUSED") != "1":
        return
    from peft.tuners.tuners_utils import BaseTuner

    from lora_null.peft import use_fused_kernels

    inject = BaseTuner.inject_adapter

    # get_peft_model, add_adapter, load_adapter and inject_adapter_in_model all end here.
    @functools.wraps(inject)
    def inject_fused(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        use_fused_kernels(model)

    BaseTuner.inject_adapter = inject_fused


def pytest_runtest_logreport(report):
    worst = _outcomes.get(report.nodeid)
    if worst != "failed" and (report.when == "call" or report.outcome != "passed"):
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish():
    Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=0, sort_keys=True))
