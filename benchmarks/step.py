r"""Speed and memory of a DPO step, compared with other libraries on the same pairs.

Each system has its own virtual environment (created once, in .bench) and its own
processes.  They run in turns for several rounds: jaxpref, TRL, Tunix, plain torch.  All
start with the same random float32 weights in a Hugging Face folder, and use the same
tokenized pairs, AdamW with the same settings, and all cores.  Each round has its own
pairs; its first step compiles and is not counted.

Systems
    jaxpref: packed rows with each prompt once, stored reference log-probs.
    trl: TRL 1.16 with reference log-probs computed in advance, no gradient
        checkpointing, and its own collator, which pads to the longest sequence of a
        batch.
    tunix: google-tunix 0.1.7, which has no stored reference: its model computes the
        log-probs in each step; prompts and answers are padded to fixed lengths.
    torch: plain torch, padded to the longest sequence of the batch, with all logits and
        a stored reference.

Cases
    hh: HH helpful, at most 512 tokens each for prompt and answer, 8 pairs per step.
    ultrafeedback: at most 1,024 tokens each; Tunix accumulates steps of 2 pairs,
        because the logits of 8 would not fit in memory.
    fixed: 4 pairs with a prompt of 64 random tokens and two answers of 192.
    The model of the first two has the sizes and the tokenizer of --model, cut to
    --layers; that of the third has 8 layers, width 512, and a vocabulary of 32,000.

Commands
    All systems and cases, and a quick version:

        python -m benchmarks.step --cases hh,ultrafeedback,fixed \
            --systems jaxpref,trl,tunix,torch --json step.json
        python -m benchmarks.step --cases hh,ultrafeedback,fixed \
            --systems jaxpref,trl,tunix,torch --json quick.json --quick

    The real pairs and SmolLM2 are made once, by `python -m benchmarks.inputs hh
    smollm2`.  The quick version needs neither, and uses random tokens in all cases,
    unless --hh, --ultrafeedback or --model are given.

Output
    One record per case and system:
    `pairs_per_second`: median over rounds of pairs per second.  A pair is normalized to
        the mean tokens of the round, because packed rows hold only approximately as
        many pairs per step, and different ones.
    `spread`: its quartiles.
    `seconds_per_step`: from the end of a step to the end of the next, with its batch.
    `peak_mib`: peak memory of the whole process.
    `utilization`: necessary operations (see `useful_flops`) per second, as a share of
        the rate of a 2,048 x 2,048 float32 matrix product measured in the same run, the
        better of XLA and torch.

    Before the rounds, all systems take three steps on the same four short pairs.  Their
    first losses must be log 2 within 2e-4, their first gradients must have the same
    norm within 0.05%, and their losses must decrease equally within 2%; differences are
    in `disagreements`.  In the rounds, packed batches hold other pairs, so losses are
    not compared.  Systems that cannot be installed, or that fail, are in `missing`.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.peers.cases import (
    CASES,
    FIXED_MODEL,
    ROPE_THETA,
    Case,
    Listed,
    random_pairs,
    real_pairs,
    sizes,
    write_model,
)
from benchmarks.peers.environments import Missing, python_of
from benchmarks.peers.job import Job
from benchmarks.peers.records import disagreements, ratios, summarize, table
from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.runtime.entry import entry_point

ROOT = Path(__file__).resolve().parents[1]
DATA = {
    "hh": "inputs/hh_rlhf_helpful_base_test.jsonl.gz",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized?split=train_prefs",
}
"""The default preference data of the cases with real pairs."""
MODEL = "inputs/SmolLM2-135M-Instruct"
SYSTEMS = ("jaxpref", "trl", "tunix", "torch")
LONGEST_RANDOM = 192
"""Tokens of the longest random prompt or answer."""
CHECK_PAIRS, CHECK_TOKENS, CHECK_STEPS = 4, 64, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    json: str
    """JSON file for the results."""
    cases: str = ",".join(CASES)
    """Comma-separated list."""
    systems: str = ",".join(SYSTEMS)
    """Comma-separated list."""
    quick: bool = False
    """One layer, and one round of one step of two pairs of random tokens: checks that
    all of it runs."""
    hh: str | None = None
    """Preference data of the case hh (default: `DATA`)."""
    ultrafeedback: str | None = None
    """Preference data of the case ultrafeedback (default: `DATA`)."""
    model: str | None = None
    """Hugging Face folder or Hub ID with sizes and tokenizer for the real pairs; its
    weights are not read (default: `MODEL`)."""
    layers: int = 4
    """Layers of that model to keep; 0 means all."""
    rounds: int = 3
    """Processes of each system and case, in turns, each with its own pairs."""
    steps: int = 4
    """Steps to time in each process."""
    batch_size: int | None = None
    """Pairs per step in all cases (default: 8, but 4 in the case fixed)."""
    row_length: str = ""
    """Tokens of jaxpref's packed rows by case, such as hh=512,fixed=-1: 0 means the
    length of the longest pair, -1 one pair per row."""
    venvs: str = ".bench"
    """Folder of the virtual environments, each named after its system."""
    trl_python: str | None = None
    """Interpreter with TRL, instead of a virtual environment."""
    tunix_python: str | None = None
    """Interpreter with google-tunix."""
    torch_python: str | None = None
    """Interpreter with torch and transformers."""

    def __post_init__(self):
        for name, known in (("cases", CASES), ("systems", SYSTEMS)):
            for word in getattr(self, name).split(","):
                if word not in known:
                    raise InputError(
                        f"--{name}: {word!r} is not one of {', '.join(known)}"
                    )
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive")


def main(options: Options) -> None:
    """Measures case by case; results are written after each."""
    check_output("--json", options.json, {"--model": options.model})
    options = for_a_look(options) if options.quick else options
    cases = [with_options(CASES[name], options) for name in options.cases.split(",")]
    missing, pythons = [], {}
    for system in dict.fromkeys(options.systems.split(",")):
        given = getattr(options, f"{system}_python", None)
        try:
            pythons[system] = python_of(system, Path(options.venvs), given)
        except Missing as reason:
            missing.append({"system": system, "reason": str(reason)})
            print(f"{system}: left out: {reason}", file=sys.stderr)
    written = {
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        "machine": machine(),
        "options": dataclasses.asdict(options),
        "matrix_product_flops_per_second": {},
        "records": [],
        "ratios": [],
        "disagreements": [],
        "missing": missing,
    }
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        prepared = [prepare(case, options, folder) for case in cases]
        runs = 1 + options.rounds * 2 + len(cases) * len(pythons) * (options.rounds + 1)
        with tqdm(total=runs, unit="run", disable=None) as bar:
            rates = measure_rates(options, pythons, folder, bar)
            written["matrix_product_flops_per_second"] = rates
            for case, config, listed in prepared:
                measure(case, config, listed, options, pythons, folder, bar, written)
                written["ratios"] = ratios(written["records"])
                write_json(options.json, written)
    print(table(written["records"]))
    for line in written["disagreements"]:
        print(f"DISAGREEMENT: {line}")
    for entry in missing:
        print(f"missing: {' '.join(entry.values())}")


def for_a_look(options: Options) -> Options:
    """`--quick`: the least that runs every system in every case."""
    return dataclasses.replace(
        options, layers=1, rounds=1, steps=1, batch_size=options.batch_size or 2
    )


def with_options(case: Case, options: Options) -> Case:
    """The case with the requested sizes."""
    rows = {}
    for word in options.row_length.split(",") if options.row_length else ():
        name, _, length = word.partition("=")
        if name not in CASES or not length.lstrip("-").isdigit():
            raise InputError(
                f"--row-length: {word!r} is not CASE=TOKENS; cases are "
                f"{', '.join(CASES)}"
            )
        rows[name] = int(length)
    size = options.batch_size or case.batch_size
    return dataclasses.replace(
        case,
        batch_size=size,
        micro_batch=min(case.micro_batch, size),
        row_length=rows.get(case.name, case.row_length),
    )


def prepare(
    case: Case, options: Options, folder: Path
) -> tuple[Case, LlamaArchitecture, list[Listed]]:
    """Writes a case's model; returns the case, the model's sizes, pairs by round."""
    size = (1 + options.steps) * case.batch_size
    count = size * options.rounds
    given = getattr(options, case.name, None) or options.model
    if case.name == "fixed" or (options.quick and not given):
        layers = 1 if options.quick else FIXED_MODEL.num_layers
        config = dataclasses.replace(FIXED_MODEL, num_layers=layers)
        drawn = dataclasses.replace(
            case,
            prompt_length=min(case.prompt_length, LONGEST_RANDOM),
            response_length=min(case.response_length, LONGEST_RANDOM),
        )
        listed = random_pairs(drawn, config.vocab_size, count)
    else:
        source = made(getattr(options, case.name) or DATA[case.name], case.name)
        model = resolve_folder(made(options.model or MODEL, "model"))
        config = read_architecture(model)
        config = dataclasses.replace(
            config,
            num_layers=min(options.layers or config.num_layers, config.num_layers),
            max_position_embeddings=max(
                config.max_position_embeddings,
                case.prompt_length + case.response_length,
            ),
        )
        listed = real_pairs(case, source, data.load_tokenizer(model), count)
    config = dataclasses.replace(config, rope_theta=ROPE_THETA, rope_scaling=None)
    write_model(folder / case.name, config)
    rounds = [listed[start : start + size] for start in range(0, count, size)]
    return case, config, rounds


def made(name: str, option: str) -> str:
    """The name of an input, which must exist if `benchmarks.inputs` makes it."""
    if name.startswith("inputs/") and not Path(name).exists():
        raise InputError(
            f"{name}: does not exist; `python -m benchmarks.inputs` makes it, or name "
            f"another with --{option}"
        )
    return name


def measure_rates(options, pythons, folder: Path, bar) -> dict[str, float]:
    """FLOP/s of a float32 matrix product by library, best of several rounds."""
    scripts = {"jax": ("jaxpref", sys.executable)}
    for system in ("torch", "trl"):
        if system in pythons:
            scripts["torch"] = ("torch", pythons[system])
            break
    job = Job(mode="rate", threads=cores())
    rates = {}
    for _ in range(options.rounds):
        for library, (system, python) in scripts.items():
            bar.set_description(f"matrix product, {library}")
            found = run(job, system, python, folder)
            rates[library] = max(found["rate"], rates.get(library, 0))
            bar.update()
    return rates


def measure(
    case: Case,
    config: LlamaArchitecture,
    listed: list[Listed],
    options: Options,
    pythons: dict[str, str],
    folder: Path,
    bar,
    written: dict,
) -> None:
    """Runs the check and the rounds of a case; adds to the results."""
    job = Job(
        mode="train",
        threads=cores(),
        model=str(folder / case.name),
        pairs=str(folder / "pairs.json"),
        batch_size=case.batch_size,
        steps=options.steps,
        prompt_length=case.prompt_length,
        response_length=case.response_length,
        micro_batch=case.micro_batch,
        row_length=case.row_length,
    )
    failed, runs = {}, {system: [] for system in pythons}

    def take(job: Job, what: str):
        for system, python in pythons.items():
            bar.set_description(f"{case.name}, {what}, {system}")
            try:
                if system not in failed:
                    yield system, run(job, system, python, folder)
            except Missing as reason:
                failed[system] = str(reason)
                entry = {"case": case.name, "system": system, "reason": str(reason)}
                written["missing"].append(entry)
            bar.update()

    write_pairs(job, shortened(listed[0][:CHECK_PAIRS]))
    check = dataclasses.replace(
        job,
        batch_size=min(CHECK_PAIRS, len(listed[0])),
        warmup=0,
        steps=CHECK_STEPS,
        repeat=True,
        prompt_length=CHECK_TOKENS,
        response_length=CHECK_TOKENS,
        micro_batch=0,
        row_length=min(case.row_length, 0),
    )
    checked = dict(take(check, "check"))
    if checked:
        differences = disagreements(checked)
        written["disagreements"] += [f"{case.name}: {line}" for line in differences]
    for number, pairs in enumerate(listed):
        write_pairs(job, pairs)
        for system, found in take(job, f"round {number + 1}"):
            runs[system].append(found)
    for system, of_rounds in runs.items():
        if system not in failed:
            record = summarize(
                case.name,
                system,
                of_rounds,
                [sizes(pairs) for pairs in listed],
                config,
                warmup=case.batch_size,
                rate=max(written["matrix_product_flops_per_second"].values()),
            )
            record["losses_of_the_check"] = checked[system]["losses"]
            record["grad_norm_of_the_check"] = checked[system]["grad_norms"][0]
            written["records"].append(record)


def shortened(listed: Listed) -> Listed:
    """The end of each prompt and the beginning of each answer."""
    return [
        [prompt[-CHECK_TOKENS:], *(answer[:CHECK_TOKENS] for answer in answers)]
        for prompt, *answers in listed
    ]


def write_pairs(job: Job, listed: Listed) -> None:
    Path(job.pairs).write_text(json.dumps(listed), encoding="utf-8")


def run(job: Job, system: str, python: str, folder: Path) -> dict:
    """Runs one process of a system and returns its results.

    Raises:
      Missing: if it fails, with the reason in one line.
    """
    source, out = folder / "job.json", folder / "found.json"
    source.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    out.unlink(missing_ok=True)
    script = ROOT / "benchmarks" / "peers" / f"run_{system}.py"
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    environ.pop("PYTHONPATH", None)
    if system == "jaxpref":
        environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [python, str(script), str(source), str(out)],
        env=environ,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == -9:
        raise Missing("killed, most likely for want of memory")
    if done.returncode or not out.exists():
        *_, last = [line for line in done.stderr.splitlines() if line] or ["no message"]
        raise Missing(f"ended with code {done.returncode}: {last}"[:300])
    return json.loads(out.read_text("utf-8"))


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict:
    """Describes the processor, its cores, memory, and load."""
    name = platform.processor() or platform.machine()
    memory = None
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2] for line in lines if "model name" in line]
        name = names[0].strip() if names else name
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = round(pages / 2**30, 1)
    except (OSError, ValueError):
        pass
    return {
        "processor": name,
        "cores": cores(),
        "memory_gib": memory,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
