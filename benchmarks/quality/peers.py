"""Starts that other tools cut: run it with the Python of an environment of their own, in which this project is not.

    python -m venv PEERS && PEERS/bin/pip install torch transformers==5.23.* optipfair==0.4.2 torch-pruning==1.6.1 \\
        mergekit==0.1.5
    PEERS/bin/python benchmarks/quality/peers.py --teacher FOLDER --peer NAME --keep 0.75 --out FOLDER [--tokens FOLDER]

`--keep` is the share of the teacher's parameters outside the embeddings that stays, at most; what comes out is an
ordinary Hugging Face model folder as near below it as the tool allows. `--tokens` is a folder of packed
calibration tokens (int32 rows in .npy files, as this pipeline's stage `tokens` writes them), for the tools that look at
text. `--drop 3,7` names the layers that a depth cut removes, in place of the tool's own choice.

Each tool is used through its documented interface, as its own example does, on a float32 copy of the weights; nothing
is changed but what it removes, and the result is stored in the teacher's type again.
"""

import argparse
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from arguments import at_least, described, folder_with, several
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ALIGN = 24  # torch-pruning: widths in multiples of it, so that the stream divides by any number of heads that is left
BATCH = 4  # calibration sequences at once
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template.jinja", "*.model")
Model = torch.nn.Module


def inner(model: Model) -> int:
    """Parameters outside the embeddings and the output matrix."""
    vocabulary = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in vocabulary)


def layers_to_drop(model: Model, keep: float) -> int:
    """The fewest whole layers without which at most `keep` of the inner parameters stay."""
    whole = inner(model)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return math.ceil((1.0 - keep) * whole / layer - 1e-9)


