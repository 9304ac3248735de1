"""The rows of the table: what each is called and how the pipeline is configured for it. Data, and nothing else."""

from dataclasses import dataclass

GROUPS = {
    "recipes": "Recipes",
    "ablations": "One thing changed",
    "baselines": "Simple baselines",
    "peers": "Other tools, recovered here",
}
TEXTS = ("topics", "docstrings")  # calibration and recovery of every row
UNSEEN = ("readmes", "jargon")  # read by no row before it is measured
UNCUT = "nobody"  # in the place of a tool: the dense model is its own start
COMMON = (
    "data.split.evaluation=0.1",
    "score.tokens=16384",
    "rotate.tokens=32768",
    "restore.tokens=32768",
    "plan.depth_tokens=1024",
    "supernet.rounds=1",
    "distill.tokens=60000",
    "distill.global_batch_size=2",
    "distill.micro_batch_size=2",
    "evaluate.tokens=4096",
    "evaluate.words=96",
    "evaluate.words_context=200",
    "report.samples=0",
)


@dataclass(frozen=True)
class Written:
    """Text that the teacher writes for a row: so many tokens in so long texts, and its weight beside each of TEXTS."""

    tokens: int
    weight: int
    length: int = 256
    batch: int = 64


@dataclass(frozen=True)
class Row:
    """A line of the table. `settings` hold always, `recovered` and `bare` only with or without recovery.

    `trains` names the stage that spends the recovery tokens; `peer` is the tool whose start is recovered, or UNCUT.
    Where the teacher `writes` for it, calibration and recovery read that too, in place of as many tokens of the text of
    all rows. `kinds` names mixed-domain text (broad.py), and its weight beside each of TEXTS.
    """

    label: str
    group: str
    settings: tuple[str, ...]
    recovered: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    trains: str = "distill"
    peer: str | None = None
    writes: Written | None = None
    kinds: tuple[str, int] | None = None

    @property
    def of_a_tool(self) -> bool:
        """Whether its start is another tool's."""
        return self.peer not in (None, UNCUT)


def _recipe(name: str, label: str, *settings: str, group: str = "recipes", **more) -> Row:
    return Row(label, group, (f"recipe={name}", *settings), **more)


def _ablation(name: str, label: str, *settings: str, **more) -> Row:
    return _recipe(name, label, *settings, group="ablations", **more)


def _baseline(label: str, *settings: str) -> Row:
    return Row(label, "baselines", ("recipe=pangu_light", "plan.clap=false", "reinit.slnp=false", *settings))


def _peer(name: str, label: str) -> Row:
    return Row(label, "peers", ("recipe=recover",), peer=name)


