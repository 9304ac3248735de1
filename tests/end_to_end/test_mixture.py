"""A mixture of experts runs to its report on two ranks: scored, cut to fewer and narrower experts that are restored,
recovered, exported, measured."""

import json

import torch
from transformers import AutoModelForCausalLM

from pipeline import runner
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from tests.tiny import tokens
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings


def test_a_student_of_fewer_experts_is_recovered_and_delivered(tmp_path):
    world = make_world(tmp_path, "deepseek_v3", moe_intermediate_size=16)
    chosen = settings(
        world,
        run="moe",
        shape__layers=None,
        shape__neurons=None,
        shape__experts=2,
        shape__expert_neurons=8,
        restore__outputs=True,
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
    carried = recovered.anatomy.sizes.carried
    assert (carried["e"], carried["x"], carried["y"]) == (2, 8, 32)
    one = runner.run(configured(*chosen, f"artifacts={world / 'one'}", "stages=[hessian]"), "a test")
    (together,) = (world / "artifacts").glob("hessian-*")
    for name, matrix in open_tensors(one["hessians"]).items():
        torch.testing.assert_close(open_tensors(together)[name], matrix, rtol=1e-2, atol=1e-2 * float(matrix.max()))
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