def calibration(folder: Path | None, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Batches of whole sequences, `tokens` in all, spread evenly over the packed rows; ValueError without any."""
    if folder is None:
        raise ValueError("this peer looks at calibration text; give --tokens")
    rows = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    chosen = torch.from_numpy(rows[np.linspace(0, len(rows) - 1, count).astype(int)].astype("int64"))
    return [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in chosen.split(BATCH)]


def optipfair_depth(model: Model, request: argparse.Namespace) -> Model:
    """OptiPFair: the layers that turn the stream least (its own analyse step), removed."""
    import optipfair

    drop = request.drop
    if drop is None:
        influence = optipfair.analyze_layer_importance(
            model, calibration(request.tokens, request.tokens_read), show_progress=False
        )
        drop = sorted(sorted(influence, key=influence.get)[: layers_to_drop(model, request.keep)])
    return optipfair.prune_model(model, pruning_type="DEPTH", layer_indices=list(drop), show_progress=False)


def optipfair_width(model: Model, request: argparse.Namespace, data: bool = False) -> Model:
    """OptiPFair: GLU neurons by the peak-to-peak magnitude of their weights, without looking at text."""
    import optipfair

    neurons = model.config.intermediate_size
    rows = 3 * model.config.hidden_size * len(model.model.layers)  # weights that one neuron of every layer has
    kept = neurons - math.ceil((1.0 - request.keep) * inner(model) / rows)
    return optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100.0 * (neurons - kept + 0.5) / neurons,  # it rounds the number that goes down
        dataloader=calibration(request.tokens, request.tokens_read) if data else None,
        show_progress=False,
    )


def optipfair_width_data(model: Model, request: argparse.Namespace) -> Model:
    """OptiPFair: the same, with the neurons' outputs on calibration text in the score."""
    return optipfair_width(model, request, data=True)


def torch_pruning(model: Model, request: argparse.Namespace) -> Model:
    """Torch-Pruning: channels, query heads and neurons by group L2 norm, as its LLM example; the least ratio in steps
    of 1/96 that keeps within the budget."""
    budget, best = request.keep * inner(model), None
    near = round(96 * (1.0 - math.sqrt(request.keep)))  # most weights have two axes, and both are cut by the ratio
    low, high = max(1, near - 7), near + 8
    while low <= high:
        middle = (low + high) // 2
        tried = _cut_by_norms(_load(request.teacher), middle / 96)
        if inner(tried) <= budget:
            best, high = tried, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise ValueError(f"torch-pruning finds nothing that keeps {request.keep}")
    return best


def _cut_by_norms(model: Model, ratio: float) -> Model:
    import torch_pruning as tp

    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": torch.ones(1, 8, dtype=torch.int64), "use_cache": False},
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=ALIGN,
        output_transform=lambda out: out.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    first = model.model.layers[0]
    config.hidden_size = first.mlp.gate_proj.in_features
    config.intermediate_size = first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // config.head_dim
    config.num_key_value_heads = first.self_attn.k_proj.out_features // config.head_dim
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    return model


def mergekit(request: argparse.Namespace) -> None:
    """mergekit: a passthrough merge of the slices that stay; by itself the deepest layers but the last go, as people
    who cut depth with it do."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    model = _load(request.teacher)
    layers, count = len(model.model.layers), layers_to_drop(model, request.keep)
    drop = set(request.drop if request.drop is not None else range(layers - 1 - count, layers - 1))
    edges = [-1, *sorted(drop), layers]
    ranges = [[above + 1, below] for above, below in zip(edges, edges[1:]) if below > above + 1]
    teacher = str(request.teacher.resolve())
    recipe = {
        "merge_method": "passthrough",
        "dtype": _stored(request.teacher),
        "slices": [{"sources": [{"model": teacher, "layer_range": each}]} for each in ranges],
    }
    (request.out / "mergekit.yml").write_text(yaml.safe_dump(recipe))
    run_merge(MergeConfiguration.model_validate(recipe), str(request.out), MergeOptions(write_model_card=False))


CUTS: dict[str, Callable[[Model, argparse.Namespace], Model]] = {
    "optipfair-depth": optipfair_depth,
    "optipfair-width": optipfair_width,
    "optipfair-width-data": optipfair_width_data,
    "torch-pruning": torch_pruning,
}
PEERS = {  # and the module that each is
    "optipfair-depth": "optipfair",
    "optipfair-width": "optipfair",
    "optipfair-width-data": "optipfair",
    "torch-pruning": "torch_pruning",
    "mergekit": "mergekit",
}


def _load(folder: Path) -> Model:
    # eager attention repeats keys and values in sight of whoever traces the graph, as Torch-Pruning does
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _stored(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--teacher", type=folder_with("config.json"), required=True)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--tokens-read", type=at_least(1), default=32768)
    parser.add_argument("--drop", type=several(at_least(0)))
    request = parser.parse_args()
    if importlib.util.find_spec(PEERS[request.peer]) is None:
        parser.error(
            f"--peer: {request.peer} needs {PEERS[request.peer]}; run this by a Python that has it, see --help"
        )
    if not 0.0 < request.keep < 1.0:
        parser.error(f"--keep: {request.keep} is no share between 0 and 1")
    reads = request.peer == "optipfair-width-data" or (request.peer == "optipfair-depth" and request.drop is None)
    if reads and not (request.tokens and any(request.tokens.glob("*.npy"))):
        parser.error(f"--tokens: {request.peer} looks at text; give a folder of packed tokens, not {request.tokens}")
    torch.manual_seed(0)
    logging.disable_progress_bar()
    whole, request.out = (
        request.out,
        request.out.with_name(request.out.name + ".partial"),
    )  # renamed when it is complete
    shutil.rmtree(request.out, ignore_errors=True)
    request.out.mkdir(parents=True)
    if request.peer == "mergekit":
        mergekit(request)
    else:
        model = CUTS[request.peer](_load(request.teacher), request)
        model.to(getattr(torch, _stored(request.teacher))).save_pretrained(request.out)
    for pattern in TOKENIZER:
        for file in request.teacher.glob(pattern):
            shutil.copy(file, request.out / file.name)
    kept = inner(_load(request.out)) / inner(_load(request.teacher))
    request.out.rename(whole)
    print(f"{request.peer}: {kept:.2%} of the parameters outside the embeddings stay, {whole}")


if __name__ == "__main__":
    main()
