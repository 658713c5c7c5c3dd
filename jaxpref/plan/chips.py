"""What a TPU chip can do, and the slices that are built of them."""

import dataclasses
import math
import re

from jaxpref.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as a program sees it: a chip, of TPU7x half of one."""

    name: str
    """As the documents call its generation."""
    flops: float
    """Peak of bfloat16 products, floating-point operations a second."""
    hbm_bytes: float
    """Memory for programs."""
    hbm_bandwidth: float
    """Bytes a second between memory and chip."""
    ici_bandwidth: float
    """Bytes a second that all its links to other chips carry in one direction."""
    dcn_bandwidth: float
    """Bytes a second that it receives of chips of other slices."""
    axes: int
    """Dimensions of the torus."""
    config: str = "default"
    """How the compiler is to see the chip's cores: "megacore" makes two one device."""
    devices: int = 1
    """Devices of a chip."""
    example: str = ""
    """A topology."""


# Sources: Cloud TPU's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x
# (Ironwood)", section "System architecture", docs.cloud.google.com/tpu/docs.  They give
# the links' bandwidth in both directions (v5e 400, v5p 1,200, v6e 800, TPU7x 1,200
# GBps), older versions in one (1,600, 4,800, 3,200 Gbps), which it is here.  v4's does
# not stand there: 6 links of 50 GB/s, Jouppi et al. 2023, arXiv:2304.01433, table 4.
# v5e's memory has 819 GBps in older versions, 800 GiBps in newer ones.  Its size is
# what the compiler (libtpu 0.0.52) says is left to a program when one is too large: a
# little less than the pages' 32, 16, 95, 32 and 192 GiB, of v5p a little more.  Of the
# network between slices they give v5p 50 and v6e and TPU7x 100 Gbps a chip, v5e 6.4
# Tbps for 256 chips; v4 is taken to have v5p's, for which there is no page.
CHIPS = {
    "v4": Chip(
        "TPU v4",
        275e12,
        30.75 * GIB,
        1.2e12,
        300e9,
        6.25e9,
        3,
        "megacore",
        example="4x4x4",
    ),
    "v5e": Chip(
        "TPU v5e", 197e12, 15.75 * GIB, 0.819e12, 200e9, 3.125e9, 2, example="4x4"
    ),
    "v5p": Chip(
        "TPU v5p",
        459e12,
        95.73 * GIB,
        2.765e12,
        600e9,
        6.25e9,
        3,
        "megacore",
        example="4x4x4",
    ),
    "v6e": Chip(
        "TPU v6e", 918e12, 31.24 * GIB, 1.6e12, 400e9, 12.5e9, 2, example="4x4"
    ),
    # A chip has two devices, each with half of everything.
    "tpu7x": Chip(
        "TPU7x",
        1153.5e12,
        94.74 * GIB,
        3.69e12,
        300e9,
        6.25e9,
        3,
        devices=2,
        example="4x4x4",
    ),
}
"""By the name that begins a topology."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, or virtual devices of this machine's CPU."""

    name: str
    """As given: `v5p:4x4x8`, `2xv5e:16x16` or `cpu:8`."""
    chip: Chip | None
    """None for a CPU."""
    devices: int
    """How many a program sees, on all slices."""
    slices: int = 1
    """How many there are, all alike."""

    @property
    def slice(self) -> str:
        """One of the slices, as libtpu calls it."""
        return self.name.removeprefix(f"{self.slices}x")


def parse_topology(name: str) -> Topology:
    """`GENERATION:AxB` or `GENERATION:AxBxC` of chips, `Nx` that for N slices, `cpu:N`.

    Raises:
      InputError: if it is none of these.
    """
    several = re.match(r"([2-9]|[1-9]\d+)x", name)
    slices = int(several[1]) if several else 1
    kind, _, size = name[several.end() if several else 0 :].partition(":")
    if kind == "cpu" and slices == 1 and re.fullmatch(r"[1-9]\d*", size):
        return Topology(name, None, int(size))
    chip = CHIPS.get(kind)
    if chip and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.axes - 1}}}", size):
        chips = slices * math.prod(map(int, size.split("x")))
        return Topology(name, chip, chips * chip.devices, slices)
    known = ", ".join(f"{k}:{chip.example}" for k, chip in CHIPS.items())
    raise InputError(
        f"--topology {name}: not a topology that is known; give one like {known}, with "
        "other sizes if you like, 2xv5e:4x4 for two slices, or cpu:8 for eight virtual "
        "devices"
    )
