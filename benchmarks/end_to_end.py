r"""How long does the plain command take, from the shell to the exported model?

Times `jaxpref train` and TRL's plain DPOTrainer on the same job: start, read and
tokenize a preference file, load the model, score the reference, compile, take a few
steps, save, and export.  Each run is a separate process; the two systems take turns.

What is the same
    The weights (float32), the file, the loss, the maximum length, the pairs per step,
    the number of steps, and the cores.  Each system takes the pairs in its own order
    and keeps its other defaults: jaxpref also scores and evaluates held-out pairs,
    unless --no-evaluate is given; TRL recomputes activations, keeps the start of long
    sequences, and does not evaluate.

Caches
    cold: the folders of compiled programs, reference scores, and TRL's tokenized data
    are new in every round.  warm: the same command again, with the same folders but
    another output folder.

Commands
    The smallest model, and SmolLM2-135M cut to four layers:

        python -m benchmarks.inputs hh stories260k smollm2
        python -m benchmarks.end_to_end --model inputs/stories260k-hf \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --loss rdpo \
            --steps 8 --batch 32 --max-length 512 --json end_to_end.json
        python -m benchmarks.end_to_end --model inputs/SmolLM2-135M-Instruct \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --layers 4 \
            --json end_to_end.json

    The same job in both systems, which trains without evaluating:

        python -m benchmarks.end_to_end --model inputs/SmolLM2-135M-Instruct \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --layers 4 \
            --no-evaluate --json end_to_end.json

    With adapters (--lora-rank), of the whole model:

        python -m benchmarks.end_to_end --model inputs/SmolLM2-135M-Instruct \
            --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --lora-rank 16 \
            --no-evaluate --json end_to_end.json

Output
    `runs`: one record per process, with `seconds` (wall clock), `cpu_seconds` (over all
    cores, and less sensitive to other load), `peak_mib` (resident memory of the process
    and its children together, sampled), and `phases`: seconds by name.  jaxpref's
    phases are read from OUT/timings.json:

        {"start": s, "tokenize": s, "compile": s, "reference": s, "steps": s,
         "export": s}

    Phases do not overlap; the rest of the wall-clock time is shown as `other`.
    `medians`: over rounds, by system and caches.  `ratios`: jaxpref's medians divided
    by TRL's.  A system that cannot be run is listed in `missing`.
"""

import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from benchmarks.peers.environments import Missing, python_of
from benchmarks.peers.processes import measured
from benchmarks.step import ROOT, cores, machine
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.runtime.entry import entry_point

SYSTEMS = ("jaxpref", "trl")
CACHES = ("cold", "warm")
MEASURES = ("seconds", "cpu_seconds", "peak_mib")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    model: str
    """Hugging Face folder with one file of weights."""
    data: str
    """Preference file that both systems read: JSON lines with `chosen` and `rejected`.
    """
    json: str
    """File for the records."""
    layers: int = 0
    """Layers of the model to keep; 0 means all."""
    loss: Literal["dpo", "rdpo"] = "dpo"
    """The loss."""
    flip_rate: float = 0.2
    """Flip rate that rdpo assumes."""
    lora_rank: int = 0
    """Rank of LoRA adapters of all matrices of the layers; 0 trains all weights."""
    lora_base: Literal["", "int8", "nf4"] = ""
    """--lora.base of `jaxpref train`; empty for the compute dtype."""
    compute_dtype: Literal["", "float32", "bfloat16"] = ""
    """--compute-dtype of `jaxpref train`; empty for its default."""
    steps: int = 10
    """Optimizer steps."""
    batch: int = 8
    """Pairs per step."""
    max_length: int = 512
    """Maximum tokens of a prompt and an answer together."""
    row_length: str = ""
    """--row-length of `jaxpref train`; empty for its default."""
    evaluate: bool = True
    """Whether `jaxpref train` holds out pairs and evaluates on them; TRL does not."""
    rounds: int = 3
    """Cold and warm runs of each system."""
    systems: str = ",".join(SYSTEMS)
    """Comma-separated list of systems."""
    caches: str = ",".join(CACHES)
    """Comma-separated list of caches; warm runs follow cold ones."""
    venvs: str = ".bench"
    """Folder of the virtual environments, each named after its system."""
    trl_python: str | None = None
    """Interpreter with TRL, instead of a virtual environment."""

    def __post_init__(self):
        for name, known in (("systems", SYSTEMS), ("caches", CACHES)):
            for word in getattr(self, name).split(","):
                if word not in known:
                    raise InputError(
                        f"--{name}: {word!r} is not one of {', '.join(known)}"
                    )
        for name in ("rounds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive")


