"""Local distillation before recovery, by what is trained together and how its error is weighed: an FFN, or more.

    python benchmarks/quality/run.py --rows best_no_blocks --removed 25
    python benchmarks/local_learning.py --run runs/quality/best_no_blocks-25-0 --texts a.txt,b.txt
        [--ways ffn,layer,window,fisher] [--tokens 65536] [--batch 1] [--rate 0.015]

Every way begins with the start of the run, goes through its layers, and trains some matrices on the run's calibration
text so that the student's stream comes back to the teacher's, each token's squared distance over the square of the
teacher's stream. Printed is the perplexity over the teacher's on texts of your own: files, 8192 tokens of each.

  ffn     the matrices of one FFN after another, which is what the stage does
  layer   the attention of a layer learns beside its FFN
  window  three layers learn together, for the stream behind the third
  fisher  FFNs; the distance is measured by the Fisher information of the stream, E[g gᵀ] with g the gradient of
          -log p(y) in the stream and y drawn from the teacher, half and half with the plain one
"""

import math
from copy import deepcopy
from pathlib import Path

import torch
from arguments import at_least, described, existing, folder_with, several, some_of
from torch import Tensor, nn

from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.distill.local import BETAS, FLOOR, WARMUP
from pipeline.distill.schedule import learning_rate
from pipeline.evaluation.perplexity import tally
from pipeline.runtime.device import BACKENDS, missing, open_device
from pipeline.runtime.model_loader import load_model, load_tokenizer

WAYS = {"ffn": (1, False, False), "layer": (1, True, False), "window": (3, True, False), "fisher": (1, False, True)}
MEASURED = 8192  # tokens of a text
FISHER = 64  # sequences


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--run", type=folder_with("teacher", "start", "tokens/calibration"), required=True)
    parser.add_argument("--texts", type=several(existing), required=True, help="files to measure on, by commas")
    parser.add_argument("--ways", type=some_of(WAYS), default=",".join(WAYS))
    parser.add_argument("--tokens", type=at_least(1), default=65536)
    parser.add_argument("--batch", type=at_least(1), default=1, help="sequences of a step")
    parser.add_argument("--rate", type=float, default=0.015, help="of a matrix's root mean square")
    parser.add_argument("--device", choices=("auto", *BACKENDS), default="auto")
    options = parser.parse_args()
    if options.device != "auto" and (fault := missing(options.device)):
        parser.error(f"--device: {options.device} cannot run here: {fault}; or leave it auto")
    place = open_device(options.device, "auto", False, 0, 0).torch
    teacher = loaded(options.run / "teacher", place)
    texts = {file: encoded(file, options.run / "teacher") for file in options.texts}
    ids = torch.cat(list(beginning(Packed(options.run / "tokens" / "calibration"), options.tokens, 1, 0, 1, 0))).to(
        place
    )
    dense = measured(teacher, texts)
    report("not distilled", measured(loaded(options.run / "start", place), texts), dense)
    for way in options.ways:
        together, whole, weighed = WAYS[way]
        student = loaded(options.run / "start", place)
        metrics = fisher(teacher, ids[:FISHER]) if weighed else None
        through(teacher, student, ids, together, whole, metrics, options)
        report(way, measured(student, texts), dense)


def through(teacher, student, ids: Tensor, together: int, whole: bool, metrics: list[Tensor] | None, options) -> None:
    """Train windows of `together` layers one after another; both streams are held for all of the text."""
    pass_on = Layers(teacher, ids.shape[1])
    with torch.no_grad():
        read, wanted = student.model.embed_tokens(ids), teacher.model.embed_tokens(ids)
    layers = student.model.layers
    for first in range(0, len(layers), together):
        window = layers[first : first + together]
        wanted = pass_on.all(teacher.model.layers[first : first + together], wanted)
        learnt = nn.ModuleList(deepcopy(layer).float() for layer in window)
        metric = metrics[first + len(window) - 1] if metrics else None
        train(learnt, pass_on, read, wanted, matrices(learnt, whole), metric, options)
        for layer, better in zip(window, learnt, strict=True):
            layer.load_state_dict(better.state_dict())
        read = pass_on.all(window, read)


