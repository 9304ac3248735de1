"""Under ZeRO-3 two devices never hold teacher and student whole, not even while the engine is built.

The devices are simulated NPUs, which count the bytes they hold.
"""

import shutil

import pytest
import torch

from pipeline.costmodel.training_cost import LIVE_PARAMETERS
from tests.processes import on_ranks
from tests.tiny import tiny_model

NARROW = {"hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}  # odd parts
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1000}}  # else they are most of what a device holds
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="building the simulated NPU needs g++"),
]


def built(ranks) -> dict:
    """Build an engine of each type; give what its device held then, and what became of the weights."""
    return {kind: held(ranks, kind) for kind in TYPES}


def held(ranks, kind: str) -> dict:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipeline.distill.distiller import Distiller, Match, Objective
    from pipeline.runtime.device import open_device
    from pipeline.runtime.engine import Engine

    device = open_device("npu", "auto", False, ranks.local_rank, 0)
    objective = Objective("forward_kl", 0.5, 1.0, 0.0, 0.5, 0.0, 16, "auto")
    teacher = tiny_model("llama", 0, torch.float32, hidden_size=64, intermediate_size=300)
    student = tiny_model("llama-tied", 1, torch.float32, **NARROW)
    module = Distiller(teacher, student, objective, Match(((0, 1),), tuple(range(27))), False)
    whole = {name: parameter.detach().to(TYPES[kind], copy=True) for name, parameter in module.named_parameters()}
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    device.reset_peak_memory()
    before = device.peak_memory()
    engine = Engine(
        module, device, ranks, stage=3, bf16=kind == "bf16", micro_batch=1, accumulation=1, clip=1.0,
        betas=(0.9, 0.95), weight_decay=0.0, extra=SMALL_BUCKETS,
    )  # fmt: skip
    peak = device.peak_memory() - before
    left = [name for name, buffer in module.named_buffers() if buffer.device != device.torch]
    parameters = dict(module.named_parameters())
    with GatheredParameters(list(parameters.values())):
        same = [torch.equal(parameter.cpu(), whole[name]) for name, parameter in parameters.items()]
        types = {str(parameter.dtype) for parameter in parameters.values()}
    engine.close()
    bytes_of = [weight.nbytes for weight in whole.values()]
    return {
        "peak": peak, "whole": sum(bytes_of), "largest": max(bytes_of), "trained": trained,
        "same": all(same), "left": left, "types": sorted(types), "live": DeepSpeedZeroConfig().max_live_parameters,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(built, tmp_path_factory.mktemp("partition"), timeout=120.0, kind="npu")


@pytest.mark.parametrize("kind", TYPES)
def test_a_device_holds_its_half_and_one_parameter_at_most(ranks, kind):
    for result in (rank[kind] for rank in ranks):
        optimizer = 16 * result["trained"]  # float32 weights, gradients and two moments, shared out as well
        share = (result["whole"] + optimizer) / 2 + result["largest"]
        assert result["peak"] < 1.01 * share and share < result["whole"]  # a hundredth for alignment


@pytest.mark.parametrize("kind", TYPES)
def test_partitioned_weights_are_those_that_came_bit_for_bit_and_buffers_are_on_the_device(ranks, kind):
    for result in (rank[kind] for rank in ranks):
        assert result["left"] == []
        assert result["same"] and result["types"] == [str(TYPES[kind])]


def test_the_dry_run_knows_how_many_parameters_deepspeed_gathers(ranks):
    assert ranks[0]["fp32"]["live"] == LIVE_PARAMETERS