def main(options: Options) -> None:
    """Measures round by round; results are written after each process."""
    check_output(
        "--json", options.json, {"--model": options.model, "--data": options.data}
    )
    missing, pythons = [], {}
    for system in options.systems.split(","):
        try:
            given = options.trl_python if system == "trl" else None
            pythons[system] = python_of(system, Path(options.venvs), given)
        except Missing as reason:
            missing.append({"system": system, "reason": str(reason)})
    written = {
        "command": " ".join(["python -m benchmarks.end_to_end", *sys.argv[1:]]),
        "machine": machine(),
        "options": dataclasses.asdict(options),
        "runs": [],
        "medians": [],
        "ratios": [],
        "missing": missing,
    }
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        folder = Path(name)
        model = Path(options.model).absolute()
        if options.layers:
            model = cut_layers(model, folder / "model", options.layers)
        for round_, system, caches in tqdm(schedule(options, pythons), unit="run"):
            shared = folder / f"{system}-{round_}"
            try:
                found = run(options, system, pythons[system], model, shared)
            except Missing as reason:
                missing.append({"system": system, "reason": str(reason)})
                continue
            if caches in options.caches.split(","):
                record = {"system": system, "caches": caches, "round": round_}
                written["runs"].append(record | found)
            written["medians"] = medians(written["runs"])
            written["ratios"] = ratios(written["medians"])
            write_json(options.json, written)
    print(table(written))


def schedule(
    options: Options, pythons: Mapping[str, str]
) -> list[tuple[int, str, str]]:
    """The (round, system, caches) of all runs, in order."""
    # A warm run needs the cold one before it, even if that was not requested.
    caches = CACHES if "warm" in options.caches else CACHES[:1]
    return [
        (round_, system, state)
        for round_ in range(options.rounds)
        for state in caches
        for system in pythons
    ]


def cut_layers(source: Path, target: Path, layers: int) -> Path:
    """A copy of a model folder with only its first layers; weights keep their dtype.

    Raises:
      InputError: if the folder lacks `model.safetensors` or has too few layers.
    """
    weights = source / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: not there; --layers needs one file of weights")
    config = json.loads((source / "config.json").read_text("utf-8"))
    if not 0 < layers <= config["num_hidden_layers"]:
        raise InputError(
            f"--layers {layers}: the model has {config['num_hidden_layers']}"
        )
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    for path in (target, target / "config.json"):
        path.chmod(path.stat().st_mode | 0o200)  # the source may be read-only
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    content = weights.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header, parts, length = {}, [], 0
    for name, entry in json.loads(content[8:begin]).items():
        if name == "__metadata__":
            header[name] = entry
        elif layer_of(name) < layers:
            first, last = entry["data_offsets"]
            parts.append(content[begin + first : begin + last])
            offsets = [length, length + last - first]
            header[name] = entry | {"data_offsets": offsets}
            length = offsets[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    size = len(head).to_bytes(8, "little")
    (target / weights.name).write_bytes(b"".join([size, head, *parts]))
    return target


def layer_of(name: str) -> int:
    """The layer that a tensor belongs to, or -1 if none."""
    before, found, after = name.partition(".layers.")
    return int(after.split(".")[0]) if found else -1


def run(options: Options, system: str, python: str, model: Path, shared: Path) -> dict:
    """Measures the seconds, memory, and phases of one run.

    Args:
      options: of this benchmark.
      system: "jaxpref" or "trl".
      python: its interpreter.
      model: folder of the model.
      shared: folder of the caches, used again by the warm run.

    Raises:
      Missing: if it fails, with the reason in one line.
    """
    shared.mkdir(exist_ok=True)
    out = Path(tempfile.mkdtemp(dir=shared))
    if system == "jaxpref":
        command = [python, "-m", "jaxpref", *train_arguments(options, model, out)]
        timings = out / "timings.json"
    else:
        job = {name: getattr(options, name) for name in ("batch", "steps", "loss")}
        job |= {"max_length": options.max_length, "flip_rate": options.flip_rate}
        job |= {"lora_rank": options.lora_rank}
        job |= {"model": str(model), "data": str(Path(options.data).absolute())}
        job |= {"out": str(out), "threads": cores(), "started": time.time()}
        (shared / "job.json").write_text(json.dumps(job), "utf-8")
        script, timings = "benchmarks/peers/train_trl.py", out / "timings.json"
        command = [python, str(ROOT / script), str(shared / "job.json"), str(timings)]
    with (shared / "log").open("w+", encoding="utf-8", errors="replace") as log:
        took = measured(command, environment(system, shared), log)
        log.seek(0)
        *_, last = [line for line in log.read().splitlines() if line] or ["no message"]
    if took.code == -9:
        raise Missing("killed, most likely because memory ran out")
    # With adapters, TRL exports them alone.
    if took.code or not any((out / "export").glob("*model.safetensors")):
        raise Missing(f"ended with code {took.code}: {last}"[:300])
    return {
        **{name: getattr(took, name) for name in MEASURES},
        "phases": read_phases(timings, took.seconds),
    }


def train_arguments(options: Options, model: Path, out: Path) -> list[str]:
    """The arguments of `jaxpref`."""
    given = {
        "model": model,
        "data": Path(options.data).absolute(),
        "out": out,
        "loss": options.loss,
        "max-steps": options.steps,
        "batch-size": options.batch,
        "max-length": options.max_length,
    }
    if options.loss == "rdpo":
        given["loss.flip-rate"] = options.flip_rate
    if options.lora_rank:
        given["lora.rank"] = options.lora_rank
    if options.lora_base:
        given["lora.base"] = options.lora_base
    if options.compute_dtype:
        given["compute-dtype"] = options.compute_dtype
    if options.row_length:
        given["row-length"] = options.row_length
    if not options.evaluate:
        given["heldout-fraction"] = 0
    return ["train", *(str(x) for flag, v in given.items() for x in (f"--{flag}", v))]


def environment(system: str, shared: Path) -> dict[str, str]:
    """Environment variables of a run: its caches, and CPU only."""
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "JAXPREF_CACHE": str(shared / "cache"),
        "HF_HOME": str(shared / "huggingface"),
        "HF_HUB_OFFLINE": "1",
    }
    # Compiled programs then lie in the folder above, the small ones too, as they do for
    # whoever sets nothing.
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH"):
        environ.pop(name, None)
    if system == "jaxpref":
        environ["PYTHONPATH"] = str(ROOT)
    return environ