def matrices(layers: nn.ModuleList, whole: bool) -> list[nn.Parameter]:
    """Return what learns, and let nothing else have a gradient."""
    for name, weight in layers.named_parameters():
        weight.requires_grad_(weight.dim() > 1 and (whole or ".mlp." in name))
    return [weight for weight in layers.parameters() if weight.requires_grad]


def train(layers, pass_on: "Layers", read: Tensor, wanted: Tensor, learns, metric: Tensor | None, options) -> None:
    """Once through the text, by Adam, at a share of each matrix's root mean square that falls along a cosine."""
    peaks = [options.rate * float(weight.detach().square().mean().sqrt()) for weight in learns]
    optimizer = torch.optim.Adam([{"params": [weight]} for weight in learns], betas=BETAS)
    batches = torch.randperm(len(read), generator=torch.Generator().manual_seed(0)).split(options.batch)
    for step, chosen in enumerate(batches):
        share = learning_rate("cosine", step, len(batches), 1.0, WARMUP, FLOOR)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        aim = wanted[chosen].float()
        with torch.autocast(read.device.type, torch.bfloat16):
            stream = pass_on.one(layers, read[chosen])
        distance = (stream.float() - aim) / aim.norm(dim=-1, keepdim=True)
        weighed = distance if metric is None else distance @ metric
        optimizer.zero_grad()
        (distance * weighed).sum(-1).mean().backward()
        optimizer.step()


class Layers:
    """Layers applied to streams [n, t, h] by themselves: causal, with the rotation of the model they are of."""

    def __init__(self, model, length: int):
        places = torch.arange(length, device=model.device)[None]
        self.turns = model.model.rotary_emb(torch.zeros(1, device=model.device, dtype=model.dtype), places)

    def one(self, layers, stream: Tensor) -> Tensor:
        """Return what the layers make of a batch, with gradients where they are on."""
        for layer in layers:
            out = layer(stream, position_embeddings=self.turns, attention_mask=None)
            stream = out[0] if isinstance(out, tuple) else out
        return stream

    @torch.no_grad()
    def all(self, layers, stream: Tensor) -> Tensor:
        """Return what the layers make of the whole text."""
        return torch.cat([self.one(layers, batch) for batch in stream.split(8)])


def fisher(teacher, ids: Tensor) -> list[Tensor]:
    """Return for each layer [h, h]: half of E[|h|² g gᵀ], mean diagonal one, and half of the identity."""
    pass_on, sums = Layers(teacher, ids.shape[1]), [0.0] * len(teacher.model.layers)
    draw = torch.Generator(ids.device).manual_seed(0)
    for row in ids.split(1):
        stream, seen = teacher.model.embed_tokens(row).detach().requires_grad_(True), []
        for layer in teacher.model.layers:
            stream = pass_on.one([layer], stream)
            stream.retain_grad()
            seen.append(stream)
        logits = teacher.lm_head(teacher.model.norm(stream))[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).flatten()
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for number, each in enumerate(seen):
            scaled = (each.grad.float() * each.detach().float().norm(dim=-1, keepdim=True)).flatten(0, 1)
            sums[number] = sums[number] + scaled.T @ scaled
    return [0.5 * each / each.diagonal().mean() + 0.5 * torch.eye(len(each), device=each.device) for each in sums]


def loaded(folder: Path, place: torch.device):
    model = load_model(folder, torch.bfloat16, "sdpa").to(place)
    return model.requires_grad_(False)


def encoded(file: Path, teacher: Path) -> Tensor:
    ids = load_tokenizer(teacher)(file.read_text(), add_special_tokens=False)["input_ids"][:MEASURED]
    return torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)


def measured(model, texts: dict[Path, Tensor]) -> list[float]:
    """Return the perplexity on each text."""
    tallies = [tally(model, rows.split(4), 2048) for rows in texts.values()]
    return [math.exp(float(each[0] / each[2])) for each in tallies]


def report(name: str, student: list[float], dense: list[float]) -> None:
    ratios = (f"{each / whole:.3f}" for each, whole in zip(student, dense, strict=True))
    print(f"{name:14}", *ratios, flush=True)


if __name__ == "__main__":
    main()
