"""Megatron without CUDA: what asks for a CUDA device gets the CPU, once an entry point wants it and never before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..engines import BRIDGE, ENGINE, NEMO
from ..megatron_ranks import import_once

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed where CUDA exists")

ROOT = Path(__file__).resolve().parents[2]

# What Transformer Engine, apex or a CUDA kernel would have to do.
FUSIONS = (
    "apply_rope_fusion",
    "persist_layer_norm",
    "memory_efficient_layer_norm",
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "cross_entropy_loss_fusion",
    "tp_comm_overlap",
)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    import_once()


def in_fresh_process(code: str) -> tuple[str, str]:
    """Standard output and error of a new interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# NeMo is left out: the platform serves Megatron alone as well, and NeMo takes long to import.
INSTALL = """
import json, sys
sys.modules["nemo"] = None
import torch
from nemo_rao.mcore import cpu

before = torch.zeros(1).type()
first = cpu.install_if_needed()
from megatron.core.transformer.transformer_config import TransformerConfig
patched = TransformerConfig.__post_init__, torch.cuda.current_device, torch.overrides._get_current_function_mode()
second = cpu.install_if_needed()
again = TransformerConfig.__post_init__, torch.cuda.current_device, torch.overrides._get_current_function_mode()
modes = torch._C._len_torch_function_stack()
print(json.dumps([before, first, second, all(a is b for a, b in zip(patched, again)), modes]))
"""


@pytest.mark.slow
def test_installing_twice_changes_once_and_says_nothing_itself() -> None:
    output, errors = in_fresh_process(INSTALL)
    assert json.loads(output.splitlines()[-1]) == ["torch.FloatTensor", True, True, True, 1]
    assert "nemo" not in errors  # the caller tells the user, once nothing is left to refuse


NO_DRIVER = """
import json, sys
sys.modules["nemo"] = None
from tests.login_node import cuda_without_a_driver
cuda_without_a_driver()
import torch
from torch.cuda import is_available
from nemo_rao.mcore import cpu

assert cpu.install_if_needed()
cuda = torch.cuda
available = [cuda.is_available(), is_available(), torch.accelerator.is_available()]
formats = [cuda.is_bf16_supported(), cuda.is_tf32_supported()]
state = [cuda.is_initialized(), cuda.memory_allocated(), cuda.device_count()]
print(json.dumps([available, formats, state, list(torch.ones(2, device="cuda").tolist())]))
"""


@pytest.mark.slow
def test_a_build_with_cuda_that_finds_no_driver_is_asked_for_nothing() -> None:
    """Whoever follows ``device_count()`` or ``is_available()``, or imported it by name, is sent to no driver."""
    output, _ = in_fresh_process(NO_DRIVER)
    assert json.loads(output.splitlines()[-1]) == [[False] * 3, [False] * 2, [False, 0, 1], [1.0, 1.0]]


GROUPS = """
import sys
sys.modules["nemo"] = None
import torch
from torch import distributed
from nemo_rao.mcore import cpu

cpu.install_if_needed()
from megatron.core import parallel_state

def groups():
    return {name for name, one in vars(parallel_state).items() if isinstance(one, distributed.ProcessGroup)}

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
print(len(groups()) > 10)
parallel_state.destroy_model_parallel()
print(sorted(groups()))
"""


@pytest.mark.slow
def test_no_group_is_left_for_a_fork_that_would_wait_for_its_threads() -> None:
    output, _ = in_fresh_process(GROUPS)
    assert output.splitlines()[-2:] == ["True", "[]"]


TOO_LATE = """
import sys, types
sys.modules["megatron.core"] = sys.modules["transformer_engine"] = types.ModuleType("imported before")
import torch
from nemo_rao.mcore import cpu
from nemo_rao.errors import UserError

try:
    cpu.install_if_needed()
except UserError as error:
    print(torch._C._len_torch_function_stack(), error)
"""


def test_a_megatron_that_has_taken_transformer_engine_already_is_refused() -> None:
    output, _ = in_fresh_process(TOO_LATE)
    assert output.startswith("0 Megatron was imported with transformer_engine, which needs a GPU, but there is none.")


IMPORT = """
import importlib, json, pkgutil, sys
import torch
before = torch.cuda.device_count, torch.cuda.current_device, torch.nn.Module.cuda
import nemo_rao
for layer in ("data", "ops", "objectives"):
    package = importlib.import_module(f"nemo_rao.{layer}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"nemo_rao.{layer}.{module.name}")
same = before == (torch.cuda.device_count, torch.cuda.current_device, torch.nn.Module.cuda)
heavy = [name for name in ("nemo_rao.mcore.cpu", "megatron", "nemo") if name in sys.modules]
print(json.dumps([same, torch._C._len_torch_function_stack(), heavy]))
"""


def test_importing_data_ops_and_objectives_changes_nothing() -> None:
    output, errors = in_fresh_process(IMPORT)
    assert json.loads(output.splitlines()[-1]) == [True, 0, []]
    assert "no CUDA device" not in errors


