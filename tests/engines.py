"""The engine of this environment, for tests of features that only one engine has; all other tests run on either.

A file that imports an engine at the top is skipped before the import::

    if ENGINE != NEMO:
        pytest.skip(NO_NEMO, allow_module_level=True)
"""

from __future__ import annotations

import importlib.metadata

import pytest

from nemo_rao.config.engine_choice import BRIDGE, NEMO, installed_engine

ENGINE = installed_engine()
NO_NEMO, NO_BRIDGE = "NeMo is not installed", "Megatron-Bridge is not what runs are driven by here"
needs_nemo = pytest.mark.skipif(ENGINE != NEMO, reason=NO_NEMO)
needs_bridge = pytest.mark.skipif(ENGINE != BRIDGE, reason=NO_BRIDGE)

# The engines need different releases of transformers.
TRANSFORMERS = int(importlib.metadata.version("transformers").split(".")[0])
needs_transformers_4 = pytest.mark.skipif(TRANSFORMERS != 4, reason="transformers 5 reads its own files")
