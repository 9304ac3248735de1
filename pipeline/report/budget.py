"""The budget that a run was given, and what the student reaches of it."""

from pipeline.model.shape import Budgeted
from pipeline.report.facts import Report

OF = {
    "parameters": "of the parameters outside the embeddings",
    "total": "of all parameters",
    "bytes": "of checkpoint",
    "speedup": "the teacher's speed, predicted",
}


def budget_of(report: Report) -> tuple[str, str, str] | None:
    """Return the setting, what the student reaches, and what was requested; None where no budget determined the shape.

    Sizes are those of the exported student; a speed is the chip model's prediction.
    """
    found = report.get("budget")
    if found is None:
        return None
    budget = Budgeted(**found)
    what = OF[budget.budget]
    if budget.budget == "bytes" and budget.context:
        what += f" and KV cache of {budget.context} tokens"
    return (
        f"budget.{budget.budget}",
        budget.shown(_reached(report, budget)),
        f"{budget.shown(budget.requested)} requested, {what}",
    )


def _reached(report: Report, budget: Budgeted) -> float:
    key = {"parameters": "non_embedding_parameters", "total": "parameters"}.get(budget.budget)
    if key:
        return report[key]["student"] / report[key]["teacher"]
    if budget.budget == "bytes":
        return report["checkpoint_bytes"]["student"] + budget.context * report["kv_bytes_per_token"]["student"]
    return budget.reached
