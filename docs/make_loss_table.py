"""Writes docs/losses.md: every public function of `jaxpref.losses`, and how it behaves.

Nothing in the tables is typed by hand.  Papers come from the docstrings, defaults from
the signatures, and what a loss does to contradicted pairs and under flipped labels is
measured on the function itself.

    python docs/make_loss_table.py
"""

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpref import losses

PAGE = Path(__file__).with_name("losses.md")

PAIRS = 50
FAR = 2048.0
SHARE = 0.8
FLIPS = 0.3
HUGE = 1e6
"""Nothing that is not an exponential gets so far."""
MOVING = ("logps", "log_ratios", "rewards")
"""How the names of those arrays end that training changes."""

INTRODUCTION = f"""\
# The losses

Made by `python docs/make_loss_table.py` from the functions themselves; see
`help(jaxpref.losses.dpo)` and so on for equations, units and examples.

How to read the tables of losses of pairs:

- *Bounded*: whether the loss has a least and a greatest value as the log-probs (or
  rewards) of the two answers move apart or together.
- *Contradicted pair*: how hard a pair that the model puts {2 * FAR:.0f} nats the wrong
  way round ({FAR / 2:.0f} tokens) pulls at the chosen answer, as a multiple of a pair
  with margin 0. "-> 0": redescending, the pair is taken for a flip; "grows": the more
  wrong, the harder. In a batch of {PAIRS} whose other pairs have margin 0.
- *Margin learnt*: one prompt with two answers of one token, a reference that gives
  both 1/2, and annotators who prefer the first with probability {SHARE}. The margin
  (log-ratio margin, reward difference) at which training from the reference comes to
  rest, on clean labels and with {FLIPS:.0%} of the labels flipped, and how much of the
  clean margin is left. "inf": it never comes to rest. A loss that takes a flip rate is
  told {FLIPS} of flipped labels and 0 of clean ones.
- Other options without a default are 1/2.
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a function says about itself."""

    function: Callable

    @property
    def name(self) -> str:
        """Its name in `jaxpref.losses`."""
        return self.function.__name__

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.function.__module__.rsplit(".", 1)[-1] + ".py"

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Of its signature, in order."""
        return list(inspect.signature(self.function).parameters.values())

    @property
    def reads(self) -> list[str]:
        """The arrays it reads."""
        return [p.name for p in self.parameters if p.kind != p.KEYWORD_ONLY]

    @property
    def options(self) -> dict:
        """Its hyper-parameters; `inspect.Parameter.empty` where there is no default."""
        named = {p.name: p.default for p in self.parameters if p.kind == p.KEYWORD_ONLY}
        return {n: v for n, v in named.items() if v is not None}

    @property
    def coupled(self) -> bool:
        """Whether one pair's result depends on the other pairs."""
        return any(p.name == "where" for p in self.parameters)

    @property
    def is_loss(self) -> bool:
        """Whether it says that it returns losses."""
        return self.section("Returns").startswith("One loss")

    @property
    def is_of_pairs(self) -> bool:
        """Whether it is a loss of two answers' log-probs or rewards."""
        mine = {name for name in self.reads if name.endswith(MOVING)}
        return self.is_loss and any(n != swapped(n) in mine for n in mine)

    @property
    def is_of_rewards(self) -> bool:
        """Whether it reads rewards, which may be any number, and not log-probs."""
        return any(name.endswith("rewards") for name in self.reads)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads what a reference model says."""
        return any(
            n.startswith("reference_") or n.endswith("log_ratios") for n in self.reads
        )

    def section(self, title: str) -> str:
        """The text of one section of the docstring, on one line."""
        text = inspect.getdoc(self.function)
        found = re.search(rf"^{title}:\n((?:  .*\n?|\n)*)", text, re.MULTILINE)
        return " ".join(found.group(1).split()) if found else ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return inspect.getdoc(self.function).splitlines()[0].rstrip(".")

    @property
    def source(self) -> tuple[str, str]:
        """The first reference, its arXiv number linked, and the equation in it."""
        text = inspect.getdoc(self.function)
        # An entry ends with a full stop at the end of a line.
        found = re.search(r"^References:\n((?:  .*\n)*?  .*?\.)$", text, re.MULTILINE)
        if not found:
            return "", ""
        first = " ".join(found.group(1).split()).split("; ")[0].rstrip(".")
        paper = re.match(r".*?arXiv:\d+\.\d+(?:v\d+)?", first)
        equation = re.search(r"Eqs?\. ([\d.]+(?:(?:, | and |-)\d+)*)", first)
        paper = paper.group(0) if paper else re.sub(r", Eqs?\. .*", "", first)
        paper = re.sub(
            r"arXiv:([\d.]+(?:v\d+)?)", r"[\1](https://arxiv.org/abs/\1)", paper
        )
        paper = re.sub(r"(?<!\()https?://\S+", r"<\g<0>>", paper)
        return paper, equation.group(1) if equation else ""


# Measuring.


def swapped(name: str) -> str:
    """The same array of the other answer."""
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    return "_".join(exchange.get(word, word) for word in name.split("_"))


def arrays(entry: Entry, chosen, rejected, reference, *, length) -> list[jax.Array]:
    """A batch for the loss: policy log-probs (rewards) given, the rest neutral."""
    found = []
    for name in entry.reads:
        if name.startswith("running"):
            found.append(jnp.asarray(float(name.endswith("std")), chosen.dtype))
        elif name.startswith("reference"):
            found.append(jnp.full_like(chosen, reference))
        elif name.endswith(MOVING):
            value = rejected if "rejected" in name else chosen
            found.append(value - reference * name.endswith("ratios"))
        elif name.endswith("lengths"):
            found.append(jnp.full_like(chosen, length))
        else:
            # Unit strength; no margin, tie, divergence or log-weight.
            found.append(jnp.full_like(chosen, float(name.endswith("strengths"))))
    return found


def options_of(entry: Entry, flip_rate: float) -> dict:
    """The options that have no default."""
    missing = [n for n, v in entry.options.items() if v is inspect.Parameter.empty]
    return {n: flip_rate if n == "flip_rate" else 0.5 for n in missing}


def far_out(entry: Entry) -> tuple[str, str]:
    """Whether it is bounded, and how hard a contradicted pair pulls.

    Of one pair that moves, in a batch where the others have margin 0.
    """
    options = options_of(entry, FLIPS)
    # Far below 0, so that log-probs stay log-probs when they rise.
    base = 0.0 if entry.is_of_rewards else -4 * FAR
    first = jnp.arange(PAIRS) == 0

    def summed(up, down):
        chosen, rejected = base + up * first, base + down * first
        batch = arrays(entry, chosen, rejected, base, length=FAR / 2)
        values = entry.function(*batch, **options)
        return jnp.sum(values), values[0]

    # The margin grows, shrinks; both rise, both fall: each by half of it and by all.
    ways = jnp.array([(1, -1), (-1, 1), (1, 1), (-1, -1)])
    ends = jnp.concatenate([FAR / 2 * ways, FAR * ways])
    # The way down from margin 0.
    down = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1.0, FAR, 12)])
    up, down = jnp.concatenate([ends, jnp.stack([-down, down], axis=1)]).T
    (_, values), pulls = jax.vmap(jax.value_and_grad(summed, has_aux=True))(up, down)

    half, whole = values[:4].tolist(), values[4:8].tolist()
    # It may fall without end only where it is already negative.
    falls = any(b < min(a - 0.01 * abs(a), 0) - 1e-6 for a, b in zip(half, whole))
    rises = any(b > a + 0.01 * abs(a) + 1e-6 for a, b in zip(half, whole))
    # An exponent that is clipped far out.
    rises = rises or max(whole) > HUGE
    bounded = [side for side, no in (("below", falls), ("above", rises)) if not no]

    undecided, *_, earlier, before, last = pulls = list(map(abs, pulls[8:].tolist()))
    explodes = max(pulls) > HUGE * undecided > 0
    # Each step is twice as long as the one before: what levels off gains less and less.
    if explodes or last - before > max(before - earlier, 0.01 * last):
        pull = "grows"
    elif last < 0.01 * max(pulls):
        pull = "-> 0"
    else:
        pull = f"x {number(last / undecided)}" if undecided else number(last)
    return " and ".join(bounded) or "no", pull


def margins_learnt(entry: Entry) -> tuple[float, float]:
    """Where training comes to rest on clean and on flipped labels."""

    def risk(margin, wrong, flip_rate):
        if entry.is_of_rewards:
            first, second = margin / 2, -margin / 2
        else:
            first = jax.nn.log_sigmoid(margin)
            second = jax.nn.log_sigmoid(-margin)
        chosen = jnp.where(wrong, second, first)
        rejected = jnp.where(wrong, first, second)
        batch = arrays(entry, chosen, rejected, -math.log(2), length=1.0)
        options = options_of(entry, flip_rate)
        return jnp.mean(entry.function(*batch, **options))

    slopes = jax.jit(jax.vmap(jax.grad(risk), (0, None, None)))

    def learnt(flip_rate):
        share = SHARE * (1 - flip_rate) + (1 - SHARE) * flip_rate
        wrong = jnp.arange(PAIRS) >= round(share * PAIRS)
        return rest(lambda margins: slopes(margins, wrong, jnp.asarray(flip_rate)))

    return learnt(0.0), learnt(FLIPS)


def rest(slopes_at: Callable) -> float:
    """Downhill from 0: where the slope turns, where a plateau begins, or infinity."""
    steps = 256
    points = [0.0, *(2.0 ** (18 * i / steps - 7) for i in range(steps))]
    start = slopes_at(jnp.array(points)).tolist()[0]
    if start == 0:
        return 0.0
    way, flat = -math.copysign(1.0, start), 1e-9 * abs(start)
    for _ in range(3):
        slopes = [way * s for s in slopes_at(way * jnp.array(points)).tolist()]
        stop = next((i for i, slope in enumerate(slopes) if slope > -flat), None)
        if stop is None:
            return way * math.inf
        (low, before), (high, after) = list(zip(points, slopes))[stop - 1 : stop + 1]
        points = [low + (high - low) * i / steps for i in range(steps + 1)]
    # It only gets flatter and flatter: no minimum.
    if after < flat and before > -10 * flat:
        return way * math.inf
    return way * high if high > 1e-6 else 0.0


# Writing.


def number(value: float) -> str:
    """Three digits, no exponent where it can be avoided."""
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.3g}"


def under_flips(clean: float, noisy: float) -> str:
    """`clean -> noisy`, and what is left of it."""
    learnt = f"{number(clean)} -> {number(noisy)}"
    if clean < 0 or noisy < 0:
        return f"{learnt}, wrong order"
    if clean == noisy:
        return f"{learnt}, unchanged"
    if math.isinf(clean) or math.isinf(noisy):
        return f"{learnt}, order kept"
    left = noisy / clean
    return f"{learnt}, " + (
        "unchanged" if abs(left - 1) < 0.005 else f"{left:.0%} left"
    )


def defaults(entry: Entry) -> str:
    """`beta` 0.1, `flip_rate` required."""
    show = lambda v: "required" if v is inspect.Parameter.empty else f"{v}"
    return ", ".join(f"`{n}` {show(v)}" for n, v in entry.options.items()) or "none"


def linked(entry: Entry) -> str:
    """Its name, linked to its file."""
    return f"[`{entry.name}`](../jaxpref/losses/{entry.file})"


def yes(truth: bool) -> str:
    """Yes or no."""
    return "yes" if truth else "no"


def table(header: str, rows: list[list[str]]) -> Iterator[str]:
    """A table in Markdown."""
    columns = header.split(" | ")
    yield f"| {header} |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        assert len(row) == len(columns)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def measured(entry: Entry) -> list[str]:
    """A row of a loss of pairs."""
    return [
        linked(entry),
        *entry.source,
        defaults(entry),
        yes(entry.needs_reference),
        yes(entry.coupled),
        *far_out(entry),
        under_flips(*margins_learnt(entry)),
    ]


def described(entry: Entry) -> list[str]:
    """A row of anything else."""
    return [linked(entry), entry.summary, *entry.source, defaults(entry)]


def page() -> str:
    """The whole page."""
    entries = [Entry(getattr(losses, name)) for name in losses.__all__]
    entries.sort(key=lambda entry: (entry.file, entry.name))
    lines = [INTRODUCTION]
    header = (
        "Loss | Paper | Eq. | Defaults | Reference | Coupled | Bounded | "
        "Contradicted pair | Margin learnt, clean -> flipped"
    )
    of_pairs = [entry for entry in entries if entry.is_of_pairs]
    with jax.enable_x64(True):
        for title, of_rewards in (
            ("Losses of pairs, for policies", False),
            ("Losses of pairs, for reward models", True),
        ):
            chosen = [e for e in of_pairs if e.is_of_rewards == of_rewards]
            lines += [f"## {title}\n", *table(header, [measured(e) for e in chosen])]
    others = [entry for entry in entries if not entry.is_of_pairs]
    for file in sorted({entry.file for entry in others}):
        mine = [entry for entry in others if entry.file == file]
        about = inspect.getmodule(mine[0].function).__doc__.splitlines()[0].rstrip(".")
        header = "Function | What it is | Paper | Eq. | Defaults"
        lines += [f"## {about}\n", *table(header, [described(e) for e in mine])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