NEW: dict[str, Callable[[], torch.Tensor]] = {
    "a string": lambda: torch.zeros(1, device="cuda"),
    "a string with an index": lambda: torch.full((2,), 1.0, device="cuda:0"),
    "a device": lambda: torch.tensor([1, 2], device=torch.device("cuda", 0)),
    "an integer": lambda: torch.empty(3, device=0),
    "the current device": lambda: torch.arange(3, device=torch.cuda.current_device()),
    "like another": lambda: torch.ones_like(torch.zeros(2), device="cuda"),
    "new of another": lambda: torch.zeros(2).new_ones(3, device="cuda"),
    "pinned": lambda: torch.zeros(1, pin_memory=True),
    "pinned later": lambda: torch.zeros(1).pin_memory(),
    "cuda()": lambda: torch.zeros(1).cuda(),
    "cuda() without waiting": lambda: torch.zeros(1).cuda(0, non_blocking=True),
    "to a string": lambda: torch.zeros(1).to("cuda:0"),
    "to an integer": lambda: torch.zeros(1).to(0),
    "to a keyword": lambda: torch.zeros(1).to(device="cuda", dtype=torch.float64),
    "to a device and type": lambda: torch.zeros(1).to(torch.device("cuda"), torch.float64),
    "to a device": lambda: torch.zeros(1).to(torch.device("cuda", 0)),
    "cuda() with an index": lambda: torch.zeros(1).cuda(0),
}


@pytest.mark.parametrize("way", NEW)
def test_what_asks_for_cuda_gets_the_cpu(way: str) -> None:
    made = NEW[way]()
    assert made.device == torch.device("cpu")
    assert not made.is_pinned()


def test_no_other_function_accepts_a_device_without_a_keyword() -> None:
    """Calls without keywords are let through at once, except those that the tests here cover."""
    schemas = [
        one for one in torch._C._jit_get_all_schemas() if one.name.startswith("aten::") and "::_" not in one.name
    ]
    found = {
        one.name.removeprefix("aten::")
        for one in schemas
        for argument in one.arguments
        if "Device" in str(argument.type) and not argument.kwarg_only
    }
    harmless = {"is_pinned", "eq", "ne"}  # ask about a device; the others compare two
    assert found - harmless == {"to", "pin_memory"}
    for function in (torch.tensor, torch.as_tensor, torch.asarray, torch.zeros(1).new_tensor):
        with pytest.raises(TypeError, match="positional argument"):
            function([1], None, "cuda")


def test_a_devices_type_or_a_shape_is_not_mistaken_for_a_device() -> None:
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(0, 3).shape == (0, 3)
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"


def test_modules_stay_where_they_are_and_compute() -> None:
    layer = torch.nn.Linear(2, 2)
    assert layer.cuda() is layer
    moved = torch.nn.Sequential(layer).to("cuda").cuda(0)
    moved(torch.ones(1, 2, device="cuda")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.device.type == "cpu"


def test_megatrons_names_for_types_are_those_of_cuda() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_streams_exist_and_everything_on_them_has_happened() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made = torch.ones(1, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert made.item() == 1


def test_events_have_happened_and_lie_apart_by_the_time_between_them() -> None:
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record(torch.cuda.current_stream())
    time.sleep(0.02)
    second.record()
    second.wait()
    assert second.query() and first.elapsed_time(second) >= 20


def test_markers_and_memory_figures_ask_no_driver() -> None:
    with torch.cuda.nvtx.range("a step"):
        torch.cuda.nvtx.range_push("a layer")
        torch.cuda.nvtx.range_pop()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == 0


def test_random_state_of_the_device_is_that_of_the_cpu() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(4).equal(drawn)
    torch.manual_seed(5)
    assert torch.rand(4).equal(drawn)


def a_config(name: str) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    wanted = {name: True for name in FUSIONS if name in TransformerConfig.__dataclass_fields__}
    if name == MEGATRON:
        return TransformerConfig(**sizes, **wanted)
    import_once()
    given = {**sizes, "num_query_groups": 2, "ffn_hidden_size": 16, **(wanted if name in ASKED else {})}
    if ENGINE == BRIDGE:
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        made = GPTModelProvider(**given)
        made.finalize()
        return made
    from nemo.collections import llm

    return getattr(llm, OF_NEMO[name])(**given)


MEGATRON = "Megatron, every fusion asked for"
OF_NEMO = {
    "Llama": "Llama31Config8B",
    "Llama, every fusion asked for": "Llama32Config1B",
    "Qwen": "Qwen25Config7B",
    "Mistral": "MistralConfig7B",
    "Gemma": "Gemma2Config2B",
}
OF_BRIDGE = ("Bridge", "Bridge, every fusion asked for")
ASKED = ("Llama, every fusion asked for", "Bridge, every fusion asked for")


@pytest.mark.parametrize("name", [MEGATRON, *{NEMO: OF_NEMO, BRIDGE: OF_BRIDGE, None: ()}[ENGINE]])
def test_every_config_has_its_fusions_off(name: str) -> None:
    config = a_config(name)
    on = [fusion for fusion in FUSIONS if fusion in config.__dataclass_fields__ and vars(config)[fusion]]
    assert on == []
    assert vars(config)["use_cpu_initialization"] is True
