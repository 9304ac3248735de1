"""A mixture of experts runs to its report on two ranks: scored, cut to fewer experts, recovered, exported, measured."""

import json

import torch
from transformers import AutoModelForCausalLM

from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny import tokens
from tests.world import make_world, pipeline, settings


def test_a_student_of_fewer_experts_is_recovered_and_delivered(tmp_path):
    world = make_world(tmp_path, "deepseek_v3")
    chosen = settings(
        world,
        run="moe",
        shape__layers=None,
        shape__neurons=None,
        shape__experts=2,
        distill__learning_rate=1e-2,
        evaluate__speed=False,
        evaluate__tokens=256,
        report__samples=0,
    )
    pipeline(*chosen, "deepspeed=zero2", "export.form=auto", cwd=world, ranks=2)
    (folder,) = (world / "artifacts").glob("distill-*")
    (cut,) = (world / "artifacts").glob("cut-*")
    recovered, start = open_checkpoint(folder), open_checkpoint(cut)
    assert recovered.anatomy.shapes() == start.anatomy.shapes()
    assert recovered.anatomy.sizes.carried["e"] == 2
    moved = {name for name in start if not torch.equal(recovered[name], start[name].float())}
    assert {name for name in start if name not in moved} == {name for name in start if "correction_bias" in name}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [row["held_out_kl"] for row in rows if "held_out_kl" in row]
    assert min(held[1:]) < held[0]
    student, info = AutoModelForCausalLM.from_pretrained(world / "runs/moe/student", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert student.config.n_routed_experts == 2 and torch.isfinite(student(tokens()).logits).all()
    report = json.loads((world / "runs/moe/report.json").read_text())
    whole, few = (open_checkpoint(world / "runs/moe" / who).anatomy for who in ("teacher", "student"))
    assert report["parameters"] == {"teacher": whole.parameters()[0], "student": few.parameters()[0]}
    used = {"teacher": whole.active_parameters()[0], "student": few.active_parameters()[0]}
    assert report["active_parameters"] == used
    assert report["shape"]["student"]["experts"] == 2 and report["cut"]["experts_kept"] == 6
    assert 0.0 < report["cut"]["expert_tokens_kept"] < 1.0
    assert (world / "runs/moe/figures/experts.png").is_file()
