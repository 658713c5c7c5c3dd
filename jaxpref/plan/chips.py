"""Specifications of TPU chips, and topologies of slices."""

import dataclasses
import math
import re

from jaxpref.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as a program sees it: a chip, or half of one for TPU7x."""

    name: str
    """Name of the generation in Cloud TPU's documentation."""
    flops: float
    """Peak rate of bfloat16 products, floating-point operations per second."""
    hbm_bytes: float
    """Memory available to programs."""
    hbm_bandwidth: float
    """Bytes per second between memory and chip."""
    ici_bandwidth: float
    """Bytes per second in one direction, over all links to other chips."""
    dcn_bandwidth: float
    """Bytes per second received from chips of other slices."""
    axes: int
    """Dimensions of the torus."""
    config: str = "default"
    """The compiler's chip configuration: "megacore" combines two cores in a device."""
    devices: int = 1
    """Devices per chip."""
    example: str = ""
    """An example topology, for error messages."""


# Sources: Cloud TPU's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", and "TPU7x
# (Ironwood)", section "System architecture", docs.cloud.google.com/tpu/docs.
#
# Links: the pages give the bandwidth in both directions (v5e 400, v5p 1,200, v6e 800,
# TPU7x 1,200 GBps); older versions give one direction (1,600, 4,800, 3,200 Gbps), as
# here.  They do not give v4's: 6 links of 50 GB/s, Jouppi et al. 2023,
# arXiv:2304.01433, table 4.
#
# Memory: v5e's bandwidth is 819 GBps in older versions and 800 GiBps in newer ones.
# The sizes are those that the compiler (libtpu 0.0.52) reports as available when a
# program is too large: a little less than the pages' 32, 16, 95, 32, and 192 GiB, but
# for v5p a little more.
#
# Network between slices: v5p 50 Gbps per chip, v6e and TPU7x 100, v5e 6.4 Tbps for 256
# chips.  The pages do not give v4's, which is assumed to equal v5p's.
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
"""Chips by the name that begins a topology."""


GCLOUD = {
    "v4": ("v4", 2),
    "v5litepod": ("v5e", 1),
    "v5p": ("v5p", 2),
    "v6e": ("v6e", 1),
}
"""gcloud's accelerator types: the chip, and the number in the type per chip (of cores
where a chip has two)."""
SHAPES = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16",
}
"""The shapes of slices that gcloud makes for an accelerator type, by torus axes."""


MOST_VIRTUAL, MOST_DEVICES = 4096, 2**17
"""Maximum number of devices in a plan: virtual ones on CPU, and TPU devices."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, or virtual devices on CPU."""

    name: str
    """The name given by the user: `v5p:4x4x8`, `2xv5e:16x16`, or `cpu:8`."""
    chip: Chip | None
    """None for CPU."""
    devices: int
    """Number of devices of a program, over all slices."""
    slices: int = 1
    """Number of slices, all of the same shape."""

    @property
    def slice(self) -> str:
        """Name of one of the slices, as in libtpu."""
        return self.name.removeprefix(f"{self.slices}x")


def _checked(name: str, devices: int, most: int) -> int:
    if devices > most:
        raise InputError(
            f"--topology {name}: {devices:,} devices; the limit is {most:,}"
        )
    return devices


def shape_of(kind: str) -> str | None:
    """The topology of one of gcloud's accelerator types; None for other names.

    For example, `v5litepod-16` is `v5e:4x4`, and `v5p-128` is `v5p:4x4x4`.
    """
    name, _, count = kind.partition("-")
    if name not in GCLOUD or not re.fullmatch(r"[1-9]\d{0,5}", count):
        return None
    generation, per_chip = GCLOUD[name]
    for shape in SHAPES[CHIPS[generation].axes].split():
        if math.prod(map(int, shape.split("x"))) * per_chip == int(count):
            return f"{generation}:{shape}"
    return None


def parse_topology(name: str) -> Topology:
    """Parses `GENERATION:AxB[xC]`, or one of gcloud's accelerator types, or `cpu:N`.

    `Nx` before it is N slices.

    Raises:
      InputError: if the name has none of these forms.
    """
    several = re.match(r"([2-9]|[1-9]\d+)x", name)
    slices = int(several[1]) if several else 1
    kind = name[several.end() if several else 0 :]
    if (shape := shape_of(kind)) is not None:
        name = f"{slices}x{shape}" if several else shape
        kind = shape
    kind, _, size = kind.partition(":")
    if kind == "cpu" and slices == 1 and re.fullmatch(r"[1-9]\d*", size):
        return Topology(name, None, _checked(name, int(size), MOST_VIRTUAL))
    chip = CHIPS.get(kind)
    if chip and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.axes - 1}}}", size):
        chips = slices * math.prod(map(int, size.split("x")))
        devices = _checked(name, chips * chip.devices, MOST_DEVICES)
        return Topology(name, chip, devices, slices)
    known = ", ".join(f"{k}:{chip.example}" for k, chip in CHIPS.items())
    raise InputError(
        f"--topology {name}: unknown topology; use one like {known} (in any size), an "
        "accelerator type like v5litepod-16 or v5p-128, 2xv5e:4x4 for two slices, or "
        "cpu:8 for eight virtual devices"
    )