def read_phases(path: Path, seconds: float) -> dict[str, float]:
    """Seconds by phase, and `other`; empty if the run wrote none."""
    if not path.exists():
        return {}
    phases = json.loads(path.read_text("utf-8"))
    return phases | {"other": seconds - sum(phases.values())}


def medians(runs: Sequence[Mapping]) -> list[dict]:
    """One record per system and state of the caches: medians over rounds."""
    groups: dict[tuple, list] = {}
    for record in runs:
        groups.setdefault((record["caches"], record["system"]), []).append(record)
    found = []
    for (caches, system), same in sorted(groups.items()):
        seconds = [record["seconds"] for record in same]
        phases = [record["phases"] for record in same if record["phases"]]
        names = phases[0] if phases else ()
        found.append(
            {
                "system": system,
                "caches": caches,
                "rounds": len(same),
                **{
                    name: statistics.median([r[name] for r in same])
                    for name in MEASURES
                },
                "range": [min(seconds), max(seconds)],
                "phases": {
                    n: statistics.median([p.get(n, 0) for p in phases]) for n in names
                },
            }
        )
    return found


def ratios(found: Sequence[Mapping]) -> list[dict]:
    """jaxpref's time and memory as a share of TRL's, by state of the caches."""
    by_name = {(record["caches"], record["system"]): record for record in found}
    return [
        {
            "caches": caches,
            **{
                name: by_name[caches, "jaxpref"][name] / by_name[caches, "trl"][name]
                for name in MEASURES
            },
        }
        for caches in CACHES
        if {(caches, system) for system in SYSTEMS} <= by_name.keys()
    ]


def table(written: Mapping) -> str:
    """Formats the records as text."""
    computer = written["machine"]
    load = (computer["load_average"] or [0.0])[0]
    lines = [
        f"{computer['processor']}, {computer['cores']} cores, "
        f"{computer['memory_gib']} GiB, load {load:.1f} before the runs",
        f"{'system':8} {'caches':6} {'seconds':>8} {'range':>16} {'CPU s':>8}"
        f" {'peak GiB':>9}",
    ]
    for r in written["medians"]:
        low, high = r["range"]
        spread = f"{low:.1f} to {high:.1f}"
        lines.append(
            f"{r['system']:8} {r['caches']:6} {r['seconds']:8.1f} {spread:>16}"
            f" {r['cpu_seconds']:8.1f} {r['peak_mib'] / 1024:9.2f}"
        )
    for r in written["medians"]:
        phases = [f"{name} {value:.1f}" for name, value in r["phases"].items()]
        listed = ", ".join(phases) or "no phases were written"
        lines.append(f"{r['system']}, {r['caches']}: {listed}")
    for r in written["ratios"]:
        lines.append(
            f"{r['caches']} caches: {r['seconds']:.2f} of TRL's time,"
            f" {r['cpu_seconds']:.2f} of its CPU seconds, {r['peak_mib']:.2f} of its"
            " memory"
        )
    for entry in written["missing"]:
        lines.append(f"missing: {entry['system']}: {entry['reason']}")
    return "\n".join(lines)


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
