"""Static limits of the Triton kernels on an Ascend vector core, checked without one.

Triton's interpreter sees none of this: a kernel that overflows the unified buffer (UB), starts too many programs or
moves misaligned blocks is right on a CPU and fails or crawls on the chip. So the block sizes are here, beside what
each kernel keeps alive, and the limits are arithmetic on them. Nothing here imports Triton.
"""

from dataclasses import dataclass

MAX_GRID = 65535  # programs of one launch
ALIGN = 32  # bytes, the unit in which UB is read and written
BUFFERS = 2  # the next block is loaded while this one is computed


@dataclass(frozen=True)
class Footprint:
    """`block`: elements of one tile, at most. `live`: bytes per element of the tiles alive at the fullest point.

    `live` is the most that PyPI's Triton and triton-ascend leave alive, for any input dtype;
    tests/numerics/test_kernels_compiled.py measures it.
    """

    block: int
    live: int


KERNELS = {
    "rms_norm_forward": Footprint(block=2048, live=30),
    "rms_norm_backward": Footprint(block=2048, live=34),
    "gain_gradient": Footprint(block=2048, live=22),
    "swiglu_forward": Footprint(block=2048, live=22),
    "swiglu_backward": Footprint(block=2048, live=30),
    "rotary_tiles": Footprint(block=2048, live=32),
    "kl_of_logits_rows": Footprint(block=1024, live=86),
}


def problems(kernel: str, width: int, itemsize: int, vector_cores: int, ub_bytes: int) -> list[str]:
    """What keeps one kernel from running well on a chip; empty if nothing does.

    `width`: elements of a row (rotary: pairs of a head). `itemsize`: bytes of an input element. `vector_cores`,
    `ub_bytes`: the chip's.
    """
    footprint = KERNELS[kernel]
    found = []
    room, need = ub_bytes // BUFFERS, footprint.block * footprint.live
    if need > room:
        found.append(f"{kernel} keeps {need} bytes alive of {room} (UB halved to double-buffer); use smaller blocks")
    if vector_cores > MAX_GRID:
        found.append(f"{kernel} would start {vector_cores} programs, more than {MAX_GRID}")
    if footprint.block * itemsize % ALIGN:
        found.append(f"{kernel} moves blocks of {footprint.block * itemsize} bytes, not a multiple of {ALIGN}")
    if width * itemsize % ALIGN:
        found.append(f"{kernel} walks rows of {width * itemsize} bytes, not a multiple of {ALIGN}")
    return found
