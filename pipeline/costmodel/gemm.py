"""How long one operation takes on a chip: matrix product, vector operation, collective. Seconds, from sizes."""

from math import ceil

from pipeline.costmodel.chip import ELEMENT_BYTES, Chip


def gemm_seconds(
    chip: Chip,
    m: int,
    n: int,
    k: int,
    precision: str,
    tile: tuple[int, int] | None = None,
    row_major: bool = False,
    weights: float = 1.0,
) -> float:
    """Time of [m, k] x [k, n]: whole tiles in waves over the cores, against memory, against what one core can fetch.

    T = launch + max(cube, memory, core) where the chip overlaps them; formulas and provenance in docs/chip_model.md.
    Without a `tile` the library is taken to choose its best one. `row_major`: the weight is not stored in the chip's
    tiled format. `weights`: how many weights [k, n] the rows are multiplied with, each row with one of them (a grouped
    product).
    """
    tiles = chip.tiles if tile is None else (tile,)
    times = []
    for each in tiles:
        cube, memory, core = gemm_terms(chip, m, n, k, precision, each, row_major, weights)
        traffic = max(memory, core)
        times.append(max(cube, traffic) + (1.0 - chip.overlap) * min(cube, traffic))
    return chip.launch_seconds + min(times)


def gemm_terms(
    chip: Chip,
    m: int,
    n: int,
    k: int,
    precision: str,
    tile: tuple[int, int],
    row_major: bool = False,
    weights: float = 1.0,
) -> tuple[float, float, float]:
    """Return the cube, memory and core terms of a matrix product with one tile, in seconds."""
    size = ELEMENT_BYTES[precision]
    rows, columns = ceil(m / tile[0]), ceil(n / tile[1])
    tile_m, tile_n = min(tile[0], m), min(tile[1], n)
    waves = ceil(rows * columns / chip.cube_cores)
    edge = chip.cube_edge
    macs = _up(tile_m, edge) * _up(tile_n, edge) * _up(k, edge)
    cube = waves * macs / chip.macs(precision) / chip.cube_efficiency

    weight = _weight_factor(chip, k * size) if row_major else 1.0
    left, right = m * k * size / row_share(chip, k * size), n * k * size * weight
    unique, out = left + weights * right, m * n * size / row_share(chip, n * size)
    reads = columns * left + max(rows, weights) * right  # every block reads its rows and its columns whole
    memory = ((unique + out) / chip.hbm_bandwidth + (reads - unique) / chip.l2_bandwidth) / chip.memory_efficiency

    fresh = unique / reads  # share of a core's reads that come from HBM, the rest from L2
    pace = fresh / chip.core_bandwidth + (1.0 - fresh) / (chip.core_l2_bytes * chip.hertz)
    wide = tile_m / row_share(chip, k * size) + tile_n * weight
    return cube, memory, waves * size * k * wide * pace


def row_share(chip: Chip, row_bytes: int) -> float:
    """Share of the bandwidth that a matrix with rows of this many bytes reaches."""
    if row_bytes % chip.align_bytes == 0:
        return 1.0
    return chip.block_share if row_bytes % chip.block_bytes == 0 else chip.ragged_share


def vector_seconds(chip: Chip, moved_bytes: float, row_bytes: int) -> float:
    """Time of an element-wise operation that moves this many bytes between memory and the vector cores."""
    share = 1.0 if row_bytes % chip.align_bytes == 0 else chip.vector_ragged_share
    return chip.launch_seconds + moved_bytes / share / chip.vector_bandwidth


def allreduce_seconds(chip: Chip, payload_bytes: float, ranks: int) -> float:
    """Time to sum a tensor over ranks: a ring, 2 (r − 1)/r of its bytes leave every rank at the slowest link's rate."""
    return 0.0 if ranks == 1 else _collective(chip, 2.0 * payload_bytes, ranks)


def gather_seconds(chip: Chip, payload_bytes: float, ranks: int) -> float:
    """Time to gather a sharded tensor, or to sum and scatter one: (r − 1)/r of its bytes leave every rank."""
    return 0.0 if ranks == 1 else _collective(chip, payload_bytes, ranks)


def _collective(chip: Chip, sent_bytes: float, ranks: int) -> float:
    bandwidth = chip.link_bandwidth if ranks <= chip.devices_per_node else chip.network_bandwidth
    return chip.link_seconds + sent_bytes * (ranks - 1) / ranks / bandwidth


def _weight_factor(chip: Chip, row_bytes: int) -> float:
    return chip.row_major_factor if row_bytes % chip.align_bytes == 0 else chip.row_major_ragged_factor


def _up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple
