"""Makes the public data and models that the commands in README and docs need.

Commands
    python -m benchmarks.inputs                     (all of them)
    python -m benchmarks.inputs hh stories260k      (some of them)

Each is downloaded from its publisher, converted if necessary, checked against a
digest, and written to `inputs/`.  What is already there is left as it is.

    hh            hh_rlhf_helpful_base_test.jsonl.gz: 2,354 pairs of HH-RLHF (MIT)
    gsm8k         gsm8k_solution_pairs.jsonl.gz: right and wrong solutions of GSM8K test
                  questions by four models (MIT), 1,571 pairs
    ukp           ukpconvarg1_votes.jsonl.gz: 12,935 pairs of arguments of UKPConvArg1
                  with single votes (CC-BY 4.0)
    llamafactory  llamafactory_dpo_en_demo.json: 300 pairs of LLaMA-Factory (Apache-2.0)
    qa_feedback   finegrained_qa_feedback_dev.json: 500 questions with four answers,
                  compared by annotators (Apache-2.0)
    stories260k   stories260k-hf: a Llama model with 260 thousand parameters (MIT)
    smollm2       SmolLM2-135M-Instruct (Apache-2.0), from a 4-bit copy on PyPI
"""

import dataclasses
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import tyro
from safetensors.numpy import load

from benchmarks import llama2c
from benchmarks.peers.environments import Missing, make
from jaxpref.errors import InputError, first_line
from jaxpref.files import write_whole
from jaxpref.runtime.entry import entry_point

HUB = "https://huggingface.co"
GITHUB = "https://raw.githubusercontent.com"
HH = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/test.jsonl.gz"
GSM8K = (
    f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/example_model_solutions.jsonl"
)
UKP = (
    f"{GITHUB}/UKPLab/acl2016-convincing-arguments/"
    "ca9d24e41b8805ff2e1d3585d552b49bb64a65f7/data/UKPConvArg1-full-XML/"
)
LLAMA_FACTORY = (
    f"{GITHUB}/hiyouga/LLaMA-Factory/ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30/"
    "data/dpo_en_demo.json"
)
QA_FEEDBACK = (
    f"{GITHUB}/allenai/FineGrainedRLHF/a1469d4eba0b3754bcb343beb88f0aca24bf4848/"
    "tasks/qa_feedback/data/dev_feedback.json"
)
STORIES = f"{HUB}/karpathy/tinyllamas/resolve/main/stories260K/"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
TOPICS = """
ban-plastic-water-bottles_no-bad-for-the-economy
ban-plastic-water-bottles_yes-emergencies-only
christianity-or-atheism-_atheism
christianity-or-atheism-_christianity
evolution-vs-creation_creation
evolution-vs-creation_evolution
firefox-vs-internet-explorer_it-has-a-cute-logo-oh-and-extensions-err-add-ons
firefox-vs-internet-explorer_there-s-more-browsers-than-the-ie-firefox-is-an-animal
gay-marriage-right-or-wrong_allowing-gay-marriage-is-right
gay-marriage-right-or-wrong_allowing-gay-marriage-is-wrong
human-growth-and-development-should-parents-use-spanking-as-an-option-to-discipline-_no
human-growth-and-development-should-parents-use-spanking-as-an-option-to-discipline-_yes
if-your-spouse-committed-murder-and-he-or-she-confided-in-you-would-you-turn-them-in-_no
if-your-spouse-committed-murder-and-he-or-she-confided-in-you-would-you-turn-them-in-_yes
is-it-better-to-have-a-lousy-father-or-to-be-fatherless-_fatherless
is-it-better-to-have-a-lousy-father-or-to-be-fatherless-_lousy-father
is-porn-wrong-_no-is-is-not
is-porn-wrong-_yes-porn-is-wrong
is-the-school-uniform-a-good-or-bad-idea-_bad
is-the-school-uniform-a-good-or-bad-idea-_good
pro-choice-vs-pro-life_pro-choice
pro-choice-vs-pro-life_pro-life
william-farquhar-ought-to-be-honoured-as-the-rightful-founder-of-singapore_no-it-is-raffles-
william-farquhar-ought-to-be-honoured-as-the-rightful-founder-of-singapore_yes-of-course-
""".split()  # noqa: E501
"""The topics of UKPConvArg1 that the experiment uses."""

Get = Callable[[str], bytes]
"""Downloads a URL."""


def hh(get: Get, path: Path) -> None:
    """The published file."""
    write_checked(path, get(HH), "8be3fc1a13b27901631696f2be6f184c")


def llamafactory(get: Get, path: Path) -> None:
    """The published file."""
    write_checked(path, get(LLAMA_FACTORY), "b949be2421cfa62744afcf1b479f95b2")


def qa_feedback(get: Get, path: Path) -> None:
    """The published file."""
    write_checked(path, get(QA_FEEDBACK), "f394289ecfdc5a2d1663170254b92d75")


def gsm8k(get: Get, path: Path) -> None:
    """Pairs of a right and a wrong solution, without every third question."""
    rows = []
    for number, line in enumerate(get(GSM8K).decode().splitlines()):
        question = json.loads(line)
        right = [name for name in SOLVERS if question[name]["is_correct"]]
        wrong = [name for name in SOLVERS if not question[name]["is_correct"]]
        rows += [
            {
                "idx": number,
                "prompt": question["question"],
                "chosen": question[chosen]["solution"],
                "rejected": question[rejected]["solution"],
                "chosen_model": chosen,
                "rejected_model": rejected,
            }
            for chosen in right
            for rejected in wrong
            if number % 3
        ]
    write_rows(path, rows, "27d77701da684dd3bfcf12d64c1f43f4")


