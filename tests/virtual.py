"""How tests have XLA work: on virtual devices, compiled in a hurry."""

from importlib.metadata import version


def xla_flags(devices: int = 8) -> str:
    """The value of XLA_FLAGS, for processes that import jax later."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        # Most of the time is LLVM's, for programs that run once: 0.6 of it remains.
        # Benchmarks and experiments in full have the defaults.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Eight devices on two busy cores may wait long for each other: XLA would abort.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "--xla_cpu_collective_timeout_seconds=300",
    ]
    if version("jaxlib").startswith("0.10."):
        # The older code generator compiles in a third of the time, though large
        # programs run slower.  Later versions do not have it, and abort at the flag.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def xla_flags_of_tpus() -> str:
    """Those that libtpu knows too; it ends the process at any other."""
    return "--xla_force_host_platform_device_count=8"
