"""Compile every Triton kernel, with no accelerator at hand, and measure how many tiles each holds at once.

PyPI's Triton brings NVIDIA's assembler; triton-ascend brings its own lowering to structured vector code (what follows
that needs CANN). A script and not a test: a process that interprets kernels cannot compile them.
"""

import json
import re
import sys
from dataclasses import dataclass

from fused.budget import KERNELS

# Constants of each kernel's variants, by the kernel's name in the budget.
FLAGS = {
    "rms_norm_forward": [{"TAIL": True}, {"TAIL": False}],
    "rms_norm_backward": [{"TAIL": True}],
    "gain_gradient": [{}],
    "swiglu_forward": [{"TAIL": True}],
    "swiglu_backward": [{"TAIL": True}],
    "rotary_tiles": [
        {"BACKWARD": True, "INTERLEAVE": False, "MASKED": False, "TOKENS": 32, "PAIRS": 64, "SPAN": 64},
        {"BACKWARD": False, "INTERLEAVE": True, "MASKED": True, "TOKENS": 32, "PAIRS": 40, "SPAN": 64},
    ],
    "kl_of_logits_rows": [{"KIND": kind, "TAIL": True} for kind in ("forward_kl", "reverse_kl", "jsd")],
}
FLOATS = {"eps", "offset", "cold", "factor", "beta", "log_beta", "log_rest"}
SINGLE = {"inverses", "partial", "loss"}  # pointers to float32 always
POINTERS = {
    "x", "residual", "gain", "y", "total", "dy", "dtotal", "dx", "scale", "gate", "up", "dgate", "dup", "cos", "sin",
    "student", "teacher",
}  # fmt: skip


def compile_all(dtype: str) -> list[dict]:
    """A record per variant: its kernel and flags, the `size` of the code for its `target`, and what its tiles hold.

    `live`: bytes per element of the tiles alive at once. `compares`: integer tiles compared in a loop over blocks.
    """
    from fused import triton_loss, triton_norm, triton_pointwise

    records = []
    for name, cases in FLAGS.items():
        module = next(m for m in (triton_loss, triton_norm, triton_pointwise) if hasattr(m, name))
        kernel = getattr(module, name)
        for flags in cases:
            constants = dict(flags) if "TOKENS" in flags else flags | {"BLOCK": KERNELS[name].block}
            types = {}
            for argument in kernel.arg_names:
                if argument in POINTERS | SINGLE:
                    types[argument] = "*fp32" if argument in SINGLE else f"*{dtype}"
                elif argument not in constants:
                    types[argument] = "fp32" if argument in FLOATS else "i32"
            records.append({"kernel": name, "flags": flags, **compile_one(kernel, types, constants)})
    return records


def compile_one(kernel, types: dict, constants: dict) -> dict:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "ascend" in backends:
        from triton._C.libtriton import ir
        from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg

        backend = AscendBackend(GPUTarget("npu", "Ascend910B", 0))
        options, context = backend.parse_options({}), ir.context()
        ir.load_dialects(context)
        source = ASTSource(kernel, types, constants)
        module = source.make_ir(options, backend.get_codegen_implementation(), {}, context)
        metadata = {"hash": kernel.__name__, **options.__dict__}
        tiles = make_ttir(module, metadata, options)
        code = ttir_to_linalg(tiles, metadata, options, named_ops=True)
        return {"target": "linalg", "size": len(code), **of_tiles(str(tiles))}

    import triton

    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return {"target": "cubin", "size": len(compiled.asm["cubin"]), **of_tiles(compiled.asm["ttir"])}


def of_tiles(code: str) -> dict:
    lines = [re.sub(r" loc\([^()]*(\([^()]*\))?\)", "", line).strip() for line in code.splitlines()]
    return {"live": live_bytes(lines), "compares": block_compares(lines)}


def block_compares(lines: list[str]) -> int:
    """Comparisons of integer tiles inside a loop inside the loop over rows."""
    open_, found = [], 0
    for line in lines:
        if line.startswith("}"):
            open_.pop()
        found += sum(open_) >= 2 and "arith.cmpi" in line and "tensor<" in line
        if line.endswith("{"):
            open_.append("scf.for " in line)
    return found


def live_bytes(lines: list[str]) -> float:
    """The most bytes per element of floating-point tiles alive at once, in a kernel's intermediate code.

    A tile lives from its definition to its last use, and to the end of every loop that uses it from outside. Pointers
    and offsets do not count: on the chip they become the addresses of whole-block copies.
    """
    elements = max(int(a) * int(b or 1) for a, b in re.findall(r"tensor<(\d+)x(?:(\d+)x)?", " ".join(lines)))
    tiles, regions = [], [Region({}, [], {})]
    for number, line in enumerate(lines):
        if line.startswith("}"):
            closed = regions.pop()
            for tile in closed.used_from_outside:
                tile.last = number
            regions[-1].names.update({n: Tile(number, t.size, number) for n, t in closed.results.items()})
            tiles += [regions[-1].names[n] for n in closed.results]
        names = re.match(r"(%\w+)(?::\d+)? = ", line)
        for used in re.findall(r"%\w+", line.partition(" = ")[2] if names else line):
            for depth in range(len(regions) - 1, -1, -1):
                if used in regions[depth].names:
                    tile = regions[depth].names[used]
                    tile.last = number
                    for inner in regions[depth + 1 :]:
                        inner.used_from_outside.append(tile)
                    break
        if line.endswith("{"):
            types = line.rpartition("-> (")[2].rstrip("){ ").split(", ") if "-> (" in line else []
            carried = re.findall(r"(%\w+) = %\w+", line.partition("iter_args(")[2].partition(")")[0])
            held = {n: Tile(number, size_of(t), number) for n, t in zip(carried, types) if size_of(t)}
            given = sum(map(size_of, types))
            results = {names[1]: Tile(number, given, number)} if names and given else {}
            regions.append(Region(held, list(held.values()), results))
            tiles += held.values()
        elif names and size_of(result_type(line)):
            regions[-1].names[names[1]] = Tile(number, size_of(result_type(line)), number)
            tiles.append(regions[-1].names[names[1]])
    return max(sum(t.size for t in tiles if t.born <= at <= t.last) for at in range(len(lines))) / elements


@dataclass
class Tile:
    born: int
    size: int
    last: int


@dataclass
class Region:
    names: dict[str, Tile]
    used_from_outside: list[Tile]
    results: dict[str, Tile]  # what the operation around it gives once it is closed


def result_type(line: str) -> str:
    """The type of the value a line defines, as written at its end; a load's is what its pointers point to."""
    written = line.rpartition(" : ")[2].rpartition(" -> ")[2].rpartition(" to ")[2].split(", ")[-1]
    if "tt.load" in line:
        written = re.sub(r"!tt.ptr<(\w+)>", r"\1", line.rpartition(" : ")[2])
    return written.rpartition("x")[0] + "xi1>" if "arith.cmp" in line else written


def size_of(written: str) -> int:
    """Bytes of a floating-point tile, 0 for anything else."""
    tile = re.search(r"tensor<(\d+)x(?:(\d+)x)?(f32|f16|bf16)>", written)
    return int(tile[1]) * int(tile[2] or 1) * (4 if tile[3] == "f32" else 2) if tile else 0


if __name__ == "__main__":
    print(json.dumps([record for dtype in sys.argv[1:] for record in compile_all(dtype)]))