def ukp(get: Get, path: Path) -> None:
    """All votes on 24 topics; workers are numbered."""
    rows = []
    for topic in TOPICS:
        name = urllib.parse.quote(topic)
        for pair in ElementTree.fromstring(get(f"{UKP}{name}.xml")):
            text = lambda place, pair=pair: pair.findtext(place) or ""
            votes = [
                {
                    "worker": vote.findtext("turkID"),
                    "label": vote.findtext("value"),
                    "competence": round(float(vote.findtext("turkCompetence") or 0), 4),
                }
                for vote in pair.iter("mTurkAssignment")
            ]
            rows.append(
                {
                    "id": text("id"),
                    "topic": topic,
                    "title": text("debateMetaData/title"),
                    "stance": text("arg1/stance"),
                    "a1": text("arg1/text"),
                    "a2": text("arg2/text"),
                    "gold": text("goldLabel"),
                    "votes": votes,
                }
            )
    workers = sorted({vote["worker"] for row in rows for vote in row["votes"]})
    numbers = {name: f"w{n:04}" for n, name in enumerate(workers)}
    for row in rows:
        for vote in row["votes"]:
            vote["worker"] = numbers[vote["worker"]]
    write_rows(path, rows, "3882396fcc9ec4a2209e91f57c7d2745")


def stories260k(get: Get, folder: Path) -> None:
    """The weights and the tokenizer of llama2.c, as a Hugging Face folder."""
    weights, tokenizer = (get(STORIES + x) for x in ("stories260K.bin", "tok512.bin"))
    files = llama2c.to_files(weights, tokenizer)
    found = hashlib.sha256()
    for name in sorted(files):
        if name.endswith(".json"):
            found.update(files[name])
    for _, tensor in sorted(load(files["model.safetensors"]).items()):
        found.update(tensor.tobytes())
    check(folder, found.hexdigest(), "9e943a9380521d75a7c8bb3da8ce0583")
    write_folder(folder, files)


def smollm2(get: Get, folder: Path) -> None:
    """Converted in a separate virtual environment, which has `gguf`."""
    script = Path(__file__).parent / "peers" / "make_smollm2.py"
    try:
        python = make("smollm2", Path(".bench") / "smollm2-tool")
    except Missing as error:
        raise InputError(f"{folder}: cannot be created ({error})") from None
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / folder.name
        done = subprocess.run([python, script, made], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise InputError(f"{folder}: cannot be created ({' '.join(last)})")
        made.rename(folder)


MAKERS: dict[str, tuple[str, Callable[[Get, Path], None]]] = {
    "hh": ("hh_rlhf_helpful_base_test.jsonl.gz", hh),
    "gsm8k": ("gsm8k_solution_pairs.jsonl.gz", gsm8k),
    "ukp": ("ukpconvarg1_votes.jsonl.gz", ukp),
    "llamafactory": ("llamafactory_dpo_en_demo.json", llamafactory),
    "qa_feedback": ("finegrained_qa_feedback_dev.json", qa_feedback),
    "stories260k": ("stories260k-hf", stories260k),
    "smollm2": ("SmolLM2-135M-Instruct", smollm2),
}
"""The file or folder that each input is written to, and its maker."""


def write_rows(path: Path, rows: list[dict], digest: str) -> None:
    """Writes gzipped JSON lines if they have the digest."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    check(path, hashlib.sha256(lines.encode()).hexdigest(), digest)
    write_whole(path, gzip.compress(lines.encode(), mtime=0))


def write_checked(path: Path, content: bytes, digest: str) -> None:
    """Writes a file if it has the digest."""
    check(path, hashlib.sha256(content).hexdigest(), digest)
    write_whole(path, content)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes all files, or none."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / folder.name
        made.mkdir()
        for file, content in files.items():
            (made / file).write_bytes(content)
        shutil.move(made, folder)


def check(path: Path, found: str, expected: str) -> None:
    """Raises InputError if the publisher has changed what was downloaded."""
    if not found.startswith(expected):
        raise InputError(
            f"{path}: what was downloaded has the SHA-256 {found[:32]}, not {expected};"
            " the publisher has changed it"
        )


def download(url: str) -> bytes:
    """The content of a URL.

    Raises:
      InputError: if it cannot be downloaded.
    """
    try:
        with urllib.request.urlopen(url, timeout=120) as response:
            return response.read()
    except OSError as error:
        raise InputError(
            f"{url}: cannot be downloaded ({first_line(error)}); check the network and "
            "run the same command again"
        ) from None


def make_inputs(names: tuple[str, ...], out: Path, get: Get = download) -> None:
    """Makes what is missing in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in MAKERS:
            raise InputError(f"{name}: no such input; expected {', '.join(MAKERS)}")
        file, maker = MAKERS[name]
        if not (out / file).exists():
            print(f"making {out / file}", file=sys.stderr, flush=True)
            maker(get, out / file)
        print(out / file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this tool."""

    names: tyro.conf.Positional[tuple[str, ...]] = tuple(MAKERS)
    """What to make."""
    out: str = "inputs"
    """Folder to write to."""


def main(options: Options) -> None:
    """Makes the inputs."""
    make_inputs(options.names, Path(options.out))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
