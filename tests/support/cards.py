"""The graphics cards that are not here, as the kernels' host code sees them: the targets that tests compile for."""

from d3ds2.kernels.devices import KIB, Abilities

# what a kernel's shared memory is compared with; multiprocessors of the card that is named
CARDS = {
    "sm_80": Abilities("A100", "cuda", (8, 0), 163 * KIB, 108, triton=True, flash=True),
    "sm_86": Abilities("RTX 3060", "cuda", (8, 6), 99 * KIB, 28, triton=True, flash=True),
    "sm_89": Abilities("RTX 4090", "cuda", (8, 9), 99 * KIB, 128, triton=True, flash=True),
    "sm_90": Abilities("H200", "cuda", (9, 0), 227 * KIB, 132, triton=True, flash=True),
    "sm_100": Abilities("B200", "cuda", (10, 0), 227 * KIB, 148, triton=True, flash=True),
    "sm_120": Abilities("RTX 5090", "cuda", (12, 0), 99 * KIB, 170, triton=True, flash=True),
    "gfx942": Abilities("MI300X", "hip", (0, 0), 64 * KIB, 304, triton=True),
    "gfx1100": Abilities("RX 7900 XTX", "hip", (0, 0), 64 * KIB, 48, triton=True),
}
