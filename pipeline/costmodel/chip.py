"""A chip as data: what its cores, buffers and memory do in a second, mirrored by conf/device/chip/."""

from dataclasses import dataclass

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "int8": 1}


@dataclass(frozen=True)
class Chip:
    """One device: an NPU (or one die of it), a GPU or a CPU. Bytes, seconds, bytes per second; megahertz of the cores.

    A "core" is what runs one matrix tile at a time: cube core, streaming multiprocessor, processor core.
    Raise ValueError where a matrix tile does not fit the buffers it is made for.
    """

    name: str
    kind: str  # npu | cuda | cpu
    cube_cores: int
    vector_cores: int
    megahertz: float
    macs_bf16: float  # multiply-accumulates per cube core and cycle
    macs_fp32: float
    macs_int8: float
    cube_edge: int  # the matrix unit pads every side of a tile to a multiple of this
    tiles: tuple[
        tuple[int, int], ...
    ]  # matrix tiles (rows, columns) the library may choose from; the first is its default
    l0a_bytes: int
    l0b_bytes: int
    l0c_bytes: int
    l1_bytes: int
    ub_bytes: int
    hbm_bytes: float
    hbm_bandwidth: float
    l2_bandwidth: float
    vector_bandwidth: float  # what the vector cores reach from HBM
    core_bandwidth: float  # what one core reaches from HBM
    core_l2_bytes: float  # what one core reaches from L2 in a cycle
    align_bytes: int  # the inner axis of a row-major matrix moves at full speed in multiples of this
    block_bytes: int  # and at block_share in multiples of this, at ragged_share otherwise
    block_share: float
    ragged_share: float
    vector_ragged_share: float  # the same for vector operations whose rows are no multiple of align_bytes
    row_major_factor: float  # weights kept row-major, not in the chip's own tiled format: traffic, aligned rows
    row_major_ragged_factor: float  # and other rows
    launch_seconds: float  # one operation, whatever its size
    layer_seconds: float  # one layer, beyond its operations: a framework's small steps
    cube_efficiency: float  # share of the peak the matrix unit reaches
    memory_efficiency: float  # share of hbm_bandwidth and l2_bandwidth the matrix operation reaches
    overlap: float  # share of the shorter of arithmetic and traffic hidden behind the longer
    attention_efficiency: float  # share of the peak that fused attention reaches
    link_bandwidth: float  # one device to its node, one direction
    network_bandwidth: float  # one device to other nodes, one direction
    link_seconds: float  # one collective, whatever its size
    devices_per_node: int

    def __post_init__(self):
        object.__setattr__(self, "tiles", tuple((int(rows), int(columns)) for rows, columns in self.tiles))
        if not self.tiles:
            raise ValueError(f"device.chip.tiles of {self.name} is empty; give at least one [rows, columns]")
        for rows, columns in self.tiles:
            sides = ((rows * columns * 4, "l0c"), (rows * 16 * 2 * 2, "l0a"), (columns * 16 * 2 * 2, "l0b"))
            for needed, buffer in sides:
                if needed > getattr(self, f"{buffer}_bytes"):
                    raise ValueError(
                        f"device.chip.tiles of {self.name}: {rows}x{columns} needs {needed} bytes of "
                        f"{buffer}_bytes ({getattr(self, f'{buffer}_bytes')}); give a smaller tile"
                    )

    @property
    def hertz(self) -> float:
        return self.megahertz * 1e6

    def macs(self, precision: str) -> float:
        """Multiply-accumulates of one core in a second."""
        return getattr(self, f"macs_{precision}") * self.hertz

    def peak_flops(self, precision: str) -> float:
        """Floating-point operations of the whole chip in a second, two for each multiply-accumulate."""
        return 2.0 * self.cube_cores * self.macs(precision)