PRINCIPAL = ("rotate.kind=principal", "plan.channels=leading")
ALL_AXES = ("budget.axes=all", *PRINCIPAL)
BLOCKS = ("local_distill.epochs=3", "local_distill.tokens=65536")
ONCE = ("local_distill.epochs=1", "local_distill.tokens=196608")  # as many steps as BLOCKS
# KV groups may go too, by two whole sequences and units masked alone; all channels stay
BY_MASKS = ("budget.axes=all", "plan.widths=measured", "sensitivity.restored=false", "sensitivity.length=512")
# neurons alone, by 24 beginnings of sequences and what stays restored; no FFN loses more than half
BY_LOSS = ("plan.widths=measured", "sensitivity.levels=[0.25,0.5]", "plan.depth_tokens=3072")
HALF = Written(49152, weight=2)  # half of what a row reads
MOST = Written(2097152, weight=6, length=512, batch=512)  # three quarters
QUARTER = Written(2097152, weight=2, length=512, batch=512)
LITTLE = Written(196608, weight=2, batch=128)  # a sixth beside WIDEST; what a CPU writes in half an hour
BROAD, WIDE = ("broad", 4), ("wide", 4)  # half of what a row reads
WIDEST = ("widest", 8)  # two thirds
ALL = ("all", 16)  # four fifths, and a tenth LITTLE
MILLION = (
    "local_distill.epochs=1",
    "local_distill.tokens=1048576",
    "local_distill.batch_tokens=1024",
)  # for an accelerator
TWO_MILLION = ("local_distill.epochs=1", "local_distill.tokens=2097152", "local_distill.batch_tokens=1024")
MORE = ("restore.tokens=131072", "local_distill.epochs=1", "local_distill.tokens=393216")  # four times, twice of ONCE
MILLION_ONCE = (
    *("restore.tokens=131072", "local_distill.epochs=1", "local_distill.tokens=1048576"),
    "data.split.calibration=0.75",  # recovery reads little
)
# deeper layers want the higher rate (docs/results.md)
TWO_MILLION_ONCE = (*MILLION_ONCE, "local_distill.tokens=2097152", "local_distill.learning_rate=0.02")
TWICE = ("distill.tokens=120000",)
# the teacher learns next tokens of half of the recovery text before anything else; its student recovers from the rest
CORRECTED = ("teacher_correction.tokens=60000", "distill.tokens=60000")
NEXT = ("distill.loss.cross_entropy=4",)  # the tokens of the text weigh four times the dense model's predictions
NO_BLOCKS = ("local_distill.epochs=0",)
BY_SCORES = ("restore.outputs=false", "restore.order=scores")
GATES = (
    "layer_gates.tokens=8192",
    "layer_gates.batch_size=1",
    "layer_gates.learning_rate=3e-2",
)  # 16 steps for each layer that goes


def _of_all_kinds(label: str, *recovered: str, learnt: tuple[str, ...] = MILLION_ONCE) -> Row:
    return _ablation("best", label, *learnt, *BY_LOSS, writes=LITTLE, kinds=ALL, recovered=recovered)


ROWS: dict[str, Row] = {
    # the recipes of conf/recipe, unchanged
    "best": _recipe("best", "best", writes=HALF),
    "pangu_light": _recipe("pangu_light", "Pangu Light"),
    "minitron": _recipe("minitron", "Minitron"),
    "tyr": _recipe("tyr", "Týr-the-Pruner, recovered"),
    # TRSP trains before it deletes and not afterwards: its training is what the others spend on recovery
    "trsp": _recipe("trsp", "TRSP", *GATES, bare=("regularize.norm=none",), trains="regularize"),
    "trsp_recovered": _recipe(
        "trsp",
        "TRSP, half of the tokens after deletion",
        *GATES,
        recovered=("regularize.tokens=30000", "distill.tokens=30000"),
        bare=("regularize.norm=none",),
    ),
    "adapt_pruner": _recipe("adapt_pruner", "Adapt-Pruner"),
    "flap": _recipe("flap", "FLAP, recovered"),
    # Pangu Light: re-initialisation
    "pangu_no_clap": _ablation("pangu_light", "Pangu Light without CLAP", "plan.clap=false"),
    "pangu_no_slnp": _ablation("pangu_light", "Pangu Light without SLNP", "reinit.slnp=false"),
    "pangu_plain": _ablation("pangu_light", "Pangu Light without both", "plan.clap=false", "reinit.slnp=false"),
    # the hidden axis; CLAP off, as a donor's heads are those of another layer in any basis
    "basis_untied": _ablation(
        "pangu_light", "... without CLAP, principal basis, untied", "plan.clap=false", *PRINCIPAL, "rotate.tie=untied"
    ),
    "basis_tied": _ablation(
        "pangu_light", "... without CLAP, principal basis, tie kept", "plan.clap=false", *PRINCIPAL, "rotate.tie=keep"
    ),
    # heads and neurons
    "restored": _ablation(
        "pangu_light", "... without CLAP, outputs restored", "plan.clap=false", "restore.outputs=true"
    ),
    "restored_obs": _ablation(
        "pangu_light", "... the same, OBS order", "plan.clap=false", "restore.outputs=true", "restore.order=obs"
    ),
    "restored_sequence": _ablation(
        "pangu_light", "... the same, layer by layer (accumulation)", "plan.clap=false", "restore.sequential=true"
    ),
    "depth_loss": _ablation(
        "pangu_light", "... without CLAP, depth by measured loss", "plan.clap=false", "plan.depth=loss"
    ),
    "pangu_next": _ablation("pangu_light", "Pangu Light, plus next-token cross-entropy", recovered=NEXT),
    "pangu_blocks": _ablation("pangu_light", "Pangu Light, with local distillation", *BLOCKS),
    # best, one part exchanged
    "best_longer": _ablation("best", "best, twice the recovery", writes=HALF, recovered=TWICE),
    "best_million": _ablation("best", "best, local distillation on 1M tokens", *MILLION, writes=MOST),
    "best_million_longer": _ablation(
        "best", "... the same, twice the recovery", *MILLION, writes=MOST, recovered=TWICE
    ),
    "best_two_million_longer": _ablation(
        "best", "... on 2M tokens, twice the recovery", *TWO_MILLION, writes=MOST, recovered=TWICE
    ),
    "best_broad": _ablation("best", "best on text from six domains", writes=HALF, kinds=BROAD),
    "best_broad_once": _ablation(
        "best", "... local distillation on three times the tokens, once", *ONCE, writes=HALF, kinds=BROAD
    ),
    "best_broad_once_longer": _ablation(
        "best", "... the same, twice the recovery", *ONCE, writes=HALF, kinds=BROAD, recovered=TWICE
    ),
    "best_broad_by_layer": _ablation("best", "... widths by measured loss", *BY_MASKS, writes=HALF, kinds=BROAD),
    "best_wide_longer": _ablation(
        "best",
        "best on more text from thirteen domains, twice the recovery",
        *MORE,
        writes=QUARTER,
        kinds=WIDE,
        recovered=TWICE,
    ),
    "best_wide_by_layer_longer": _ablation(
        "best", "... and widths by measured loss", *MORE, *BY_MASKS, writes=QUARTER, kinds=WIDE, recovered=TWICE
    ),
    "best_widest_by_layer_longer": _ablation(
        "best",
        "... local distillation on 1M tokens from nineteen domains",
        *MILLION_ONCE,
        *BY_LOSS,
        writes=LITTLE,
        kinds=WIDEST,
        recovered=TWICE,
    ),
    "best_all_by_layer_longer": _of_all_kinds("... from 28 domains", *TWICE),
    "best_all_by_layer_next_longer": _of_all_kinds("... the same, plus next-token cross-entropy", *TWICE, *NEXT),
    "best_all_twice_by_layer_next_longer": _of_all_kinds(
        "... and local distillation on 2M tokens", *TWICE, *NEXT, learnt=TWO_MILLION_ONCE
    ),
    "best_all_by_layer_next_steps_longer": _of_all_kinds(
        "... on 1M, in steps of one sequence",
        *TWICE,
        *NEXT,
        "distill.global_batch_size=1",
        "distill.micro_batch_size=1",
    ),
    "best_all_by_layer_corrected_longer": _of_all_kinds("... on 1M, corrected teacher instead", *CORRECTED),
    "best_broad_millions": _ablation(
        "best", "best on 2M tokens from six domains", *TWO_MILLION, writes=QUARTER, kinds=BROAD
    ),
    "best_broad_millions_longer": _ablation(
        "best", "... the same, twice the recovery", *TWO_MILLION, writes=QUARTER, kinds=BROAD, recovered=TWICE
    ),
    "best_broad_millions_by_layer": _ablation(
        "best", "... and widths by measured loss", *TWO_MILLION, *BY_MASKS, writes=QUARTER, kinds=BROAD
    ),
    "best_broad_millions_by_layer_longer": _ablation(
        "best",
        "... the same, twice the recovery",
        *TWO_MILLION,
        *BY_MASKS,
        writes=QUARTER,
        kinds=BROAD,
        recovered=TWICE,
    ),
    "dense_next_longer": Row(
        "The teacher, not pruned, trained with cross-entropy",
        "ablations",
        ("recipe=recover", "data.split.calibration=0.75", "distill.learning_rate=1e-4"),
        peer=UNCUT,
        writes=LITTLE,
        kinds=ALL,
        recovered=(*TWICE, *NEXT),
    ),
    "pangu_broad": _ablation("pangu_light", "Pangu Light on text from six domains", kinds=BROAD),
    "best_by_layer": _ablation("best", "best, widths by measured loss", *BY_MASKS, writes=HALF),
    "best_no_blocks": _ablation("best", "best, no local distillation", *NO_BLOCKS, writes=HALF),
    "best_no_blocks_longer": _ablation(
        "best", "... the same, twice the recovery", *NO_BLOCKS, writes=HALF, recovered=TWICE
    ),
    "best_given": _ablation("best", "best on the given text alone"),
    "best_given_no_blocks": _ablation("best", "best on the given text alone, no local distillation", *NO_BLOCKS),
    "best_scores": _ablation("best", "... and by scores, not restored", *NO_BLOCKS, *BY_SCORES),
    "best_order": _ablation("best", "... and by scores, restored", *NO_BLOCKS, "restore.order=scores"),
    "best_sequence": _ablation(
        "best", "... and layer by layer (accumulation)", *NO_BLOCKS, *BY_SCORES, "restore.sequential=true"
    ),
    "best_measured": _ablation("best", "... and widths by measured loss", *NO_BLOCKS, *BY_MASKS),
    "best_measured_restored": _ablation(
        "best", "... and FFN widths by measured loss after restoration", *NO_BLOCKS, *BY_LOSS
    ),
    "best_all_axes": _ablation("best", "... and all axes narrower", *NO_BLOCKS, "budget.axes=all"),
    "best_untied": _ablation("best", "... and the principal basis, untied", *NO_BLOCKS, *ALL_AXES, "rotate.tie=untied"),
    "best_tied": _ablation("best", "... and the principal basis, tie kept", *NO_BLOCKS, *ALL_AXES, "rotate.tie=keep"),
    # Týr: the search and what it is built on
    "tyr_no_search": _ablation("tyr", "Týr, even widths (no search)", "supernet.generations=0"),
    "tyr_no_accumulation": _ablation("tyr", "Týr without accumulation", "supernet.accumulation=false"),
    # the others
    "trsp_by_loss": _ablation(
        "trsp", "TRSP, layers by measured loss", "plan.depth=loss", bare=("regularize.norm=none",), trains="regularize"
    ),
    "adapt_even": _ablation("adapt_pruner", "Adapt-Pruner, even widths", "plan.amplitude=0"),
    "adapt_at_once": _ablation("adapt_pruner", "Adapt-Pruner in one round", "recipe.rounds=1"),
    "flap_no_bias": _ablation("flap", "FLAP without bias compensation", "reinit.bias_compensation=false"),
    # whole layers, and chance
    "drop_influence": _baseline("Layers of least block influence", "budget.axes=layers"),
    "drop_loss": _baseline("Layers by measured loss", "budget.axes=layers", "plan.depth=loss"),
    "drop_last": _baseline("Last layers", "budget.axes=layers", "plan.depth=last"),
    "drop_clap": _baseline("Layers of least block influence, CLAP", "budget.axes=layers", "plan.clap=true"),
    "random": _baseline(
        "Channels, heads and neurons at random", "plan.channels=random", "plan.heads=random", "plan.neurons=random"
    ),
    # starts that other tools cut
    "optipfair_depth": _peer("optipfair-depth", "OptiPFair, depth"),
    "optipfair_width": _peer("optipfair-width", "OptiPFair, GLU width"),
    "optipfair_width_data": _peer("optipfair-width-data", "OptiPFair, GLU width with calibration"),
    "torch_pruning": _peer("torch-pruning", "Torch-Pruning, magnitude"),
    "mergekit": _peer("mergekit", "mergekit passthrough, last but one layers"),
}
